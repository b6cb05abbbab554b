"""What all checkpoint formats share: what is wrong with a file, and numbers in it as arrays."""

from __future__ import annotations

import math
import mmap

import numpy as np

Tensors = dict[str, np.ndarray]
Strings = dict[str, str]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # NumPy has no such type: these numbers are opaque until they are `widened`


class FileError(Exception):
    """What is wrong with a file, to be put behind its name."""


def truncation(needed: int, there: int) -> FileError:
    return FileError(f"is truncated: at least {needed} bytes expected, {there} there; fetch or copy the file again")


def array_at(data: mmap.mmap | bytes, dtype: np.dtype, shape: list[int], start: int) -> np.ndarray:
    """The numbers at ``start`` as an array, which is a view."""
    try:
        return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
    except ValueError as error:  # for instance 0 x 10**18
        raise FileError(f"is damaged: impossible shape ({error})") from None


def widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, of which it is the upper half; anything else as it is."""
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
    """The type an array is written in: `dtype` for floating-point numbers, where it is given; else its own."""
    own = np.dtype(np.float32) if array.dtype == BFLOAT16 else array.dtype
    return own if dtype is None or own.kind != "f" else np.dtype(dtype)


def raw(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array's numbers as bytes of that type, in order; copied only where it must be."""
    return np.ascontiguousarray(widened(array), dtype).reshape(-1).view(np.uint8)


def release(array: np.ndarray) -> None:
    """Let go of the memory behind an array that is a view of a file; it is read again should it be needed again.

    For after copying: the numbers then are in memory once. What was written to the array is lost.
    """
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    data = base.obj if isinstance(base, memoryview) else base
    if not isinstance(data, mmap.mmap) or not array.flags.c_contiguous:
        return
    start = array.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        data.madvise(mmap.MADV_DONTNEED, first, last - first)
