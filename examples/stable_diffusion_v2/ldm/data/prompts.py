"""Prompt files: one prompt per line, and negative prompts that go with them."""

from __future__ import annotations

from pathlib import Path

from ldm.data.utf8 import read_text
from ldm.errors import UserError
from ldm.files import escaped


def read_lines(path: str | Path) -> list[str]:
    """The lines of a prompt file, blank ones too, without the white space around them; UserError where all are blank.

    Lines end as editors end them, at line feed, carriage return or both. Other separators belong to the prompt.
    """
    text = read_text(path, "prompt file").replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if not any(lines):
        raise UserError(f"the prompt file {escaped(path, 200)} is empty: write one prompt per line")
    return lines


def paired(lines: list[str], negatives: list[str]) -> list[tuple[str, str]]:
    """(prompt, negative prompt) of every prompt, from the lines of two files.

    Two files with as many lines go line by line, and a blank line is no prompt, or no negative prompt. Where the
    numbers differ, or a negative prompt would stand beside no prompt, blank lines do not count, and a single negative
    prompt is for all.

    Raises:
        UserError: there are neither as many negative prompts as prompts nor one.
    """
    prompts = [line for line in lines if line] or lines[:1]
    given = [line for line in negatives if line]
    by_line = [(prompt, negative) for prompt, negative in zip(lines, negatives) if prompt]
    if len(lines) == len(negatives) and sum(negative != "" for _, negative in by_line) == len(given):
        return by_line
    if len(given) == 1:
        given *= len(prompts)
    if len(given) != len(prompts):
        raise UserError(f"{len(given)} negative prompts for {len(prompts)} prompts: give one for each, or one")
    return list(zip(prompts, given))
