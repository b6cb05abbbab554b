"""What all checkpoint formats share: the error for a bad file, and the numbers in a file as arrays."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

Tensors = dict[str, np.ndarray]
Strings = dict[str, str]

BFLOAT16 = np.dtype(
    [("bfloat16", "<u2")]
)  # NumPy has no such type: these numbers cannot be used before they are `widened`


class FileError(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


class Mapping(mmap.mmap):
    """A file's content as read-only memory.

    The content stays that of the opened file, also where another file takes its name later. Writing into the opened
    file, or cutting it, changes the arrays that are views of it: see `changed`.
    """

    def __new__(cls, path: Path):
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise FileError("is empty (0 bytes): a copy or a download failed, fetch the file again")
            mapping = super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_READ)
            mapping.descriptor = os.dup(file.fileno())
        mapping.path, mapping.state = path, mapping.present_state()
        return mapping

    def present_state(self) -> tuple[int, int]:
        """Size and time of the last change, which differ after somebody has written to the file."""
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def truncation(needed: int, there: int) -> FileError:
    return FileError(f"is truncated: at least {needed} bytes expected, {there} there; fetch or copy the file again")


def array_at(data: mmap.mmap | bytes, dtype: np.dtype, shape: list[int], start: int) -> np.ndarray:
    """The numbers at byte ``start`` as an array, a view of the data."""
    try:
        return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
    except ValueError as error:  # for instance 0 x 10**18
        raise FileError(f"is damaged: impossible shape ({error})") from None


def widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, whose upper half it is; any other array as it is."""
    if array.dtype != BFLOAT16:
        return array
    wide = np.array(array["bfloat16"], "<u4")
    wide <<= 16
    return wide.view("<f4")


def nbytes(dtype: np.dtype, shape: list[int]) -> int:
    if len(shape) > 32:
        raise FileError(f"is damaged: impossible shape ({len(shape)} dimensions)")
    return math.prod(shape) * dtype.itemsize


def stored_type(array: np.ndarray, dtype: np.dtype | str | None) -> np.dtype:
    """The type that an array is written in: `dtype` for floating-point numbers, where it is given; else its own.

    A number that is too large for `dtype` would become infinite. An array with such a number is written as float32, or
    in its own type where float32 is too small as well.
    """
    own = np.dtype(np.float32) if array.dtype == BFLOAT16 else array.dtype
    if dtype is None or own.kind != "f":
        return own
    dtype, single = np.dtype(dtype), np.dtype(np.float32)
    if dtype.itemsize >= own.itemsize:
        return dtype
    most = largest(array)
    return next((kind for kind in (dtype, single) if kind.itemsize < own.itemsize and _holds(kind, most)), own)


def _holds(dtype: np.dtype, number: float) -> bool:
    with np.errstate(over="ignore"):
        return not np.isinf(np.float64(number).astype(dtype))


def largest(array: np.ndarray) -> float:
    """The largest finite absolute value in an array, 0 where there is none; releases the array's pages of a file."""
    numbers = widened(array)
    ends = [numbers.min(initial=0), numbers.max(initial=0)]
    if not np.isfinite(ends).all():
        finite = np.isfinite(numbers)
        ends = [numbers.min(initial=0, where=finite), numbers.max(initial=0, where=finite)]
    release(array)
    return float(max(-ends[0], ends[1]))


def to_bytes(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array's numbers, converted to `dtype`, as bytes in order; copied only where it is necessary."""
    return np.ascontiguousarray(widened(array), dtype).reshape(-1).view(np.uint8)


def release(array: np.ndarray) -> None:
    """Give back the memory of an array that is a view of a file; where the array is used again, the file is read again.

    After a copy this leaves the numbers in memory only once.
    """
    data = _mapping(array)
    if data is None or not array.flags.c_contiguous:
        return
    assert not array.flags.writeable, "memory that can be written is never given back: what was written would be lost"
    start = array.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        data.madvise(mmap.MADV_DONTNEED, first, last - first)


def changed(arrays: Iterable[np.ndarray]) -> Path | None:
    """A file that was written to, or cut, after these views of it were made; None where no file has changed."""
    mappings = {id(mapping): mapping for mapping in map(_mapping, arrays) if mapping is not None}
    return next((each.path for each in mappings.values() if each.present_state() != each.state), None)


def _mapping(array: np.ndarray) -> Mapping | None:
    """The file that an array is a view of; None where it is none."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    data = base.obj if isinstance(base, memoryview) else base
    return data if isinstance(data, Mapping) else None
