"""Fine-tune Stable Diffusion, or train its UNet from random weights, on captioned pictures: v-prediction, eps or x0.

    python train_text_to_image.py \
        --train_config configs/train/train_config_vanilla_v2_vpred.yaml \
        --data_path datasets/pokemon_blip/train \
        --output_path output/vpred_vanilla_finetune_pokemon/txt2img \
        --pretrained_model_path models/sd_v2_768_v-e12e3a9b.ckpt
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ldm import runtime
from ldm.config.mindone import IGNORED_TRAIN_OPTIONS, REFUSED_TRAIN_OPTIONS
from ldm.config.model import ModelConfig
from ldm.config.options import Parser, require_at_least, str2bool
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timestep_bias import STRATEGIES
from ldm.errors import UserError
from ldm.train import finetune, options, start
from ldm.train.adapters import TrainAdapters
from ldm.train.finetune import FineTune
from ldm.train.start import Job


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("model and data").add_argument
    options.add_model(add)
    add("--unet_initialize_random", type=str2bool, default=False, help="random weights for the UNet")
    add("--text_encoder_initialize_random", type=str2bool, default=False, help="random weights for the text encoder")
    options.add_data(add)
    _add_training(parser.add_argument_group("training").add_argument)
    _add_times_and_rate(parser.add_argument_group("times and learning rate").add_argument)
    add = parser.add_argument_group("adapters (LoRA)").add_argument
    options.add_adapters(add)
    add("--lora_dropout", type=float, default=0.0, help="share of the adapters' input features that a step leaves out")
    add("--lora_ft_unet", type=str2bool, default=True, help="adapters in the UNet")
    add("--lora_ft_text_encoder", type=str2bool, default=False, help="adapters in the text encoder")
    _add_output(parser.add_argument_group("output").add_argument)
    options.add_system(parser)
    parser.ignore(IGNORED_TRAIN_OPTIONS)
    parser.refuse(REFUSED_TRAIN_OPTIONS)
    return parser


def _add_training(add: Callable) -> None:
    add("--epochs", type=int, default=10, help="passes over the data")
    add("--train_steps", type=int, default=0, help="stop after so many steps instead (0: after the epochs)")
    add("--train_text_encoder", type=str2bool, default=False, help="train the text encoder along with the UNet")
    options.add_training(add)


def _add_times_and_rate(add: Callable) -> None:
    options.add_weighting(add)
    add("--timestep_bias_strategy", choices=list(STRATEGIES), default="none", help="which timesteps come more often")
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how many times as often as the others")
    add("--timestep_bias_portion", type=float, default=0.25, help="share of all timesteps that earlier or later means")
    add("--timestep_bias_begin", type=int, default=0, help="first timestep of range")
    add("--timestep_bias_end", type=int, help="range ends before this timestep (default: after the last one)")
    options.add_rate(add)
    add("--decay_steps", type=int, default=0, help="steps in which the rate falls (0: to the last step)")
    add(
        "--milestones",
        type=int,
        nargs="*",
        default=[],
        help="with multi_step_decay: steps after the warm-up where the rate falls",
    )
    add("--decay_rate", type=float, default=0.9, help="with multi_step_decay: what the rate is multiplied by there")


def _add_output(add: Callable) -> None:
    options.add_output(add)
    add("--step_mode", type=str2bool, default=False, help="count ckpt_save_interval in steps instead of epochs")
    add("--ckpt_max_keep", type=int, default=10, help="how many of the last checkpoints stay (0: all)")
    add(
        "--validation_epochs",
        type=int,
        default=0,
        help="epochs between validation pictures, instead of steps (0: by steps)",
    )
    add("--validation_sampler", choices=list(SAMPLERS), help="sampler of validation pictures (default: the model's)")
    add("--validation_steps", type=int, help="sampling steps of validation pictures (default: the model's)")
    add("--validation_scale", type=float, help="guidance scale of validation pictures (default: the model's)")


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Find mistakes before the data is read and the networks are built; UserError."""
    require_at_least(1, args, "epochs")
    require_at_least(0, args, "train_steps", "ckpt_max_keep", "validation_epochs")
    finetune.require_trainable(config)
    start.check(args, config)
    finetune.timestep_bias(args, config)
    finetune.learning_rate(args, args.train_steps or 1)
    if args.trainable_modules and args.unet_initialize_random:
        raise UserError("trainable_modules leaves the other weights as they are; not with unet_initialize_random")


def main() -> None:
    args, ranks = start.read(build_parser())
    with ranks.main_first("settings"):
        choice, weights = start.settle(args)
        check(args, choice.config)
        job = Job(args, choice, weights, ranks)
    if not job.open():
        return
    kind = TrainAdapters if args.use_lora else FineTune
    task = kind(args, job.config, job.tensors, job.data, job.dtype, ranks)
    batches = task.batches(job.begin(task))
    plan = finetune.plan_of(args, batches.steps_per_epoch)
    job.run.train(batches, plan, finetune.learning_rate(args, plan.total))


if __name__ == "__main__":
    runtime.run(main, communicates=True)
