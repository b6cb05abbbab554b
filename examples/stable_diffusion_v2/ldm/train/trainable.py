"""Which of a network's parameters are trained, by patterns over their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ldm.errors import UserError


def trainable(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that contain a match of one of the regular expressions, in their order; all without expressions.

    Raises:
        UserError: a pattern is not a regular expression, or is found in no name.
    """
    names, found = list(names), set()
    for pattern in patterns:
        try:
            matching = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"trainable_modules: '{pattern}' is not a regular expression: {error}") from None
        if not matching:
            example = f", which are such as {names[len(names) // 2]}" if names else ""
            raise UserError(f"trainable_modules: '{pattern}' is in none of the {len(names)} names{example}")
        found |= matching
    return [name for name in names if name in found] if patterns else names
