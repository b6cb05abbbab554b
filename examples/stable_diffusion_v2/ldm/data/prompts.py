"""Prompt files: one prompt per line, and beside it a file with a negative prompt for each line.

A line may end in settings of its own: `a red fox | seed=3 steps=30`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from ldm.data.utf8 import read_text
from ldm.errors import UserError
from ldm.files import escaped


def read_lines(path: str | Path) -> list[str]:
    """The lines of a prompt file, blank lines too, without the white space around them.

    A line ends at line feed, carriage return or both. Other separators belong to the prompt.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has blank lines alone.
    """
    text = read_text(path, "prompt file").replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if not any(lines):
        raise UserError(f"the prompt file {escaped(path, 200)} is empty: write one prompt per line")
    return lines


def paired(lines: list[str], negatives: list[str]) -> list[tuple[str, str]]:
    """(prompt, negative prompt) of every prompt: line n of the negative prompts belongs to line n of the prompts.

    A blank line is no prompt, or no negative prompt. A single empty line alone is the empty prompt.

    Raises:
        UserError: the numbers of lines differ, or a negative prompt stands beside a blank line.
    """
    if len(lines) != len(negatives):
        raise UserError(
            f"{len(negatives)} lines of negative prompts for {len(lines)} lines of prompts, blank lines counted: "
            "give one line for each, or one negative prompt for all by --negative_prompt"
        )
    if lines == [""]:
        return [("", negatives[0])]
    for number, (line, negative) in enumerate(zip(lines, negatives), 1):
        if negative and not line:
            raise UserError(f"line {number} has a negative prompt but no prompt: write the prompt, or blank both lines")
    return [(line, negative) for line, negative in zip(lines, negatives) if line]


def _whole(lowest: int):
    def read(text: str) -> int:
        number = int(text)
        if number < lowest:
            raise ValueError
        return number

    return read


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


LINE_SETTINGS = {  # of a line, and how its text is read
    "seed": _whole(0),
    "scale": _finite,
    "steps": _whole(1),
    "W": _whole(1),
    "H": _whole(1),
    "n": _whole(1),
    "init_image": str,
    "mask": str,
    "depth_map": str,
    "strength": _finite,
    "variation_seed": _whole(0),
    "variation_strength": _finite,
    "hires_scale": _finite,
    "hires_strength": _finite,
}


def has_near_settings(prompt: str) -> bool:
    """Whether a prompt has words that look as if they were meant for settings."""
    keys = "|".join(key for key in LINE_SETTINGS if len(key) > 1)
    return bool(re.search(rf"\|[^|]*\b\w+\s*=|\b(?:{keys})\s*=", prompt))


def own_settings(line: str) -> tuple[str, tuple[tuple[str, float | str], ...]]:
    """The prompt of a line, and its own settings: the words key=value behind the last " | ".

    Words of which none is a setting belong to the prompt.

    Raises:
        UserError: settings beside other words, a value that is none, or a setting that is said twice.
    """
    prompt, bar, tail = f" {line}".rpartition(" | ")
    pairs = [re.fullmatch(r"(\w+)=(\S*)", word) for word in tail.split()]
    if not bar or not any(pair and pair[1] in LINE_SETTINGS for pair in pairs):
        return line, ()
    said: dict[str, float | str] = {}
    for word, pair in zip(tail.split(), pairs):
        try:
            if not pair or not pair[2] or pair[1] in said:
                raise KeyError
            said[pair[1]] = LINE_SETTINGS[pair[1]](pair[2])
        except (KeyError, ValueError):
            usage = ", ".join(f"{key}=" for key in LINE_SETTINGS)
            raise UserError(
                f"the prompt file says {escaped(word)} behind ' | ': settings are {usage}, each once, with a number "
                "or a file's name without blanks"
            ) from None
    return prompt.strip(), tuple(sorted(said.items()))
