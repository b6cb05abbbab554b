"""The strings in which a checkpoint describes itself. Anybody may have written them, so each is checked."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ldm.config.yaml_file import parse_carried
from ldm.errors import UserError
from ldm.files import quoted

Strings = dict[str, str]
LONGEST_SCHEDULE = 10_000  # characters


def scale_factor(path: str | Path, meta: Strings) -> float | None:
    """The latents' scale; None where the file does not say it, UserError where it is no number above 0."""
    said = meta.get("scale_factor")
    if said is None:
        return None
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{path} says scale_factor {quoted(said)}, which is no number above 0: it is damaged")
    return value


def schedule(path: str | Path, meta: Strings) -> dict[str, str | bool | int | float]:
    """The fields of the noise schedule that the file says, by name; numbers are finite.

    UserError where the text is no table of names and values.
    """
    said = meta.get("schedule", "{}")
    try:
        table = json.loads(said) if len(said) <= LONGEST_SCHEDULE else None
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(map(_is_plain, table.values())):
        raise UserError(f"{path} says schedule {quoted(said)}, which is no table of names and values: it is damaged")
    return table


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


def model_section(path: str | Path, meta: Strings) -> dict | None:
    """The section "model" of the config in the file as plain data, unchecked; None where the file holds no config.

    UserError where the text cannot be read or has no such section.
    """
    if "model_config" not in meta:
        return None
    model = parse_carried(meta["model_config"], f"{path}: its model_config").get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path}: its model_config has no section 'model': it is damaged")
    return model


def check(path: str | Path, meta: Strings) -> None:
    """UserError where the latents' scale or the schedule of a file is impossible."""
    scale_factor(path, meta)
    schedule(path, meta)
