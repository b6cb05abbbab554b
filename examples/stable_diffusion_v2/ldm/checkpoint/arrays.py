"""What all checkpoint formats share: what is wrong with a file, and numbers in it as arrays."""

from __future__ import annotations

import math
import mmap

import numpy as np

Tensors = dict[str, np.ndarray]
Strings = dict[str, str]

BFLOAT16 = "bfloat16"


class FileError(Exception):
    """What is wrong with a file, to be put behind its name."""


def truncation(needed: int, there: int) -> FileError:
    return FileError(f"is truncated: at least {needed} bytes expected, {there} there; fetch or copy the file again")


def array_at(data: mmap.mmap | bytes, dtype: np.dtype | str, shape: list[int], start: int) -> np.ndarray:
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
        raise FileError(f"is damaged: impossible shape ({error})") from None


def nbytes(dtype: np.dtype | str, shape: list[int]) -> int:
    if len(shape) > 32:
        raise FileError(f"is damaged: impossible shape ({len(shape)} dimensions)")
    return math.prod(shape) * (2 if dtype is BFLOAT16 else dtype.itemsize)


def stored_type(array: np.ndarray, dtype: np.dtype | str | None) -> np.dtype:
    """The type an array is written in: `dtype` for floating-point numbers, where it is given; else its own."""
    return array.dtype if dtype is None or array.dtype.kind != "f" else np.dtype(dtype)


def raw(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array's numbers as bytes of that type, in order; copied only where it must be."""
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
