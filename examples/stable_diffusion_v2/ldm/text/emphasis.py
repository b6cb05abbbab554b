"""Weights in prompts, in the words of A1111's web UI.

`(word)` weighs 1.1 times as much, `[word]` 1.1 times less, `(word:1.3)` 1.3 times as much; brackets inside brackets
multiply. A backslash before a bracket or a backslash makes it a plain character. A bracket that nothing closes goes on
to the end of the prompt; one that nothing opens is a plain character.
"""

from __future__ import annotations

import re

from ldm.text.tokenizer import Tokenizer

STEP = 1.1  # of one pair of brackets
_PART = re.compile(r"\\[()\[\]\\]|[(\[)\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


def spans(prompt: str) -> list[tuple[str, float]]:
    """The prompt's text in pieces with the weight of each; neighbours have different weights."""
    parts: list[list] = []  # [text, weight]
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for part in parts[opened[bracket].pop() :]:
            part[1] *= factor

    for match in _PART.finditer(prompt):
        text, weight = match.group(), match.group(1)
        if text in opened:
            opened[text].append(len(parts))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif text == ")" and opened["("]:
            close("(", STEP)
        elif text == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            parts.append([text[1:] if len(text) == 2 and text[0] == "\\" else text, 1.0])
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            close(bracket, factor)
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            text = joined.pop()[0] + text
        joined.append((text, weight))
    return joined


def has_weights(prompt: str) -> bool:
    """Whether the prompt means something else than its plain words."""
    return spans(prompt) not in ([(prompt, 1.0)], [])


def weighted_tokens(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[float]]:
    """The token ids of a prompt's text, and the weight of each."""
    read = [(tokenizer.tokens(text), weight) for text, weight in spans(prompt)]
    tokens = [token for found, _ in read for token in found]
    return tokens, [weight for found, weight in read for _ in found]
