"""Prompt files: one prompt per line, and beside it a file with a negative prompt for each line."""

from __future__ import annotations

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
