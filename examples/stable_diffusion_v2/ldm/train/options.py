"""Options that the training scripts of whole models share, in groups; `add` is a group's add_argument."""

from __future__ import annotations

from collections.abc import Callable

from ldm import runtime
from ldm.config.mindone import optimizer
from ldm.config.model import add_set
from ldm.config.options import Parser, seed, steps_or_share, str2bool, whole
from ldm.config.versions import VERSIONS, version
from ldm.data.dataset import ON_BAD_IMAGE
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.networks.adapter import PRESETS
from ldm.train.adapters import SUFFIXES as ADAPTER_SUFFIXES
from ldm.train.finetune import SUFFIXES
from ldm.train.learning_rate import SCHEDULES
from ldm.train.optimizer import OPTIMIZERS


def add_model(add: Callable, *names: str) -> None:
    """Add what chooses the model to start from; `names`: further names of --pretrained_model_path."""
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
    path = {"dest": "pretrained_model_path", "default": ""}
    add(*names, "--pretrained_model_path", **path, help="the checkpoint to start from (default: the version's)")
    add("--vae_path", help="an autoencoder's own file or folder, in the place of the checkpoint's")


def add_data(add: Callable) -> None:
    add("--data_path", default="dataset", help="a folder with pictures and img_txt.csv (columns dir,text)")
    add("--image_size", type=int, help="side in pixels (default: the model config's)")
    add("--image_filter_size", type=int, default=0, help="leave out pictures with a shorter side")
    add("--random_crop", type=str2bool, default=False, help="crop at a random place instead of the middle")
    add("--flip", type=str2bool, default=False, help="mirror half of the pictures")
    add("--caption_dropout", type=float, default=0.0, help="share of captions emptied, for guidance")
    add("--text_chunks", type=int, default=1, help="pieces of 75 tokens that a caption is seen in")
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="error", help="what to do about an unreadable picture")
    add("--cache_latents", type=str2bool, default=True, help="encode each picture once (not with a random crop)")
    add("--cache_text", type=str2bool, default=True, help="encode each caption once (not with a trained text encoder)")
    add("--cache_path", help="a folder for both caches, which runs may share (default: cache/ in output_path)")
    add("--cache_only", type=str2bool, default=False, help="fill the caches and stop")


def add_training(add: Callable) -> None:
    add("--train_batch_size", type=int, default=10, help="pictures per step of each process")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of that size per step")
    add(
        "--trainable_modules",
        nargs="*",
        default=[],
        help="regular expressions: the parameters of the UNet that are trained (default: all)",
    )
    add("--optim", type=optimizer, choices=list(OPTIMIZERS), default="adamw", help="muon: faster from random weights")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="decay of the optimizer's averages")
    add("--weight_decay", type=float, default=1e-6, help="not applied to norms and biases")
    add("--clip_grad", type=str2bool, default=False, help="scale larger gradients down to max_grad_norm")
    add("--max_grad_norm", type=float, default=1.0, help="with clip_grad")
    add("--use_ema", type=str2bool, default=False, help="save and validate with the weights' moving average")
    add("--ema_decay", type=float, default=0.9999, help="decay of the moving average")
    add("--init_loss_scale", type=float, default=65536, help="loss scale at the start, with float16")
    add("--scale_window", type=whole, default=1000, help="good steps before the loss scale is doubled, with float16")
    add("--seed", type=seed, default=3407, help="decides order, noise, times, dropout and random weights")


def add_rate(add: Callable, schedules: list[str] | None = None) -> None:
    """Add the learning rate; `schedules`: those to choose from."""
    choices = schedules or list(SCHEDULES)
    add("--scheduler", choices=choices, default="cosine_decay", help="how the learning rate goes on after the warm-up")
    add("--start_learning_rate", type=float, default=1e-5, help="learning rate after the warm-up")
    add("--end_learning_rate", type=float, default=1e-7, help="learning rate after decay_steps")
    add(
        "--warmup_steps",
        type=steps_or_share,
        default=1000,
        help="steps in which the rate rises; a number below 1 is a share of all steps",
    )


def add_weighting(add: Callable) -> None:
    weightings = (
        "weights of the times: min_snr is arXiv 2303.09556, truncated_snr and snr_plus_one are arXiv 2202.00512"
    )
    add("--loss_weighting", choices=list(WEIGHTINGS), default="none", help=weightings)
    add("--snr_gamma", type=float, default=5.0, help="the largest SNR that counts, with min_snr")


def add_adapters(add: Callable) -> None:
    add("--use_lora", type=str2bool, default=False, help="train low-rank adapters instead of the weights")
    add("--lora_rank", type=int, default=4, help="rank of the adapters")
    add("--lora_alpha", type=float, help="the adapters' scale is alpha / rank (default: the rank)")
    add("--lora_scale", type=float, default=1.0, help="the scale itself, in place of lora_alpha")
    add("--lora_targets", nargs="+", default=["attention"], help=f"{', '.join(PRESETS)}, or regular expressions")
    add("--lora_ckpt_path", help="adapters to start from, in any form")
    add("--lora_format", choices=list(ADAPTER_SUFFIXES), default="mindone", help="form of the files")


def add_output(add: Callable) -> None:
    add("--output_path", default="output", help="checkpoints, log, configs and validation pictures go there")
    add(
        "--ckpt_save_interval", type=int, default=1, help="epochs from one checkpoint to the next; steps with step_mode"
    )
    add("--ckpt_format", choices=list(SUFFIXES), default="mindspore", help="format of the checkpoints")
    add("--ckpt_dtype", choices=("float32", "float16"), default="float32", help="type of the checkpoints' numbers")
    add("--resume", nargs="?", const="True", default="False", help="True, or the path of a resume state")
    add("--validation_prompts", nargs="*", default=[], help="prompts drawn while training")
    add("--validation_interval", type=int, default=500, help="steps between validation pictures (0: at the end only)")


def add_system(parser: Parser) -> None:
    add = parser.add_argument_group("system").add_argument
    runtime.add_device_options(add)
    add("--dtype", choices=list(runtime.DTYPES), help="default: float16 on Ascend, float32 on a CPU")
    add("--use_parallel", type=str2bool, default=False, help="this process is one of several; the launcher sets it")
