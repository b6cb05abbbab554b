"""What PEFT says of an adapter's ranks and scales: adapter_config.json, and lora_adapter_metadata in diffusers' files.

Written are the keys of PEFT 0.6.2 alone, because versions before 0.14 raise an error at any other.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NamedTuple

from ldm.checkpoint.arrays import FileError
from ldm.checkpoint.lora.adapter import Pair
from ldm.files import escaped, quoted

METADATA = "lora_adapter_metadata"  # among the strings of diffusers' files
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda")  # values of init_lora_weights
_FIXED = {"peft_type": ("LORA",), "use_dora": (False,), "bias": ("none",), "modules_to_save": ([],)}
_PLAIN = re.compile(r"\^?([\w.]|\\\.)+\$?")  # a module's name, and no other regular expression


class Scales(NamedTuple):
    """The alphas of one part: of all modules but those in `patterns`, which are there by the ends of their names."""

    alpha: float
    patterns: dict[str, float]
    by_root: bool  # alpha is divided by the square root of the rank ("rslora")

    def alpha_of(self, module: str, rank: int) -> float:
        """In the meaning that it has here, where it is divided by the rank."""
        ends = [end for end in self.patterns if f".{module}".endswith(f".{end}")]
        alpha = self.patterns[ends[0]] if ends else self.alpha
        return alpha * math.sqrt(rank) if self.by_root else alpha


def read(config: dict[str, Any], where: str) -> Scales:
    """The scales in one part's config; `where` begins a complaint.

    Raises:
        FileError: it is of another kind than a plain LoRA, or says what cannot be.
    """
    for key, allowed in _FIXED.items():
        said = config.get(key)
        if said is not None and said not in allowed:
            raise FileError(f"{where} says {key} {quoted(said)}, which is not read here: only plain LoRAs are")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise FileError(f"{where} says init_lora_weights {quoted(start)}: such a LoRA fits a changed base alone")
    alpha = config.get("lora_alpha", config.get("r"))
    by_root, patterns = config.get("use_rslora", False), config.get("alpha_pattern") or {}
    known = isinstance(patterns, dict) and all(map(_is_number, patterns.values()))
    if not _is_number(alpha) or not isinstance(by_root, (bool, type(None))) or not known:
        raise FileError(f"{where} is damaged: lora_alpha or alpha_pattern is no number, or use_rslora no truth value")
    strange = [end for end in patterns if not _PLAIN.fullmatch(end)]
    if strange:
        raise FileError(
            f"{where} has the alpha_pattern {quoted(strange[0])}; patterns are not read here, only names of modules"
        )
    ends = {end.strip("^$").replace("\\", ""): float(value) for end, value in patterns.items()}
    return Scales(float(alpha), ends, bool(by_root))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def parse(text: str, where: str) -> dict[str, Any]:
    """A table in JSON. FileError where it is none."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is damaged: {escaped(error)}") from None
    if not isinstance(table, dict):
        raise FileError(f"{where} is damaged: it holds no table")
    return table


def of_part(table: dict[str, Any], part: str) -> dict[str, Any]:
    """One part's config out of diffusers' metadata, whose keys begin with the part's name."""
    return {key[len(part) + 1 :]: value for key, value in table.items() if key.startswith(f"{part}.")}


def write(pairs: dict[str, Pair]) -> dict[str, Any]:
    """The config of one part, by PEFT's names of its modules: what most modules have, and the others one by one."""
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*((p.rank, p.alpha) for p in pairs.values())))
    return {
        "r": rank,
        "lora_alpha": _short(alpha),
        "target_modules": sorted(pairs),
        "rank_pattern": {name: pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {name: _short(pair.alpha) for name, pair in pairs.items() if pair.alpha != alpha},
    }


def _short(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)


def adapter_config(pairs: dict[str, Pair]) -> str:
    """adapter_config.json."""
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": None,
        "task_type": None,
    }
    return json.dumps({**config, **write(pairs)}, indent=2, sort_keys=True) + "\n"
