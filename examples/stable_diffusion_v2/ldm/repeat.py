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
from ldm.files import escaped, quoted
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
LARGEST_BATCH = 1024  # that a file can ask for; the place of one picture is filled up to it
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
    said = _said(args, path)
    typed = _typed(args, parser)
    typed |= {
        brought for option, others in _BROUGHT.items() if option in typed and not said[option] for brought in others
    }
    for option, fact in OPTIONS.items():
        if option not in typed and fact in said:
            setattr(args, option, _read(args, parser, option, said[fact]))
    named = {option: said[option] for option in modes.FILES if said[option] and option not in typed}
    modes.find_files(args, named, path.parent)
    if args.guidance_interval:
        args.guidance_interval = [float("inf") if end is None else end for end in args.guidance_interval]
    _take_sizes(args, parser, said)
    if not args.ckpt_path and not args.version and (found := search(f"models/{Path(str(said['checkpoint'])).name}")):
        args.ckpt_path = str(found)
    args.n_iter = args.n_samples = 1
    args.batch_size = min(args.batch_size or said["batch_size"], LARGEST_BATCH)
    args.repeated = {key: value for key, value in said.items() if key not in {OPTIONS[option] for option in typed}}


def _said(args: argparse.Namespace, path: Path) -> dict:
    """The facts of a picture, with those that older ones lack; UserError where it has none."""
    if not path.is_file():
        raise UserError(f"--from_image {escaped(path, 200)} does not exist")
    facts = read_facts(path)
    if not {"prompt", "number", "seed", "sampler", "checkpoint"} <= facts.keys():
        raise UserError(
            f"{escaped(path, 200)} does not say how it was made: --from_image takes pictures of text_to_image.py"
        )
    said = {**WITHOUT, "batch_size": 1, **facts}
    for fact, lowest in (("number", 0), ("batch_size", 1)):
        if type(said[fact]) is not int or said[fact] < lowest:
            raise _changed(args, fact, said[fact])
    return said


def _typed(args: argparse.Namespace, parser: Parser) -> set[str]:
    """The options of OPTIONS that the command changes."""
    typed = {option for option in OPTIONS if getattr(args, option) != parser.get_default(option)}
    if "sampler" in typed or any(getattr(args, name) for name in SAMPLERS):
        typed |= {*_SAMPLING}
    if typed & {"prompt", "negative_prompt"}:  # what the file says of brackets is said of its own prompts
        typed |= {"prompt_weights"}
    return typed


def _read(args: argparse.Namespace, parser: Parser, option: str, value: object) -> object:
    """A fact as the option's value; UserError where the option cannot have it."""
    action = parser.options()[option]
    if value is None and action.default is None:
        return None
    kind = bool if isinstance(action.default, bool) else str if action.type is None else None
    try:
        if kind:
            if type(value) is not kind or value not in (action.choices or [value]):
                raise ValueError
            return value
        if action.nargs == 2:
            first, second = value
            return [None if end is None else action.type(str(end)) for end in (first, second)]
        return action.type(str(value))
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise _changed(args, option, value) from None


def _changed(args: argparse.Namespace, fact: str, value: object) -> UserError:
    return UserError(
        f"cannot repeat {escaped(args.from_image, 200)}: it says {fact} {quoted(value)}, so its text was changed; give "
        "the picture as it was drawn"
    )


def _take_sizes(args: argparse.Namespace, parser: Parser, said: dict) -> None:
    """What SDXL is told, and when its refiner begins."""
    for side, key in (("", "sizes"), ("negative_", "negative_sizes")):
        values = said.get(key) or ()
        if not isinstance(values, (list, tuple)):
            raise _changed(args, key, values)
        for option, value in zip(_SIZES, values):
            if getattr(args, side + option) == parser.get_default(side + option):
                setattr(args, side + option, _read(args, parser, side + option, value))
    if refiner := said.get("refiner"):
        if not isinstance(refiner, list) or len(refiner) != 2:
            raise _changed(args, "refiner", refiner)
        args.refiner_start = _read(args, parser, "refiner_start", refiner[1])


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
    if not isinstance(files, list) or not files:
        return None
    return [_scales(each) if isinstance(each, list) else each for each in files if not isinstance(each, str)]
