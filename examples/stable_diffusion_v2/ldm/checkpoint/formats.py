"""Checkpoint files as containers: named arrays and named strings, whatever the names are.

Two formats are read and written here, both without the framework that defined them:

* ``safetensors``: 8 bytes of header length, a JSON header, the numbers
  (https://github.com/huggingface/safetensors, "Format").
* ``mindspore``: a sequence of protobuf messages as ``mindspore.save_checkpoint`` writes them,
  ``Checkpoint{repeated Value{tag = 1, TensorProto{dims = 1, tensor_type = 2, tensor_content = 3} tensor = 2}}``;
  a string is a tensor of type ``str`` in UTF-32.

A file is recognised by what is in it. Arrays are views of one private memory mapping: reading costs no memory until a
number is used, writing to an array never reaches the file. In MindSpore's files the numbers need not be aligned;
``mindspore.Tensor(array)`` copies and does not mind. bfloat16, which numpy lacks, is widened to float32.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm.errors import UserError

Tensors = dict[str, np.ndarray]
Strings = dict[str, str]

BFLOAT16 = "bfloat16"
SAFETENSORS_TYPES = {
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
MINDSPORE_TYPES = {
    "Float64": np.dtype("<f8"),
    "Float32": np.dtype("<f4"),
    "Float16": np.dtype("<f2"),
    "Int64": np.dtype("<i8"),
    "Int32": np.dtype("<i4"),
    "Int16": np.dtype("<i2"),
    "Int8": np.dtype("i1"),
    "UInt64": np.dtype("<u8"),
    "UInt32": np.dtype("<u4"),
    "UInt16": np.dtype("<u2"),
    "UInt8": np.dtype("u1"),
    "Bool": np.dtype("bool"),
    "BFloat16": BFLOAT16,
}

MAX_HEADER = 100_000_000  # bytes of JSON; the limit of the safetensors library
MINDSPORE_SLICE = 512 << 20  # bytes of one Value; larger parameters are cut there, as MindSpore does
# A protobuf file that lost its last messages is still a valid one, so ours begin and end with a mark.
BEGIN, END = "checkpoint.begin", "checkpoint.end"

# What people pass by mistake: how it begins, what it is, what to do.
_FOREIGN = (
    (b"PK\x03\x04", "a PyTorch file (zip)", "these are not read yet: convert it to .safetensors"),
    (b"\x80", "a PyTorch file (pickle)", "these are not read yet: convert it to .safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "get the file with git lfs pull"),
    (b"<", "a web page, not a checkpoint", "the download failed: fetch the file again"),
    (b"{", "JSON text, not a checkpoint", "give the file that holds the weights"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
)


class _FileError(Exception):
    """What is wrong with a file, to be put behind its name."""


def read(path: str | Path) -> tuple[Tensors, Strings, str]:
    """The arrays, the strings and the format's name of a checkpoint file, with the names that are in it.

    Raises UserError where the file is missing, unreadable, truncated, damaged or of another kind.
    """
    path = Path(path)
    data = _map(path)
    try:
        kind = _identify(data)
        tensors, strings = _READERS[kind](data)
        if not tensors:
            raise _FileError("holds no parameters")
    except _FileError as error:
        raise UserError(f"{path} {error}") from None
    return tensors, strings, kind


def write(path: str | Path, tensors: Tensors, strings: Strings, kind: str) -> None:
    """Write a checkpoint file of format ``kind`` (one of FORMATS), or leave what was there as it was.

    Keys and values of ``strings`` must not be empty (MindSpore cannot read an empty one back).
    Raises UserError where the disk or the folder refuses, or the format is unknown.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown checkpoint format {kind!r}; choose one of {', '.join(FORMATS)}")
    if not all(strings) or not all(strings.values()):
        raise ValueError("empty string among the strings of a checkpoint")
    strings = {_printable(key): _printable(text) for key, text in strings.items()}
    with replacing(path) as file:
        for chunk in _WRITERS[kind](tensors, strings):
            file.write(chunk)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` only when the block has ended without an error.

    It is written beside it as ``<name>.partial``, forced to the disk, then renamed: a reader sees the old file or the
    new one, and a full disk costs neither. Raises UserError instead of OSError.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        state = "the previous file is intact" if os.path.exists(path) else "nothing is left behind"
        advice = "make room there or write to another folder"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {state}; {advice}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _printable(text: str) -> str:
    """Without the half characters of undecodable file names, which no format can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} is empty (0 bytes): a copy or a download failed, fetch the file again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist: give the path of a .ckpt or .safetensors file") from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder: diffusers folders are not read yet, give one .ckpt or .safetensors file"
        ) from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def _identify(data: mmap.mmap) -> str:
    head = data[:64]
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if _MINDSPORE_HEAD.match(head):
        return "mindspore"
    for begin, what, advice in _FOREIGN:
        if head.lstrip().startswith(begin):
            raise _FileError(f"is {what}; {advice}")
    if len(data) < 16:
        raise _FileError(f"is truncated: it has only {len(data)} bytes; fetch or copy the file again")
    raise _FileError(f"is no checkpoint of a kind known here: it begins with {head[:8]!r}")


def _truncation(needed: int, there: int) -> _FileError:
    return _FileError(f"is truncated: at least {needed} bytes expected, {there} there; fetch or copy the file again")


def _array(data: mmap.mmap | bytes, dtype: np.dtype | str, shape: list[int], start: int) -> np.ndarray:
    """The numbers at ``start`` as an array: a view, but for bfloat16."""
    stored = np.dtype("<u2") if dtype is BFLOAT16 else dtype
    flat = np.frombuffer(data, stored, math.prod(shape), start)
    if dtype is BFLOAT16:  # it is the upper half of a float32
        flat = flat.astype("<u4")
        flat <<= 16
        flat = flat.view("<f4")
    try:
        return flat.reshape(shape)
    except ValueError as error:  # for instance 0 x 10**18
        raise _FileError(f"is damaged: impossible shape ({error})") from None


def _nbytes(dtype: np.dtype | str, shape: list[int]) -> int:
    if len(shape) > 32:
        raise _FileError(f"is damaged: impossible shape ({len(shape)} dimensions)")
    return math.prod(shape) * (2 if dtype is BFLOAT16 else dtype.itemsize)


def _raw(array: np.ndarray) -> np.ndarray:
    """An array's numbers as bytes, in order; copied only where it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# ---- safetensors ----


def _read_safetensors(data: mmap.mmap) -> tuple[Tensors, Strings]:
    body = 8 + int.from_bytes(data[:8], "little")
    if body > len(data):
        raise _truncation(body, len(data))
    try:
        header = json.loads(data[8:body].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _FileError(f"is damaged: its header is not readable ({str(error)[:80]})") from None
    strings = header.pop("__metadata__", None) or {}
    if not isinstance(strings, dict) or not all(isinstance(text, str) for text in strings.values()):
        raise _FileError("is damaged: its __metadata__ is not a table of strings")

    entries = sorted((_safetensors_entry(name, entry) for name, entry in header.items()), key=lambda e: e[3:])
    end = 0
    for name, dtype, shape, start, stop in entries:
        if start != end or stop - start != _nbytes(dtype, shape):
            raise _FileError(f"is damaged: the bytes of {name} do not follow the ones before or do not fit its shape")
        end = stop
    if body + end > len(data):
        raise _truncation(body + end, len(data))
    if body + end < len(data):
        raise _FileError(f"is damaged: {len(data) - body - end} bytes more than its header accounts for")
    return {name: _array(data, dtype, shape, body + start) for name, dtype, shape, start, _ in entries}, strings


def _unique(pairs: list) -> dict:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _safetensors_entry(name: str, entry: dict) -> tuple:
    """(name, dtype, shape, start, stop) of one entry of the header."""

    def is_sizes(values):
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not is_sizes(entry.get("shape")) or not is_sizes(entry.get("data_offsets")):
        raise _FileError(f"is damaged: its header says nothing usable of {name}")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_TYPES:
        raise _FileError(f"holds {name} as {dtype}, which is not read here: convert it to F32, F16 or BF16")
    if len(entry["data_offsets"]) != 2:
        raise _FileError(f"is damaged: {name} has no place in the file")
    return (name, SAFETENSORS_TYPES[dtype], entry["shape"], *entry["data_offsets"])


def _safetensors_chunks(tensors: Tensors, strings: Strings) -> Iterator[bytes | np.ndarray]:
    type_names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header = {"__metadata__": strings} if strings else {}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # wide numbers first: all stay aligned
    end = 0
    for name in names:
        array = tensors[name]
        offsets = [end, end + array.nbytes]
        header[name] = {"dtype": type_names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _raw(tensors[name])


# ---- MindSpore ----

_MINDSPORE_HEAD = re.compile(rb"\n[\x80-\xff]{0,9}[\x00-\x7f]\n")  # Checkpoint.value, its length, Value.tag
_VARINT, _BYTES = 0, 2  # protobuf's wire types
_CRC_MARK, _CRC_BYTES = b"crc_num", 17


def _read_mindspore(data: mmap.mmap) -> tuple[Tensors, Strings]:
    size = _without_crc(data)
    slices: dict[str, list] = {}
    last = None
    for number, value in _fields(data, 0, size, outermost=True):
        if number != 1:
            raise _FileError(f"is damaged: unknown field {number} in MindSpore's format")
        tag, *tensor = _mindspore_value(data, value)
        if tag in slices and tag != last:
            raise _FileError(f"is damaged: it holds {tag} twice")
        slices.setdefault(tag, []).append(tensor)
        last = tag

    tensors, strings = {}, {}
    for tag, parts in slices.items():
        if parts[0][1] == "str":
            strings[tag] = _mindspore_string(data, tag, parts)
        else:
            tensors[tag] = _mindspore_array(data, tag, parts)
    if BEGIN in strings and END not in strings:
        raise _FileError(
            f"is truncated: its last parameters are not there ({size} bytes); fetch or copy the file again"
        )
    for mark in (BEGIN, END):
        strings.pop(mark, None)
    return tensors, strings


def _without_crc(data: mmap.mmap) -> int:
    """Where the messages end; a checksum may stand behind them, and has to be right."""
    tail = data[-_CRC_BYTES:]
    if not tail.startswith(_CRC_MARK):
        return len(data)
    size = len(data) - _CRC_BYTES
    if zlib.crc32(memoryview(data)[:size]) != int.from_bytes(tail[len(_CRC_MARK) :], "big"):
        raise _FileError("is damaged: its checksum does not fit its content; fetch or copy the file again")
    return size


def _varint(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """A protobuf integer and the place behind it, which is beyond ``stop`` where the integer is cut off."""
    value = 0
    for n in range(10):
        if start + n >= stop:
            return 0, stop + 1
        byte = data[start + n]
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            return value, start + n + 1
    raise _FileError("is damaged: a number without end in MindSpore's format")


def _fields(data: mmap.mmap, start: int, stop: int, outermost: bool = False) -> Iterator[tuple[int, int | tuple]]:
    """(number, value) of the fields of a protobuf message: an int, or (start, stop) of the bytes."""
    while start < stop:
        key, start = _varint(data, start, stop)
        if key & 7 not in (_VARINT, _BYTES):
            raise _FileError(f"is damaged: wire type {key & 7} in MindSpore's format")
        value, start = _varint(data, start, stop)
        if key & 7 == _BYTES:
            value = (start, start + value)
            start = value[1]
        if start > stop and outermost:
            raise _truncation(start, stop)
        if start > stop:
            raise _FileError("is damaged: a field is longer than what it is in")
        yield key >> 3, value


def _bytes_field(fields: dict, number: int) -> tuple[int, int]:
    place = fields.get(number)
    if not isinstance(place, tuple):
        raise _FileError(f"is damaged: field {number} is missing or no bytes in MindSpore's format")
    return place


def _text(data: mmap.mmap, place: tuple[int, int], encoding: str) -> str:
    try:
        return data[slice(*place)].decode(encoding)
    except UnicodeDecodeError:
        raise _FileError(f"is damaged: a name or text in it is not {encoding}") from None


def _mindspore_value(data: mmap.mmap, place: tuple) -> tuple[str, list[int], str, int, int]:
    """(tag, dims, type, start, stop) of one Value."""
    if not isinstance(place, tuple):
        raise _FileError("is damaged: a parameter without content")
    value = dict(_fields(data, *place))
    tag = _text(data, _bytes_field(value, 1), "utf-8")
    if 3 in value:
        raise _FileError(f"holds the map parameter {tag}, which is not read here")
    dims, tensor = [], {}
    for number, field in _fields(data, *_bytes_field(value, 2)):
        if number == 1:
            dims.append(field)
        else:
            tensor[number] = field
    if not all(isinstance(dim, int) and dim < 1 << 63 for dim in dims):
        raise _FileError(f"is damaged: {tag} has no usable shape")
    return (tag, dims, _text(data, _bytes_field(tensor, 2), "utf-8"), *_bytes_field(tensor, 3))


def _mindspore_string(data: mmap.mmap, tag: str, parts: list) -> str:
    if len(parts) > 1:
        raise _FileError(f"is damaged: it holds {tag} twice")
    return _text(data, parts[0][2:], "utf-32-le").rstrip("\0")


def _mindspore_array(data: mmap.mmap, tag: str, parts: list) -> np.ndarray:
    dims, type_name, start, _ = parts[0]
    if any(part[:2] != [dims, type_name] for part in parts):
        raise _FileError(f"is damaged: it holds {tag} twice")
    if type_name not in MINDSPORE_TYPES:
        raise _FileError(f"holds {tag} as {type_name}, which is not read here: convert it to Float32 or Float16")
    dtype = MINDSPORE_TYPES[type_name]
    there = sum(stop - start for *_, start, stop in parts)
    if dims == [0] and there:  # how older versions write a scalar
        dims = []
    if there != _nbytes(dtype, dims):
        raise _FileError(f"is truncated or damaged: {tag} needs {_nbytes(dtype, dims)} bytes, {there} there")
    if len(parts) > 1:
        data, start = b"".join(data[start:stop] for *_, start, stop in parts), 0
    return _array(data, dtype, dims, start)


def _mindspore_chunks(tensors: Tensors, strings: Strings) -> Iterator[bytes | np.ndarray]:
    type_names = {dtype: name for name, dtype in MINDSPORE_TYPES.items()}
    for tag, text in {BEGIN: "1", **strings}.items():
        yield from _value_chunks(tag, (0,), "str", np.frombuffer(text.encode("utf-32-le"), np.uint8))
    for tag, array in tensors.items():
        content = _raw(array)
        for start in range(0, max(content.size, 1), MINDSPORE_SLICE):
            part = content[start : start + MINDSPORE_SLICE]
            yield from _value_chunks(tag, array.shape, type_names[array.dtype], part)
    yield from _value_chunks(END, (0,), "str", np.frombuffer("1".encode("utf-32-le"), np.uint8))


def _value_chunks(tag: str, dims: tuple, type_name: str, content: np.ndarray) -> Iterator[bytes | np.ndarray]:
    def field(number: int, size: int) -> bytes:
        return _to_varint(number << 3 | _BYTES) + _to_varint(size)

    name, kind = tag.encode(), type_name.encode()
    tensor = b"".join(b"\x08" + _to_varint(dim) for dim in dims)
    tensor += field(2, len(kind)) + kind + field(3, content.size)
    value = field(1, len(name)) + name + field(2, len(tensor) + content.size) + tensor
    yield field(1, len(value) + content.size) + value
    yield content


def _to_varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


_READERS = {"mindspore": _read_mindspore, "safetensors": _read_safetensors}
_WRITERS = {"mindspore": _mindspore_chunks, "safetensors": _safetensors_chunks}
FORMATS = tuple(_WRITERS)
