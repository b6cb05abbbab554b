"""How tools/fuzz_files.py damages files: changes to a file's bytes, and to the JSON and YAML in it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from tools import fuzz_samples

_WORDS = b'{ } [ ] " : , - & * ! NaN 1e999 null --- %TAG !!bool !!python/name:os.system \xff \xe2\x80\xa8 \x1b[31m PK'
TOKENS = [*_WORDS.split(b" "), b"\0", b"\n", b"\r\n", b" ", b"&a [*a, *a]"]
EDGES = [value.to_bytes(n, "little") for n in (1, 2, 4, 8) for value in (0, 1, 2 ** (8 * n - 1) - 1, 2 ** (8 * n) - 1)]
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**400, 1000001, 0.5, -1e308, float("nan"), float("inf")]
WORDS = ["", "x\ny", "\0", "\ud800", "nan", "v", "x" * 5000, "../../x", "1e999", "&a *a"]
ODD = [None, True, *NUMBERS, *WORDS, [], {}, [[]], [None], {"a": {}}, {"": ""}, [1, 2, 3]]


def damage(rng: random.Random, name: str, data: bytes) -> tuple[str, bytes]:
    """(what was done, the file's bytes after it)."""
    inner = STRUCTURES.get(Path(name).suffix)
    if inner and rng.random() < 0.5:
        return "structure", inner(rng, data)
    what = rng.choice(list(CHANGES))
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = int(rng.choice([rng.random(), rng.random() ** 4, 1 - rng.random() ** 4]) * len(data))
        data = CHANGES[what](rng, data, at)
    return what, data


def _number(rng: random.Random, data: bytes, at: int) -> bytes:
    found = re.compile(rb"\d+").search(data, at)
    if not found:
        return data
    return data[: found.start()] + rng.choice(DIGITS) + data[found.end() :]


def _flip(rng: random.Random, data: bytes, at: int) -> bytes:
    if at >= len(data):
        return data
    bit = 1 << rng.randrange(8)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def _edge(rng: random.Random, data: bytes, at: int) -> bytes:
    edge = rng.choice(EDGES)
    return data[:at] + edge + data[at + len(edge) :]


DIGITS = [b"0", b"-1", b"1", b"999999999", b"9223372036854775808", b"1e999", b"1" * 5000, b"0.5", b"nan"]
CHANGES: dict[str, Callable[[random.Random, bytes, int], bytes]] = {
    "flip": _flip,
    "number": _number,
    "cut": lambda rng, data, at: data[:at],
    "token": lambda rng, data, at: data[:at] + rng.choice(TOKENS) + data[at:],
    "edge": _edge,
    "repeat": lambda rng, data, at: data[: at + rng.randrange(200)] + data[at:],
    "many": lambda rng, data, at: data[:at] + data[at : at + rng.randrange(1, 9)] * rng.choice([2, 1000]) + data[at:],
    "delete": lambda rng, data, at: data[:at] + data[at + rng.randrange(1, 50) :],
    "bytes": lambda rng, data, at: data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:],
}  # fmt: skip


def changed(rng: random.Random, value: object) -> object:
    """A value of JSON or YAML, changed in one place. A string that holds JSON or YAML is changed inside."""
    if isinstance(value, str) and value[:1] in "{[m" and rng.random() < 0.8:
        return changed_text(rng, value)
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        copy, key = value.copy(), rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        how = rng.random()
        if how < 0.7:
            copy[key] = changed(rng, copy[key])
        elif how < 0.85 or isinstance(copy, list):
            del copy[key]
        else:
            copy[rng.choice(["x", "", "x\ny" * 99, "\0", str(key) + "s"])] = copy.pop(key)
        return copy
    return rng.choice(ODD)


def changed_text(rng: random.Random, text: str) -> str:
    try:
        form, value = json, json.loads(text)
    except ValueError:
        try:
            form, value = yaml, yaml.safe_load(text)
        except yaml.YAMLError:
            return "x"
    if not isinstance(value, (dict, list)):
        return "x"  # a word is one also when it is written anew: looking into it would not end
    if rng.random() < 0.02:
        return rng.choice(["[", '{"a":', "- ", "{a: "]) * rng.choice([900, 100_000])
    return form.dumps(changed(rng, value)) if form is json else yaml.safe_dump(changed(rng, value), sort_keys=False)


def _text(rng: random.Random, data: bytes) -> bytes:
    return changed_text(rng, data.decode()).encode("utf-8", "surrogatepass")


def _line(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    n = rng.randrange(len(lines))
    return b"\n".join([*lines[:n], _text(rng, lines[n]), *lines[n + 1 :]])


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = changed_text(rng, data[8:end].decode()).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[end:]


def _png(rng: random.Random, data: bytes) -> bytes:
    return fuzz_samples.png(changed_text(rng, fuzz_samples.FACTS).encode("utf-8", "replace").decode())


STRUCTURES = {".json": _text, ".yaml": _text, ".jsonl": _line, ".safetensors": _safetensors, ".png": _png}
