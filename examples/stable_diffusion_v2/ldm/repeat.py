"""A picture drawn again from what its file says: the options that its facts mean, and whether the rest is the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm import modes
from ldm.config.options import Parser
from ldm.config.yaml_file import search
from ldm.diffusion.samplers import SAMPLERS
from ldm.drawing import WITHOUT
from ldm.errors import UserError
from ldm.files import escaped
from ldm.pictures import read_facts

OPTIONS = {  # option: the fact that it makes
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "prompt_weights": "prompt_weights",
    "support_long_prompts": "long_prompts",
    "seed": "seed",
    "sampling_steps": "sampling_steps",
    "scale": "scale",
    "guidance_rescale": "guidance_rescale",
    "guidance_interval": "guidance_interval",
    "zeros_for_empty_prompt": "zeros_for_empty_prompt",
    "H": "H",
    "W": "W",
    "dtype": "dtype",
    "spacing": "spacing",
    "final_sigma": "final_sigma",
    "ddim_eta": "eta",
    "sampler": "sampler",
    "check_safety": "check_safety",
    "add_watermark": "watermark",
    **{option: option for option in (*modes.FILES, *modes.NUMBERS)},
}
_SAMPLING = ("spacing", "final_sigma", "ddim_eta", "sampler")  # a sampler that is asked for brings its own
_BROUGHT = {  # an option that a picture was drawn without brings these
    "init_image": ("strength",),
    "mask": ("strength",),
    "hires_scale": ("hires_strength",),
}
_SIZES = ("original_size", "crop", "target_size", "aesthetic_score")


def take_facts(args: argparse.Namespace, parser: Parser) -> None:
    """Put what the picture --from_image says in the place of the options that the command leaves as they are.

    `args.repeated` is what is checked by `check_same`: the facts but those that the command's options change.

    Raises:
        UserError: the picture says nothing, or other options say which pictures to draw.
    """
    path = Path(args.from_image)
    for option in ("data_path", "negative_data_path", "resume", "fixed_code"):
        if getattr(args, option):
            raise UserError(f"--from_image and --{option} exclude each other: both say which picture to draw")
    if not path.is_file():
        raise UserError(f"--from_image {escaped(path, 200)} does not exist")
    facts = read_facts(path)
    if not {"prompt", "number", "seed", "sampler", "checkpoint"} <= facts.keys():
        raise UserError(f"{path} does not say how it was made: --from_image takes pictures of text_to_image.py")
    said = {**WITHOUT, **facts}
    typed = _typed(args, parser)
    typed |= {
        brought for option, others in _BROUGHT.items() if option in typed and not said[option] for brought in others
    }
    for option, fact in OPTIONS.items():
        if option not in typed and fact in said:
            setattr(args, option, said[fact])
    named = {option: said[option] for option in modes.FILES if said[option] and option not in typed}
    modes.find_files(args, named, path.parent)
    if args.guidance_interval:
        args.guidance_interval = [float("inf") if end is None else end for end in args.guidance_interval]
    _take_sizes(args, parser, said)
    if not args.ckpt_path and not args.version and (found := search(f"models/{said['checkpoint']}")):
        args.ckpt_path = str(found)
    args.n_iter = args.n_samples = 1
    args.batch_size = args.batch_size or said.get("batch_size", 1)
    args.repeated = {key: value for key, value in said.items() if key not in {OPTIONS[option] for option in typed}}


def _typed(args: argparse.Namespace, parser: Parser) -> set[str]:
    """The options of OPTIONS that the command changes."""
    typed = {option for option in OPTIONS if getattr(args, option) != parser.get_default(option)}
    if "sampler" in typed or any(getattr(args, name) for name in SAMPLERS):
        typed |= {*_SAMPLING}
    if typed & {"prompt", "negative_prompt"}:  # what the file says of brackets is said of its own prompts
        typed |= {"prompt_weights"}
    return typed


def _take_sizes(args: argparse.Namespace, parser: Parser, said: dict) -> None:
    """What SDXL is told, and when its refiner begins."""
    for side, key in (("", "sizes"), ("negative_", "negative_sizes")):
        for option, value in zip(_SIZES, said.get(key) or ()):
            if getattr(args, side + option) == parser.get_default(side + option):
                setattr(args, side + option, value)
    if said.get("refiner"):
        args.refiner_start = said["refiner"][1]


def check_same(args: argparse.Namespace, facts: dict) -> None:
    """UserError where the command draws otherwise than the picture was, but for the options that it names."""
    names_of_files = ("checkpoint", "lora", "refiner", *modes.FILES)  # their sha256 and scales tell
    for key in (*facts, *(key for key in args.repeated if key.endswith("_sha256") and key not in facts)):
        value = facts.get(key)
        then = args.repeated.get(key, value)
        if key in names_of_files:
            then, value = _scales(then), _scales(value)
        if then != value:
            raise UserError(
                f"cannot repeat {args.from_image}: it was drawn with {key} {then!r}, the command has {value!r}; give "
                "the same checkpoint, adapters and pictures"
            )


def _scales(files):
    """Of [[name, scale], ...] or [name, start] the numbers."""
    if isinstance(files, str) or not files:
        return None
    return [_scales(each) if isinstance(each, list) else each for each in files if not isinstance(each, str)]
