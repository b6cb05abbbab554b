"""The pictures and texts that eval_clip_score.py compares, as lists of one length."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from eval.pictures import find_pictures
from ldm.data.images import BadImageError, check_image
from ldm.data.prompts import read_lines
from ldm.errors import UserError
from ldm.pictures import read_facts, read_record

FROM_PNG = "from_png"  # in the place of a prompt: each picture holds its own


def list_inputs(args: argparse.Namespace) -> dict[str, list]:
    """The run's pictures and texts.

    Returns:
        name -> list, all lists of one length: "images", the pictures that are judged, and what the options ask for of
        "prompts", "source_prompts", "sources" and "references".

    Raises:
        UserError: a file cannot be read, a picture lacks a prompt, or the numbers of pictures and texts do not fit.
    """
    images = list_pictures(args.image_path)
    lists: dict[str, list] = {"images": images}
    if args.prompt == FROM_PNG:
        lists["prompts"] = [prompt_in_picture(path) for path in images]
    elif args.prompt is not None and args.prompt.endswith(".jsonl"):
        lists["prompts"] = recorded_prompts(Path(args.prompt), images)
    elif args.prompt is not None:
        lists["prompts"] = matched(read_prompts(args.prompt), len(images), "prompts")
    if args.source_prompt is not None:
        lists["source_prompts"] = matched(read_prompts(args.source_prompt), len(images), "source prompts")
        lists["sources"] = matched(list_pictures(args.source_path), len(images), "source pictures")
    if args.reference_path is not None:
        lists["references"] = matched(list_pictures(args.reference_path), len(images), "reference pictures")
    return lists


def list_pictures(path: str) -> list[Path]:
    """One picture, or a folder's pictures by the numbers in their names; UserError where one is unreadable."""
    found = [Path(path)] if os.path.isfile(path) else find_pictures(path)
    found.sort(key=_by_number)
    bad = []
    for picture in found:
        try:
            check_image(str(picture))
        except BadImageError as error:
            bad.append(str(error))
    if bad:
        raise UserError(f"{len(bad)} of {len(found)} pictures cannot be used, the first: {bad[0]}")
    return found


def _by_number(path: Path) -> list:
    """9.png comes before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def read_prompts(prompt: str) -> list[str]:
    """One text, or the lines of a file that are not blank; UserError where it is unreadable or empty."""
    is_file = os.path.isfile(prompt) or prompt.endswith(".txt")
    lines = [line for line in (read_lines(prompt) if is_file else [prompt.strip()]) if line]
    if not lines:
        raise UserError(f"no prompt in {prompt!r}: give a text, or a file with one prompt per line")
    return lines


def prompt_in_picture(path: Path) -> str:
    """The prompt that text_to_image.py wrote into a picture; UserError where there is none."""
    return _prompt_of(read_facts(path), path)


def recorded_prompts(record: Path, images: list[Path]) -> list[str]:
    """The prompt of each picture: from the record's line with its file name, else from the picture itself.

    Raises:
        UserError: the record cannot be read, two pictures have one name, or one has no prompt in either place.
    """
    lines = read_record(record)
    if len({path.name for path in images}) < len(images):
        raise UserError(f"{record} goes by file names, and some pictures share theirs: measure folder by folder")
    return [_prompt_of(lines.get(path.name) or read_facts(path), path) for path in images]


def _prompt_of(facts: dict, path: Path) -> str:
    if not isinstance(facts.get("prompt"), str):
        raise UserError(f"{path} does not say its prompt: give prompts as a text file, one per line, in their order")
    return facts["prompt"]


def matched(items: list, number: int, what: str) -> list:
    """`number` items, each of `items` repeated equally often; UserError where len(items) does not divide `number`."""
    if number % len(items):
        wrong = f"{number} pictures cannot be matched to {len(items)} {what}"
        raise UserError(f"{wrong}: give as many, or a divisor of that")
    return [item for item in items for _ in range(number // len(items))]
