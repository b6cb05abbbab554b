"""Fine-tune Stable Diffusion, or train its UNet from random weights, on captioned pictures: v-prediction, eps or x0.

    python train_text_to_image.py \
        --train_config configs/train/train_config_vanilla_v2_vpred.yaml \
        --data_path datasets/pokemon_blip/train \
        --output_path output/vpred_vanilla_finetune_pokemon/txt2img \
        --pretrained_model_path models/sd_v2_768_v-e12e3a9b.ckpt
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace

from ldm import runtime
from ldm.checkpoint.diffusers_config import check_model
from ldm.config.mindone import IGNORED_TRAIN_OPTIONS, REFUSED_TRAIN_OPTIONS, optimizer
from ldm.config.model import ModelConfig, add_set, changed, load_model_config, save_model_config, to_dict
from ldm.config.options import Parser, read_options, require_at_least, seed, steps_or_share, str2bool, whole
from ldm.config.versions import VERSIONS, existing, find_checkpoint, version
from ldm.data.batches import Augment
from ldm.data.dataset import ON_BAD_IMAGE
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import build_schedule
from ldm.diffusion.timestep_bias import STRATEGIES
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.errors import UserError
from ldm.networks.adapter import PRESETS
from ldm.pipeline import check_config
from ldm.randomness import settled_seed
from ldm.train import adapters, finetune, validation
from ldm.train.ema import Ema
from ldm.train.finetune import SUFFIXES, FineTune, ckpt_folder
from ldm.train.learning_rate import SCHEDULES
from ldm.train.optimizer import OPTIMIZERS, check_numbers
from ldm.train.run import Run
from ldm.train.step import LossScale, TrainStep
from ldm.weights import Choice, Weights, choose_config, open_weights, pad_text

log = logging.getLogger("train_text_to_image")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    _add_model_and_data(parser.add_argument_group("model and data").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)
    _add_times_and_rate(parser.add_argument_group("times and learning rate").add_argument)
    _add_adapters(parser.add_argument_group("adapters (LoRA)").add_argument)
    _add_output(parser.add_argument_group("output").add_argument)
    add = parser.add_argument_group("system").add_argument
    runtime.add_device_options(add)
    add("--dtype", choices=list(runtime.DTYPES), help="default: float16 on Ascend, float32 on a CPU")
    add("--use_parallel", type=str2bool, default=False, help="with scripts/run_train_distributed.sh: one of several")
    parser.ignore(IGNORED_TRAIN_OPTIONS)
    parser.refuse(REFUSED_TRAIN_OPTIONS)
    return parser


def _add_model_and_data(add: Callable) -> None:
    add("--train_config", help="YAML file with values for these options; the command line overrides it")
    add(
        "-v",
        "--version",
        type=version,
        choices=list(VERSIONS),
        help="a published model: its file in models/, and its config",
    )
    add("--download", action="store_true", help="fetch the version's checkpoint where it is not there")
    add(
        "--model_config",
        help="the model's YAML file, as for sampling (default: the checkpoint's own, or the version's)",
    )
    add_set(add)
    add("--pretrained_model_path", default="", help="the checkpoint to start from (default: the version's)")
    add("--vae_path", help="an autoencoder's own file or folder, in the place of the checkpoint's")
    add("--unet_initialize_random", type=str2bool, default=False, help="random weights for the UNet")
    add("--text_encoder_initialize_random", type=str2bool, default=False, help="random weights for the text encoder")
    add("--data_path", default="dataset", help="a folder with pictures and img_txt.csv (columns dir,text)")
    add("--output_path", default="output", help="checkpoints, log, configs and validation pictures go there")
    add("--image_size", type=int, help="side in pixels (default: the model config's)")
    add("--image_filter_size", type=int, default=0, help="leave out pictures with a shorter side")
    add("--random_crop", type=str2bool, default=False, help="crop at a random place instead of the middle")
    add("--flip", type=str2bool, default=False, help="mirror half of the pictures")
    add("--caption_dropout", type=float, default=0.0, help="share of captions emptied, for guidance")
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="error", help="what to do about an unreadable picture")
    add("--cache_latents", type=str2bool, default=True, help="encode each picture once, where no crop is random")
    add("--cache_text", type=str2bool, default=True, help="encode each caption once, where the encoder is frozen")
    add("--cache_path", help="a folder for both caches, which runs may share (default: cache/ in output_path)")
    add("--cache_only", type=str2bool, default=False, help="fill the caches and stop")


def _add_training(add: Callable) -> None:
    add("--epochs", type=int, default=10, help="passes over the data")
    add("--train_steps", type=int, default=0, help="stop after so many steps instead (0: after the epochs)")
    add("--train_batch_size", type=int, default=10, help="of each process")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of that size per step")
    add("--train_text_encoder", type=str2bool, default=False, help="train the text encoder along with the UNet")
    add("--trainable_modules", nargs="*", default=[], help="what to train of the UNet (or all): regular expressions")
    add("--optim", type=optimizer, choices=list(OPTIMIZERS), default="adamw", help="muon: faster from random weights")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="decay of the optimizer's averages")
    add("--weight_decay", type=float, default=1e-6, help="not applied to norms and biases")
    add("--clip_grad", type=str2bool, default=False, help="scale larger gradients down to max_grad_norm")
    add("--max_grad_norm", type=float, default=1.0, help="with clip_grad")
    add("--use_ema", type=str2bool, default=False, help="save and validate with the weights' moving average")
    add("--ema_decay", type=float, default=0.9999, help="of the moving average")
    add("--init_loss_scale", type=float, default=65536, help="with float16")
    add("--scale_window", type=whole, default=1000, help="with float16: good steps before the loss scale is doubled")
    add("--seed", type=seed, default=3407, help="of order, noise, times, dropout and random weights")


def _add_times_and_rate(add: Callable) -> None:
    weightings = "of the times: min_snr is arXiv 2303.09556, truncated_snr and snr_plus_one are arXiv 2202.00512"
    add("--loss_weighting", choices=list(WEIGHTINGS), default="none", help=weightings)
    add("--snr_gamma", type=float, default=5.0, help="of min_snr")
    add("--timestep_bias_strategy", choices=list(STRATEGIES), default="none", help="which timesteps come more often")
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how many times as often as the others")
    add("--timestep_bias_portion", type=float, default=0.25, help="of all timesteps, with earlier or later")
    add("--timestep_bias_begin", type=int, default=0, help="with range: its first")
    add("--timestep_bias_end", type=int, help="with range: the one after its last (default: after the last of all)")
    add("--scheduler", choices=list(SCHEDULES), default="cosine_decay", help="of the learning rate, after the warm-up")
    add("--start_learning_rate", type=float, default=1e-5, help="after the warm-up")
    add("--end_learning_rate", type=float, default=1e-7, help="after decay_steps")
    add("--warmup_steps", type=steps_or_share, default=1000, help="in which the rate rises; below 1 a share of all")
    add("--decay_steps", type=int, default=0, help="in which it falls (0: to the last step)")
    add("--milestones", type=int, nargs="*", default=[], help="of multi_step_decay: steps after the warm-up")
    add("--decay_rate", type=float, default=0.9, help="of multi_step_decay: what the rate is multiplied by there")


def _add_adapters(add: Callable) -> None:
    add("--use_lora", type=str2bool, default=False, help="train low-rank adapters instead of the weights")
    add("--lora_rank", type=int, default=4, help="of the adapters")
    add("--lora_alpha", type=float, help="the adapters' scale is alpha / rank (default: the rank)")
    add("--lora_scale", type=float, default=1.0, help="the scale itself, in place of lora_alpha")
    add("--lora_dropout", type=float, default=0.0, help="share of the input features that a step leaves out")
    add("--lora_targets", nargs="+", default=["attention"], help=f"{', '.join(PRESETS)}, or regular expressions")
    add("--lora_ckpt_path", help="adapters to start from, in any form")
    add("--lora_ft_unet", type=str2bool, default=True, help="adapters in the UNet")
    add("--lora_ft_text_encoder", type=str2bool, default=False, help="adapters in the text encoder")
    add("--lora_format", choices=list(adapters.SUFFIXES), default="mindone", help="of the files")


def _add_output(add: Callable) -> None:
    add("--step_mode", type=str2bool, default=False, help="count ckpt_save_interval in steps instead of epochs")
    add("--ckpt_save_interval", type=int, default=1, help="epochs (or steps) from one checkpoint to the next")
    add("--ckpt_max_keep", type=int, default=10, help="the last so many checkpoints are kept (0: all)")
    add("--ckpt_format", choices=list(SUFFIXES), default="mindspore", help="of the checkpoints")
    add("--ckpt_dtype", choices=("float32", "float16"), default="float32", help="of the checkpoints' numbers")
    add("--resume", nargs="?", const="True", default="False", help="True, or the path of a resume state")
    add("--validation_prompts", nargs="*", default=[], help="prompts drawn while training")
    add("--validation_interval", type=int, default=500, help="steps between validation pictures (0: at the end only)")
    add("--validation_epochs", type=int, default=0, help="epochs between them, in the place of steps (0: by steps)")
    add("--validation_sampler", choices=list(SAMPLERS), help="as --sampler when drawing (default: the model's)")
    add("--validation_steps", type=int, help="sampling steps (default: the model's)")
    add("--validation_scale", type=float, help="guidance scale (default: the model's)")


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Find mistakes before the data is read and the networks are built; UserError."""
    if args.use_lora:
        adapters.check(args)
    require_at_least(1, args, "train_batch_size", "gradient_accumulation_steps", "epochs", "ckpt_save_interval")
    require_at_least(0, args, "train_steps", "ckpt_max_keep", "validation_interval", "validation_epochs")
    finetune.require_trainable(config)
    check_config(config, args.image_size)
    schedule = build_schedule(config.schedule)
    drawn = validation.settings_of(args, config)
    drawn.sampler.times(schedule, drawn.steps)
    finetune.timestep_bias(args, config)
    weight = finetune.timestep_weight(args, config)
    finetune.learning_rate(args, args.train_steps or 1)
    LossScale(args.init_loss_scale, args.scale_window)
    TrainStep.check(args.max_grad_norm if args.clip_grad else None)
    Ema.check(args.ema_decay)
    check_numbers(tuple(args.betas), weight_decay=args.weight_decay)
    Augment(args.random_crop, args.flip, args.caption_dropout)
    if args.ckpt_format == "diffusers":
        check_model(to_dict(config)["model"])
    if args.trainable_modules and args.unet_initialize_random:
        raise UserError("trainable_modules leaves the other weights as they are; not with unet_initialize_random")
    if not weight.all():
        log.warning(
            "%s gives the last timestep no weight, for it is noise alone (zero_terminal_snr): the step that drawing "
            "begins with is not trained; --loss_weighting none trains it",
            args.loss_weighting,
        )


def settle(args: argparse.Namespace) -> tuple[Choice, Weights]:
    """The model that the command means, and its open file; fills in the options that these decide."""
    if args.version and not args.pretrained_model_path:
        config = changed(load_model_config(args.model_config or VERSIONS[args.version].config), args.set)
        wanted = None if args.unet_initialize_random else config.prediction_type
        args.pretrained_model_path = find_checkpoint(args.version, args.download, wanted)
    if not args.pretrained_model_path:
        raise UserError(
            "no pretrained_model_path: give a checkpoint or a --version; random networks still need its VAE"
        )
    weights = open_weights(existing(args.pretrained_model_path), raw=True)
    if args.unet_initialize_random and args.model_config:  # whatever the file's own UNet is
        config = changed(load_model_config(args.model_config), args.set)
        choice = Choice(pad_text(config, args.pretrained_model_path, weights), "the config")
    else:
        choice = choose_config(weights, args.model_config, args.version, args.set)
    args.image_size = args.image_size or choice.config.image_size
    return choice, weights


def main() -> None:
    args = read_options(build_parser())
    ranks = runtime.join(args.use_parallel)
    args.seed = settled_seed(args.seed, ranks.broadcast)
    with ranks.main_first("settings"):
        choice, weights = settle(args)
        check(args, choice.config)
        finetune.check_start(args, choice, weights)
        config = replace(choice.config, image_size=args.image_size)  # what it is trained for
        run = Run(args, ckpt_folder(args), ranks)
        dtype = runtime.compute_dtype(args.dtype, args.device_target, training=True)
        settings = finetune.run_settings(args, config, dtype, ranks)
        if not args.cache_only:
            run.claim(settings)
    ranks.check_shared(run.state_folder)
    device = runtime.start(args.device_target, args.mode, ranks, runtime.ascend_settings(args))
    tensors = finetune.start_tensors(args, config, weights)
    finetune.trained_unet(args, tensors)  # finds mistakes before the caches are filled
    data = finetune.open_data(args)
    log.info(data.summary())
    if ranks.is_main:
        finetune.require_finite_weights(args, tensors)
        finetune.warn_of_captions(data, config)
    if args.cache_only:
        finetune.fill_caches(args, config, tensors, data, dtype, (ranks.rank, ranks.size))
        ranks.barrier("caches full")
        return
    finetune.fill_ahead(args, config, tensors, data, dtype, ranks)
    runtime.connect_devices(ranks, device)
    task = (adapters.TrainAdapters if args.use_lora else FineTune)(args, config, tensors, data, dtype, ranks)
    first = run.begin(task, {**settings, **data.facts(), **task.facts()})
    if ranks.is_main:
        save_model_config(config, run.folder / "model_config.yaml")
    batches = task.batches(first)
    plan = finetune.plan_of(args, batches.steps_per_epoch)
    run.train(batches, plan, finetune.learning_rate(args, plan.total))


if __name__ == "__main__":
    runtime.run(main, communicates=True)
