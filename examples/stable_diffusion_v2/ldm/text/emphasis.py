"""Weights in prompts, in the words of A1111's web UI.

`(word)` weighs 1.1 times as much, `[word]` 1.1 times less, `(word:1.3)` 1.3 times as much; brackets inside brackets
multiply. A backslash before a bracket or a backslash makes it a plain character. A bracket that nothing closes goes on
to the end of the prompt; one that nothing opens is a plain character.
"""

from __future__ import annotations

import re
from itertools import groupby

import numpy as np

from ldm.errors import UserError
from ldm.files import escaped
from ldm.text.tokenizer import Tokenizer

STEP = 1.1  # of one pair of brackets
LARGEST = 1_000_000  # weight; far larger ones would overflow
_PART = re.compile(r"\\[()\[\]\\]|[(\[)\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


def spans(prompt: str) -> list[tuple[str, float]]:
    """The prompt's text in pieces with the weight of each; neighbours have different weights."""
    texts: list[str] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    closed: list[tuple[int, int, float]] = []  # from one text to another, and the factor of what is between

    def close(bracket: str, factor: float) -> None:
        closed.append((opened[bracket].pop(), len(texts), factor))

    for match in _PART.finditer(prompt):
        text, weight = match.group(), match.group(1)
        if text in opened:
            opened[text].append(len(texts))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif text == ")" and opened["("]:
            close("(", STEP)
        elif text == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            texts.append(text[1:] if len(text) == 2 and text[0] == "\\" else text)
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            close(bracket, factor)
    weights = _products(len(texts), closed)
    parts = groupby(zip(texts, weights.tolist()), key=lambda part: part[1])
    return [("".join(text for text, _ in alike), weight) for weight, alike in parts]


def _products(count: int, closed: list[tuple[int, int, float]]) -> np.ndarray:
    """The product of all factors that each text is inside of, [count]."""
    weights = np.ones(count)
    with np.errstate(over="ignore", invalid="ignore"):
        for start, end, factor in closed:
            weights[start:end] *= factor
    return np.nan_to_num(weights, nan=np.inf)


def check_weights(prompt: str) -> None:
    """UserError where a weight is above LARGEST."""
    if any(abs(weight) > LARGEST for _, weight in spans(prompt)):
        raise UserError(
            f"the prompt {escaped(prompt)} has weights above {LARGEST:,}: lower them, or use fewer brackets"
        )


def has_weights(prompt: str) -> bool:
    """Whether the prompt means something else than its plain words."""
    return spans(prompt) not in ([(prompt, 1.0)], [])


def weighted_tokens(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[float]]:
    """The token ids of a prompt's text, and the weight of each."""
    read = [(tokenizer.tokens(text), weight) for text, weight in spans(prompt)]
    tokens = [token for found, _ in read for token in found]
    return tokens, [weight for found, weight in read for _ in found]
