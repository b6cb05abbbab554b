"""Distil a model into students that draw in a few steps: 16, 8, 4, 2, 1 (progressive distillation, arXiv 2202.00512).

    python train_distillation.py \
        --train_config configs/train/train_config_distill_v2_vpred.yaml \
        --teacher models/sd_v2_768_v-e12e3a9b.ckpt \
        --data_path datasets/pokemon_blip/train \
        --output_path output/few_steps

Every halving ends with a checkpoint student-N, which text_to_image.py draws with as it was distilled. See
docs/distillation.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ldm import runtime
from ldm.config.mindone import IGNORED_TRAIN_OPTIONS
from ldm.config.model import ModelConfig
from ldm.config.options import Parser
from ldm.errors import UserError
from ldm.train import distill, finetune, options, start
from ldm.train.distill import USUAL_STEPS, DistilAdapters, DistilWeights, Halvings
from ldm.train.learning_rate import MULTI_STEP, SCHEDULES
from ldm.train.start import Job

NOT_ASKED = {  # options of train_text_to_image.py that a distillation has no use for
    "unet_initialize_random": False,
    "text_encoder_initialize_random": False,
    "train_text_encoder": False,
    "lora_dropout": 0.0,
    "lora_ft_unet": True,
    "lora_ft_text_encoder": False,
    "timestep_bias_strategy": "none",
    "timestep_bias_multiplier": 1.0,
    "timestep_bias_portion": 0.25,
    "timestep_bias_begin": 0,
    "timestep_bias_end": None,
    "ckpt_max_keep": 0,
    "validation_sampler": None,
    "validation_steps": None,
    "validation_scale": None,
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("teacher and data").add_argument
    options.add_model(add, "--teacher")
    options.add_data(add)
    _add_distillation(parser.add_argument_group("distillation").add_argument)
    add = parser.add_argument_group("training").add_argument
    options.add_training(add)
    options.add_weighting(add)
    options.add_rate(add, [name for name in SCHEDULES if name != MULTI_STEP])
    options.add_adapters(parser.add_argument_group("adapters (LoRA)").add_argument)
    options.add_output(parser.add_argument_group("output").add_argument)
    options.add_system(parser)
    parser.ignore(IGNORED_TRAIN_OPTIONS)
    parser.set_defaults(**NOT_ASKED)
    parser.set_defaults(clip_grad=True, weight_decay=0.0, loss_weighting="truncated_snr")  # the paper's
    parser.set_defaults(scheduler="linear", start_learning_rate=1e-4, end_learning_rate=0.0, warmup_steps=0)
    parser.set_defaults(ckpt_save_interval=500, ckpt_format="safetensors")
    return parser


def _add_distillation(add: Callable) -> None:
    usual = f"a student's own, otherwise {USUAL_STEPS}"
    add("--start_steps", type=int, help=f"the teacher's sampling steps (default: {usual})")
    add(
        "--end_steps",
        type=int,
        default=1,
        help="the last student's sampling steps: start_steps, halved once or more often",
    )
    add(
        "--updates_per_halving",
        type=int,
        nargs="+",
        default=[5000],
        help="training steps of each student: one number for all, or one for each",
    )
    add(
        "--scale",
        type=float,
        nargs="+",
        help="the teacher's guidance scale; two numbers: the range that students are told (default: the model's)",
    )


def check(args: argparse.Namespace, config: ModelConfig) -> Halvings:
    """Find mistakes before the data is read and the networks are built; UserError. Returns what is distilled."""
    finetune.refuse_refiner(config)
    plan = distill.halvings(args, config)
    start.check(args, plan.student(plan.network(config), plan.stages[0]))
    distill.RatePerStage(args, plan)
    if args.use_lora and plan.told and config.unet.time_cond_proj_dim is None:
        raise UserError(
            "use_lora leaves the weights as they are, but students of a range of scales need a layer more: give one "
            "--scale, or leave out --use_lora"
        )
    return plan


def main() -> None:
    args, ranks = start.read(build_parser())
    with ranks.main_first("settings"):
        choice, weights = start.settle(args)
        plan = check(args, choice.config)
        facts = {"halvings": [stage[1:] for stage in plan.stages], "scales": plan.scales}
        job = Job(args, choice, weights, ranks, plan.network(choice.config), facts)
    if not job.open():
        return
    tensors = distill.with_told_scale(args, job.tensors, job.config)
    kind = DistilAdapters if args.use_lora else DistilWeights
    task = kind(args, job.config, tensors, job.data, job.dtype, ranks, plan)
    batches = task.batches(job.begin(task))
    job.run.train(batches, distill.plan_of(args, plan, batches.steps_per_epoch), distill.RatePerStage(args, plan))


if __name__ == "__main__":
    runtime.run(main, communicates=True)
