"""The options of text_to_image.py that say how it draws, in groups."""

from __future__ import annotations

from collections.abc import Callable

from ldm.conditioning import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE
from ldm.config.model import SamplingConfig
from ldm.config.options import seed, str2bool
from ldm.diffusion.samplers import FINAL_SIGMAS, SAMPLERS
from ldm.diffusion.spacing import SPACINGS
from ldm.modes import LARGER_STRENGTH, STRENGTH
from ldm.pictures import FORMATS


def add_ways_to_draw(add: Callable) -> None:
    add("--sampler", choices=list(SAMPLERS), help="default: the model's")
    for name, sampler in SAMPLERS.items():
        add(sampler.flag, action="store_true", help=f"the same as --sampler {name}")
    usual = f"the model's, {SamplingConfig.steps}"
    add("--sampling_steps", type=int, help=f"steps of the sampler for a picture (default: {usual})")
    add(
        "--spacing",
        choices=list(SPACINGS),
        help="spacing of the sampler's times (default: the model's, or the sampler's)",
    )
    add(
        "--final_sigma",
        choices=list(FINAL_SIGMAS),
        help="noise that stays at the end (default: the model's, or the sampler's)",
    )
    add("--ddim_eta", type=float, help="fresh noise per step, 0 to 1 (default: the sampler's own)")
    add("--scale", type=float, help="guidance scale; 1 is none (default: the model's)")
    add("--guidance_rescale", type=float, help="0 to 1, against too much contrast by guidance (default: the model's)")
    levels = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--guidance_interval", **levels, help="noise levels sigma / alpha where guidance works, such as 0.28 5.42")
    add("--n_iter", type=int, default=2, help="batches per prompt")
    add("--n_samples", type=int, default=4, help="pictures per batch and prompt")
    add(
        "--batch_size", type=int, help="pictures drawn at once, across prompts too; changes the speed, not the pictures"
    )
    add("--H", type=int, help="height in pixels (default: the model's image_size, in the proportions of init_image)")
    add("--W", type=int, help="width in pixels")
    add("--seed", type=seed, default=42, help="decides the noise: picture k depends on the seed and k alone")
    add("--fixed_code", action="store_true", help="the same starting noises for every batch of n_samples")


def add_beginning(add: Callable) -> None:
    """Add what a drawing begins with beside prompt and noise; see `ldm.modes`."""
    add("--init_image", help="a picture to start from")
    add(
        "--strength",
        type=float,
        help=f"share of the steps that change it, up to 1 (default: {STRENGTH}; with --mask 1)",
    )
    add("--mask", help="a picture of init_image's size, white where it is painted anew")
    add("--depth_map", help="for a depth model: a picture, bright where things are near")
    add("--variation_seed", type=seed, help="the seed of the noise that variation_strength goes to")
    add("--variation_strength", type=float, help="0 is the noise of --seed, 1 that of --variation_seed")
    add("--hires_scale", type=float, help="draw the finished picture again, larger by this factor")
    add("--hires_strength", type=float, help=f"share of the steps for the larger picture (default: {LARGER_STRENGTH})")


def add_sdxl(add: Callable) -> None:
    """Add what this model is told of the picture's size, and its refiner."""
    hw, place = {"type": int, "nargs": 2, "metavar": ("H", "W")}, {"type": int, "nargs": 2, "metavar": ("TOP", "LEFT")}
    add(
        "--original_size",
        **hw,
        help="size of the file that the picture would be from (default: the size that is drawn)",
    )
    add("--crop", **place, help="where the picture would be cut out of it (default: 0 0)")
    add("--target_size", **hw, help="size of the picture (default: the size that is drawn)")
    for name, options in (("original_size", hw), ("crop", place), ("target_size", hw)):
        add(f"--negative_{name}", **options, help="the same for the negative prompt (default: as for the prompt)")
    usual = "default: the model's"
    add("--zeros_for_empty_prompt", type=str2bool, help=f"zeros in the place of an empty negative prompt ({usual})")
    add("--refiner", help="the checkpoint of SDXL's refiner, which draws the last steps")
    add("--refiner_start", type=float, default=0.8, help="share of the time that is drawn before the refiner")
    add("--aesthetic_score", type=float, default=AESTHETIC_SCORE, help="the score that the refiner is told, 0 to 10")
    add(
        "--negative_aesthetic_score",
        type=float,
        default=NEGATIVE_AESTHETIC_SCORE,
        help="the score for the negative prompt",
    )


def add_output(add: Callable) -> None:
    add("--resume", action="store_true", help="number from 0 and keep the pictures that this command has drawn before")
    add("--skip_grid", action="store_true", help="no grid picture")
    add("--skip_save", action="store_true", help="no single pictures")
    add("--check_safety", action="store_true", help="make pictures black that may not be safe for work")
    add("--add_watermark", action="store_true", help="put Stability's invisible mark into each picture")
    add("--image_format", choices=list(FORMATS), default="png", help="format of the single pictures")
    add("--preview_interval", type=int, help="show what is drawn, in the folder previews/, every so many steps")
    add("--n_rows", type=int, default=0, help="rows of the grid (default: one per prompt and iteration)")
