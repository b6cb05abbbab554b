"""The safetensors container (https://github.com/huggingface/safetensors, "Format"): 8 bytes of header length, a JSON
header, the numbers."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator

import numpy as np

from ldm.checkpoint.arrays import BFLOAT16, FileError, Strings, Tensors, array_at, nbytes, raw, truncation
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

ALIGNMENT = 64  # bytes, where the numbers begin in files that we write: a reader can then use them where they are
MAX_HEADER = 100_000_000  # bytes of JSON; the limit of the safetensors library


def fits(head: bytes) -> bool:
    """Whether a file that begins so is one of these."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def read(data: mmap.mmap) -> tuple[Tensors, Strings]:
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
    """The file in parts; `types` says as what each tensor is written: they are converted one at a time."""
    type_names = {dtype: name for name, dtype in TYPES.items()}
    header = {"__metadata__": strings} if strings else {}
    sizes = {name: array.size * types[name].itemsize for name, array in tensors.items()}
    # Wide numbers first, and what is no multiple of ALIGNMENT last: so all stay aligned, and most of them well.
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
        yield raw(tensors[name], types[name])
