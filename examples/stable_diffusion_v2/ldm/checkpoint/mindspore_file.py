"""The container of ``mindspore.save_checkpoint``: a sequence of protobuf messages,
``Checkpoint{repeated Value{tag = 1, TensorProto{dims = 1, tensor_type = 2, tensor_content = 3} tensor = 2}}``; a string
is a tensor of type ``str`` in UTF-32.

The numbers need not be aligned: ``mindspore.Tensor(array)`` copies them.
"""

from __future__ import annotations

import mmap
import re
import zlib
from collections.abc import Iterator

import numpy as np

from ldm.checkpoint.arrays import BFLOAT16, FileError, Strings, Tensors, array_at, nbytes, to_bytes, truncation
from ldm.files import escaped

TYPES = {
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

SLICE = 512 << 20  # bytes of one Value; larger parameters are cut there, as MindSpore does
# A protobuf file without its last messages is still valid, so our files begin and end with a mark.
BEGIN, END = "checkpoint.begin", "checkpoint.end"

_HEAD = re.compile(rb"\n[\x80-\xff]{0,9}[\x00-\x7f]\n")  # Checkpoint.value, its length, Value.tag
_VARINT, _BYTES = 0, 2  # protobuf's wire types
_CRC_MARK, _CRC_BYTES = b"crc_num", 17


def read(data: mmap.mmap) -> tuple[Tensors, Strings]:
    """(arrays, which are views, and strings) of a file; FileError where it is damaged."""
    size = _without_crc(data)
    slices: dict[str, list] = {}
    last = None
    for number, value in _fields(data, 0, size, outermost=True):
        if number != 1:
            raise FileError(f"is damaged: unknown field {number} in MindSpore's format")
        tag, *tensor = _value(data, value)
        if tag in slices and tag != last:
            raise FileError(f"is damaged: it holds {escaped(tag)} twice")
        slices.setdefault(tag, []).append(tensor)
        last = tag

    tensors, strings = {}, {}
    for tag, parts in slices.items():
        if parts[0][1] == "str":
            strings[tag] = _string(data, tag, parts)
        else:
            tensors[tag] = _tensor(data, tag, parts)
    if BEGIN in strings and END not in strings:
        raise FileError(f"is truncated: its last parameters are not there ({size} bytes); fetch or copy the file again")
    for mark in (BEGIN, END):
        strings.pop(mark, None)
    return tensors, strings


def _without_crc(data: mmap.mmap) -> int:
    """The size of the messages. A checksum may follow them; FileError where it does not fit."""
    tail = data[-_CRC_BYTES:]
    if not tail.startswith(_CRC_MARK):
        return len(data)
    size = len(data) - _CRC_BYTES
    if zlib.crc32(memoryview(data)[:size]) != int.from_bytes(tail[len(_CRC_MARK) :], "big"):
        raise FileError("is damaged: its checksum does not fit its content; fetch or copy the file again")
    return size


def fits(head: bytes) -> bool:
    """Whether a file that begins with these bytes has this format."""
    return _HEAD.match(head) is not None


def _varint(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """(a protobuf integer, the place behind it); the place is beyond ``stop`` where the integer is cut off."""
    value = 0
    for n in range(10):
        if start + n >= stop:
            return 0, stop + 1
        byte = data[start + n]
        value |= (byte & 0x7F) << (7 * n)
        if byte < 0x80:
            return value, start + n + 1
    raise FileError("is damaged: a number without end in MindSpore's format")


def _fields(data: mmap.mmap, start: int, stop: int, outermost: bool = False) -> Iterator[tuple[int, int | tuple]]:
    """(number, value) of each field of a protobuf message; a value is an int, or (start, stop) of its bytes."""
    while start < stop:
        key, start = _varint(data, start, stop)
        if key & 7 not in (_VARINT, _BYTES):
            raise FileError(f"is damaged: wire type {key & 7} in MindSpore's format")
        value, start = _varint(data, start, stop)
        if key & 7 == _BYTES:
            value = (start, start + value)
            start = value[1]
        if start > stop and outermost:
            raise truncation(start, stop)
        if start > stop:
            raise FileError("is damaged: a field is longer than what it is in")
        yield key >> 3, value


def _bytes_field(fields: dict, number: int) -> tuple[int, int]:
    place = fields.get(number)
    if not isinstance(place, tuple):
        raise FileError(f"is damaged: field {number} is missing or no bytes in MindSpore's format")
    return place


def _text(data: mmap.mmap, place: tuple[int, int], encoding: str) -> str:
    try:
        return data[slice(*place)].decode(encoding)
    except UnicodeDecodeError:
        raise FileError(f"is damaged: a name or text in it is not {encoding}") from None


def _value(data: mmap.mmap, place: tuple) -> tuple[str, list[int], str, int, int]:
    """(tag, dims, type, start, stop) of one Value."""
    if not isinstance(place, tuple):
        raise FileError("is damaged: a parameter without content")
    value = dict(_fields(data, *place))
    tag = _text(data, _bytes_field(value, 1), "utf-8")
    if 3 in value:
        raise FileError(f"holds the map parameter {escaped(tag)}, which is not read here")
    dims, tensor = [], {}
    for number, field in _fields(data, *_bytes_field(value, 2)):
        if number == 1:
            dims.append(field)
        else:
            tensor[number] = field
    if not all(isinstance(dim, int) and dim < 1 << 63 for dim in dims):
        raise FileError(f"is damaged: {escaped(tag)} has no usable shape")
    return (tag, dims, _text(data, _bytes_field(tensor, 2), "utf-8"), *_bytes_field(tensor, 3))


def _string(data: mmap.mmap, tag: str, parts: list) -> str:
    if len(parts) > 1:
        raise FileError(f"is damaged: it holds {escaped(tag)} twice")
    return _text(data, parts[0][2:], "utf-32-le").rstrip("\0")


def _tensor(data: mmap.mmap, tag: str, parts: list) -> np.ndarray:
    """The array of a tensor, whose slices are joined; `parts` has (dims, type, start, stop) of each slice."""
    dims, type_name, start, _ = parts[0]
    if any(part[:2] != [dims, type_name] for part in parts):
        raise FileError(f"is damaged: it holds {escaped(tag)} twice")
    if type_name not in TYPES:
        raise FileError(
            f"holds {escaped(tag)} as {escaped(type_name)}, which is not read here: convert it to Float32 or Float16"
        )
    dtype = TYPES[type_name]
    there = sum(stop - start for *_, start, stop in parts)
    if dims == [0] and there:  # older versions of MindSpore write a scalar so
        dims = []
    if there != nbytes(dtype, dims):
        raise FileError(f"is truncated or damaged: {escaped(tag)} needs {nbytes(dtype, dims)} bytes, {there} there")
    if len(parts) > 1:
        data, start = b"".join(data[start:stop] for *_, start, stop in parts), 0
    return array_at(data, dtype, dims, start)


def chunks(tensors: Tensors, strings: Strings, types: dict[str, np.dtype]) -> Iterator[bytes | np.ndarray]:
    """The file in parts. Each tensor is written in its type of `types`; they are converted one at a time."""
    type_names = {dtype: name for name, dtype in TYPES.items()}
    for tag, text in {BEGIN: "1", **strings}.items():
        yield from _value_chunks(tag, (0,), "str", np.frombuffer(text.encode("utf-32-le"), np.uint8))
    for tag, array in tensors.items():
        content = to_bytes(array, types[tag])
        for start in range(0, max(content.size, 1), SLICE):
            part = content[start : start + SLICE]
            yield from _value_chunks(tag, array.shape, type_names[types[tag]], part)
    yield from _value_chunks(END, (0,), "str", np.frombuffer("1".encode("utf-32-le"), np.uint8))


def _value_chunks(tag: str, dims: tuple, type_name: str, content: np.ndarray) -> Iterator[bytes | np.ndarray]:
    def field(number: int, size: int) -> bytes:
        return _to_varint((number << 3) + _BYTES) + _to_varint(size)

    name, type_bytes = tag.encode(), type_name.encode()
    tensor = b"".join(b"\x08" + _to_varint(dim) for dim in dims)
    tensor += field(2, len(type_bytes)) + type_bytes + field(3, content.size)
    value = field(1, len(name)) + name + field(2, len(tensor) + content.size) + tensor
    yield field(1, len(value) + content.size) + value
    yield content


def _to_varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append((value & 0x7F) | 0x80)
        value >>= 7
    return bytes([*groups, value])
