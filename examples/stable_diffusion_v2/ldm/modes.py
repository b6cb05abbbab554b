"""What a drawing begins with beside prompt and noise: its options checked and made settings, and the facts they leave.

A picture to start from, a mask, a depth map, a second seed, and a larger picture that is drawn from the finished one.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from ldm.config.model import NEEDS, ModelConfig
from ldm.data.inputs import Inputs
from ldm.errors import UserError
from ldm.files import escaped, once_for_each_file, sha256
from ldm.pipeline import Settings, check_config

STRENGTH, LARGER_STRENGTH = 0.8, 0.5  # where the command says none
FILES = tuple(field.name for field in fields(Inputs))  # the options that name a picture file
NUMBERS = ("strength", "variation_seed", "variation_strength", "hires_scale", "hires_strength")
FACTS = (*FILES, *(f"{name}_sha256" for name in FILES), *NUMBERS)
_FOR = {  # an option, and the option that it is said beside
    "mask": "init_image",
    "strength": "init_image",
    "variation_strength": "variation_seed",
    "variation_seed": "variation_strength",
    "hires_strength": "hires_scale",
}
LARGEST_SCALE = 8.0


def with_inputs(settings: Settings, args: argparse.Namespace, config: ModelConfig) -> Settings:
    """The settings with what the drawing begins with, and the size that follows from it.

    Raises:
        UserError: options that do not go together or with the model, or a file that cannot be used.
    """
    _check_together(args, config)
    inputs = Inputs(**{name: getattr(args, name) or None for name in FILES})
    step = config.vae.factor * config.unet.factor
    height, width = inputs.sides(args.H or None, args.W or None, config.image_size, step)
    check_config(config, height, width)
    inputs.check(height, width)
    strength = 1.0
    if inputs.init_image:
        strength = (1.0 if inputs.mask else STRENGTH) if args.strength is None else args.strength
    settings = replace(settings, inputs=inputs, strength=strength, height=height, width=width)
    _require_share("strength", settings)
    if args.variation_seed is None:
        return settings
    if args.variation_seed < 0:
        raise UserError("--variation_seed must be a whole number from 0")
    if not 0 <= args.variation_strength <= 1:
        raise UserError(f"--variation_strength must be between 0 and 1, got {args.variation_strength:g}")
    return replace(settings, variation=(args.variation_seed, args.variation_strength))


def larger(settings: Settings, args: argparse.Namespace, config: ModelConfig) -> Settings | None:
    """The settings of the larger picture, or None; UserError where it cannot be drawn."""
    scale = args.hires_scale
    if scale is None:
        return None
    if not 1 < scale <= LARGEST_SCALE:
        raise UserError(f"--hires_scale must be above 1, and at most {LARGEST_SCALE:g}, got {scale:g}")
    if settings.inputs.mask or config.joined:
        raise UserError("--hires_scale does not go with a mask or a depth map: draw in the size that you want")
    step = config.vae.factor * config.unet.factor
    height, width = (round(side * scale / step) * step for side in (settings.height, settings.width))
    strength = LARGER_STRENGTH if args.hires_strength is None else args.hires_strength
    found = replace(settings, inputs=Inputs(), strength=strength, height=height, width=width, enlarges=scale)
    _require_share("hires_strength", found)
    return found


def _check_together(args: argparse.Namespace, config: ModelConfig) -> None:
    for option, other in _FOR.items():
        if getattr(args, option) not in (None, "") and getattr(args, other) in (None, ""):
            raise UserError(f"--{option} goes with --{other}: give both, or neither")
    if args.depth_map and config.joined != "depth":
        raise UserError("--depth_map is for a depth model, such as --version 2.0-depth: leave it out, or choose that")
    if config.joined == "mask" and not args.mask:
        raise UserError(f"this model {NEEDS['mask']}: give --init_image and --mask")
    if config.joined == "depth" and not args.depth_map:
        raise UserError(f"this model {NEEDS['depth']}: give --depth_map")
    if config.joined == "depth" and args.mask:
        raise UserError("--mask does not go with a depth model: leave it out, or choose another model")


def _require_share(option: str, settings: Settings) -> None:
    if not 0 < settings.strength <= 1:
        raise UserError(f"--{option} must be above 0, and at most 1, got {settings.strength:g}")
    if settings.own_runs < 1:
        raise UserError(
            f"--{option} {settings.strength:g} of {settings.steps} steps is less than one step: raise one of the two"
        )


def facts(settings: Settings) -> dict:
    """What decides a picture here, without what is not there; the names of files, not their paths."""
    given = {name: getattr(settings.inputs, name) for name in FILES if getattr(settings.inputs, name)}
    found = {name: Path(path).name for name, path in given.items()}
    found |= {f"{name}_sha256": _sha256(path) for name, path in given.items()}
    if settings.inputs.init_image:
        found["strength"] = settings.strength
    if settings.variation:
        found["variation_seed"], found["variation_strength"] = settings.variation
    if settings.again:
        found["hires_scale"], found["hires_strength"] = settings.again.enlarges, settings.again.strength
    return found


@once_for_each_file
def _sha256(path: str) -> str:
    try:
        return sha256(path).hex()
    except OSError as error:
        raise UserError(f"cannot read {escaped(path, 200)}: {error.strerror}") from None


def find_files(args: argparse.Namespace, named: dict[str, str], beside: Path) -> None:
    """Set options to picture files that a picture was drawn from, given by name.

    Args:
        named: option -> name. A file is looked for in the working folder, and in the folder `beside`.

    Raises:
        UserError: one of them is not there.
    """
    for option, name in named.items():
        places = [place / Path(name).name for place in (Path(), beside)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(
                f"cannot repeat {args.from_image}: it was drawn from {escaped(name)}, which is neither here nor beside "
                f"it: give the file as --{option}"
            )
        setattr(args, option, str(found))
