"""The safetensors container: 8 bytes with the header's length, a header in JSON, the numbers.

https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator

import numpy as np

from ldm.checkpoint.arrays import BFLOAT16, FileError, Strings, Tensors, array_at, nbytes, to_bytes, truncation
from ldm.files import escaped

TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
    "BF16": BFLOAT16,
}

ALIGNMENT = 64  # bytes; in files that we write the numbers begin at a multiple, so that a reader can use them in place
MAX_HEADER = 100_000_000  # bytes of JSON, as in the safetensors library


def fits(head: bytes) -> bool:
    """Whether a file that begins with these bytes has this format."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def read(data: mmap.mmap) -> tuple[Tensors, Strings]:
    """(arrays, which are views, and strings) of a file; FileError where it is truncated or damaged."""
    body = 8 + int.from_bytes(data[:8], "little")
    if body > len(data):
        raise truncation(body, len(data))
    try:
        header = json.loads(data[8:body].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"is damaged: its header is not readable ({escaped(error)})") from None
    strings = header.pop("__metadata__", None) or {}
    if not isinstance(strings, dict) or not all(isinstance(text, str) for text in strings.values()):
        raise FileError("is damaged: its __metadata__ is not a table of strings")

    entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda e: e[3:])
    end = 0
    for name, dtype, shape, start, stop in entries:
        if start != end or stop - start != nbytes(dtype, shape):
            raise FileError(
                f"is damaged: the bytes of {escaped(name)} do not follow the ones before or do not fit its shape"
            )
        end = stop
    if body + end > len(data):
        raise truncation(body + end, len(data))
    if body + end < len(data):
        raise FileError(f"is damaged: {len(data) - body - end} bytes more than its header accounts for")
    return {name: array_at(data, dtype, shape, body + start) for name, dtype, shape, start, _ in entries}, strings


def _unique(pairs: list) -> dict:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(name: str, entry: dict) -> tuple:
    """(name, dtype, shape, start, stop) of one entry of the header."""

    def is_sizes(values):
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not is_sizes(entry.get("shape")) or not is_sizes(entry.get("data_offsets")):
        raise FileError(f"is damaged: its header says nothing usable of {escaped(name)}")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in TYPES:
        told = f"{escaped(name)} as {escaped(dtype)}"
        raise FileError(f"holds {told}, which is not read here: convert it to F32, F16 or BF16")
    if len(entry["data_offsets"]) != 2:
        raise FileError(f"is damaged: {escaped(name)} has no place in the file")
    return (name, TYPES[dtype], entry["shape"], *entry["data_offsets"])


def chunks(tensors: Tensors, strings: Strings, types: dict[str, np.dtype]) -> Iterator[bytes | np.ndarray]:
    """The file in parts. Each tensor is written in its type of `types`; they are converted one at a time."""
    type_names = {dtype: name for name, dtype in TYPES.items()}
    header = {"__metadata__": strings} if strings else {}
    sizes = {name: array.size * types[name].itemsize for name, array in tensors.items()}
    # Wide numbers come first, and sizes that are no multiple of ALIGNMENT come last: so all numbers are aligned to
    # their own width, and most tensors to ALIGNMENT.
    names = sorted(tensors, key=lambda name: (-types[name].itemsize, sizes[name] % ALIGNMENT, name))
    end = 0
    for name in names:
        shape, size = tensors[name].shape, sizes[name]
        header[name] = {"dtype": type_names[types[name]], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield to_bytes(tensors[name], types[name])
