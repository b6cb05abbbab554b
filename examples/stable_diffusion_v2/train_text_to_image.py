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
from dataclasses import replace

from ldm import runtime
from ldm.checkpoint.diffusers_config import check_model
from ldm.config.mindone import IGNORED_TRAIN_OPTIONS, REFUSED_TRAIN_OPTIONS
from ldm.config.model import ModelConfig, load_model_config, save_model_config, to_dict
from ldm.config.options import Parser, draw_seed, read_options, require_at_least, seed, steps_or_share, str2bool, whole
from ldm.config.versions import VERSIONS, existing, find_checkpoint, version
from ldm.data.batches import Augment, Batches
from ldm.data.captions import caption_warnings
from ldm.data.dataset import ON_BAD_IMAGE
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import build_schedule
from ldm.diffusion.timestep_bias import STRATEGIES
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.errors import UserError
from ldm.parts import PARTS, VAE
from ldm.pipeline import check_config
from ldm.text.tokenizer import Tokenizer
from ldm.train import finetune
from ldm.train.ema import Ema
from ldm.train.finetune import SUFFIXES, FineTune, ckpt_folder, random_parts
from ldm.train.learning_rate import SCHEDULES, LearningRate
from ldm.train.optimizer import OPTIMIZERS, check_numbers
from ldm.train.run import Plan, Run
from ldm.train.step import LossScale, TrainStep
from ldm.weights import Choice, Weights, check_words, choose_config, open_weights, pad_text

log = logging.getLogger("train_text_to_image")
LORA_OPTIONS = ("lora_ft_unet", "lora_ft_text_encoder", "lora_rank", "lora_fp16", "lora_scale")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])

    add = parser.add_argument_group("model and data").add_argument
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
    add("--cache_latents", type=str2bool, default=True, help="encode each picture once, where no change is random")
    add("--cache_text", type=str2bool, default=True, help="encode each caption once, where the encoder is frozen")
    add("--cache_path", help="a folder for both caches, which runs may share (default: cache/ in output_path)")
    add("--cache_only", type=str2bool, default=False, help="fill the caches and stop")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="passes over the data")
    add("--train_steps", type=int, default=0, help="stop after so many steps instead (0: after the epochs)")
    add("--train_batch_size", type=int, default=10, help="of each process")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of that size per step")
    add("--train_text_encoder", type=str2bool, default=False, help="train the text encoder along with the UNet")
    add("--trainable_modules", nargs="*", default=[], help="what to train of the UNet (or all): regular expressions")
    add("--loss_weighting", choices=list(WEIGHTINGS), default="none", help="of the times: min_snr is arXiv 2303.09556")
    add("--snr_gamma", type=float, default=5.0, help="of min_snr")
    add("--timestep_bias_strategy", choices=list(STRATEGIES), default="none", help="which timesteps come more often")
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how many times as often as the others")
    add("--timestep_bias_portion", type=float, default=0.25, help="of all timesteps, with earlier or later")
    add("--timestep_bias_begin", type=int, default=0, help="with range: its first")
    add("--timestep_bias_end", type=int, help="with range: the one after its last (default: after the last of all)")
    add("--optim", choices=list(OPTIMIZERS), default="adamw", help="muon learns faster from random weights")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="decay of the optimizer's averages")
    add("--weight_decay", type=float, default=1e-6, help="not applied to norms and biases")
    add("--scheduler", choices=list(SCHEDULES), default="cosine_decay", help="of the learning rate, after the warm-up")
    add("--start_learning_rate", type=float, default=1e-5, help="after the warm-up")
    add("--end_learning_rate", type=float, default=1e-7, help="after decay_steps")
    add("--warmup_steps", type=steps_or_share, default=1000, help="in which the rate rises; below 1 a share of all")
    add("--decay_steps", type=int, default=0, help="in which it falls (0: to the last step)")
    add("--milestones", type=int, nargs="*", default=[], help="of multi_step_decay: steps after the warm-up")
    add("--decay_rate", type=float, default=0.9, help="of multi_step_decay: what the rate is multiplied by there")
    add("--clip_grad", type=str2bool, default=False, help="scale larger gradients down to max_grad_norm")
    add("--max_grad_norm", type=float, default=1.0, help="with clip_grad")
    add("--use_ema", type=str2bool, default=False, help="save and validate with the weights' moving average")
    add("--ema_decay", type=float, default=0.9999, help="of the moving average")
    add("--init_loss_scale", type=float, default=65536, help="with float16")
    add("--scale_window", type=whole, default=1000, help="with float16: good steps before the loss scale is doubled")
    add("--seed", type=seed, default=3407, help="of order, noise, times, dropout and random weights")

    add = parser.add_argument_group("output").add_argument
    add("--step_mode", type=str2bool, default=False, help="count ckpt_save_interval in steps instead of epochs")
    add("--ckpt_save_interval", type=int, default=1, help="epochs (or steps) from one checkpoint to the next")
    add("--ckpt_max_keep", type=int, default=10, help="the last so many checkpoints are kept (0: all)")
    add("--ckpt_format", choices=list(SUFFIXES), default="mindspore", help="of the checkpoints")
    add("--ckpt_dtype", choices=("float32", "float16"), default="float32", help="of the checkpoints' numbers")
    add("--resume", nargs="?", const="True", default="False", help="True, or the path of a resume state")
    add("--validation_prompts", nargs="*", default=[], help="prompts drawn while training")
    add("--validation_interval", type=int, default=500, help="steps between validation pictures (0: at the end only)")
    add("--validation_sampler", choices=list(SAMPLERS), help="as --sampler when drawing (default: the model's)")
    add("--validation_steps", type=int, help="sampling steps (default: the model's)")
    add("--validation_scale", type=float, help="guidance scale (default: the model's)")

    add = parser.add_argument_group("system").add_argument
    add("--device_target", choices=runtime.DEVICES, help="default: Ascend where there is one, else CPU")
    add("--mode", type=int, choices=(0, 1), default=0, help="0: graph, 1: PyNative")
    add("--dtype", choices=list(runtime.DTYPES), help="default: float16 on Ascend, float32 on a CPU")
    add("--use_parallel", type=str2bool, default=False, help="with scripts/run_train_distributed.sh: one of several")
    add("--use_lora", type=str2bool, default=False, help=argparse.SUPPRESS)
    parser.ignore({**IGNORED_TRAIN_OPTIONS, **dict.fromkeys(LORA_OPTIONS, "it belongs to use_lora")})
    parser.refuse(REFUSED_TRAIN_OPTIONS)
    return parser


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Whatever can be known to be wrong before the data is read and the networks are built."""
    if args.use_lora:
        raise UserError("use_lora is not available yet; set it to False")
    require_at_least(1, args, "train_batch_size", "gradient_accumulation_steps", "epochs", "ckpt_save_interval")
    require_at_least(0, args, "train_steps", "ckpt_max_keep", "validation_interval")
    check_config(config, args.image_size)
    schedule = build_schedule(config.schedule)
    validation = finetune.validation_settings(args, config)
    validation.sampler.times(schedule, validation.steps)
    finetune.timestep_bias(args, config)
    weight = finetune.timestep_weight(args, config)
    learning_rate(args, args.train_steps or 1)
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
    """The model that the command means, and its file, open; fills in the options that these decide."""
    if args.version and not args.pretrained_model_path:
        random = args.unet_initialize_random or not args.model_config
        wanted = None if random else load_model_config(args.model_config).prediction_type
        args.pretrained_model_path = find_checkpoint(args.version, args.download, wanted)
    if not args.pretrained_model_path:
        raise UserError(
            "no pretrained_model_path: give a checkpoint or a --version; random networks still need its VAE"
        )
    weights = open_weights(existing(args.pretrained_model_path), raw=True)
    if args.unet_initialize_random and args.model_config:  # whatever the file's own UNet is
        config = load_model_config(args.model_config)
        choice = Choice(pad_text(config, args.pretrained_model_path, weights), "the config")
    else:
        choice = choose_config(weights, args.model_config, args.version)
    args.image_size = args.image_size or choice.config.image_size
    replaced = (*random_parts(args), *([VAE] if args.vae_path else []))
    wanted = tuple(part for part in PARTS if part not in replaced)
    check_words(weights.path, weights.checkpoint, choice.config, choice.origin, wanted)
    return choice, weights


def main() -> None:
    args = read_options(build_parser())
    ranks = runtime.join(args.use_parallel)
    draw_seed(args, ranks)
    with ranks.main_first("settings"):
        choice, weights = settle(args)
        check(args, choice.config)
        config = replace(choice.config, image_size=args.image_size)  # what it is trained for
        run = Run(args, ckpt_folder(args), ranks)
        dtype = runtime.compute_dtype(args.dtype, args.device_target)
        settings = finetune.run_settings(args, config, dtype, ranks)
        if not args.cache_only:
            run.claim(settings)
    ranks.check_shared(run.state_folder)
    runtime.connect_devices(ranks, runtime.start(args.device_target, args.mode, ranks))
    tensors = finetune.start_tensors(args, config, weights)
    finetune.trained_unet(args, tensors)  # before the caches are filled
    data = finetune.open_data(args)
    log.info(data.summary())
    if ranks.is_main:
        finetune.require_finite_weights(args, tensors)
        for line in caption_warnings(data.samples, Tokenizer(config.text.vocab_size, config.text.context_length)):
            log.warning(line)
    if args.cache_only:
        finetune.fill_caches(args, config, dtype, (ranks.rank, ranks.size))
        ranks.barrier("caches full")
        return
    task = FineTune(args, config, tensors, data, dtype, ranks)
    first = run.begin(task, {**settings, **data.facts(), **task.facts()})
    if ranks.is_main:
        save_model_config(config, run.folder / "model_config.yaml")
    augment, start = (
        Augment(args.random_crop, args.flip, args.caption_dropout),
        first * args.gradient_accumulation_steps,
    )
    share = ranks.rank, ranks.size, task.needs_pictures
    batches = Batches(data, args.train_batch_size, args.seed, augment, start, *share)
    plan = plan_of(args, batches.steps_per_epoch)
    run.train(batches, plan, learning_rate(args, plan.total))


def plan_of(args: argparse.Namespace, batches_per_epoch: int) -> Plan:
    """How long the run is, and when it saves and validates."""
    micro = args.gradient_accumulation_steps
    epoch = max(1, batches_per_epoch // micro)
    return Plan(
        total=args.train_steps or args.epochs * epoch,
        epoch=epoch,
        save_every=args.ckpt_save_interval * (1 if args.step_mode else epoch),
        micro_batches=micro,
        validate_every=args.validation_interval if args.validation_prompts else None,
        by_steps=args.step_mode,
    )


def learning_rate(args: argparse.Namespace, total: int) -> LearningRate:
    ends = args.start_learning_rate, args.end_learning_rate
    steps = args.warmup_steps, args.decay_steps, total
    return LearningRate(args.scheduler, *ends, *steps, tuple(args.milestones), args.decay_rate)


if __name__ == "__main__":
    runtime.run(main, communicates=True)
