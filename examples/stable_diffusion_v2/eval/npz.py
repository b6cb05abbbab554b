"""Statistics from an .npz file, which anybody may have made: an array's header is looked at before its numbers.

A file of 1.5 MB can hold 1.5 GB of zeros. No more is ever unpacked than what is wanted.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import IO

import numpy as np

from ldm.errors import UserError
from ldm.files import escaped, quoted

LONGEST_WORD = 200  # characters of what a file says in words
_SUFFIX = ".npy"
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # NumPy writes no other, and others are not unpacked bit by bit


def read(path: str, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The wanted arrays as float64, and what the file says beside them: single words and whole numbers, as text.

    Args:
        path: the file.
        shapes: name -> shape of the arrays that are wanted. Other arrays are passed over.

    Raises:
        UserError: the file cannot be read, or an array is missing, of another shape, or does not hold real numbers.
    """
    if not os.path.exists(path):
        raise UserError(f"there is no file {path}")
    try:
        if not os.path.isfile(path):
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(_SUFFIX): info for info in archive.infolist() if _is_array(info)}
            if not shapes.keys() <= members.keys():
                wanted, there = " and ".join(shapes), ", ".join(map(escaped, [*members][:5])) or "none"
                raise UserError(f"{path} holds no statistics: they are arrays {wanted}, it has {there}")
            arrays = {name: _numbers(archive, members[name], shape, path) for name, shape in shapes.items()}
            words = {name: _word(archive, info) for name, info in members.items() if name not in shapes}
    except UserError:
        raise
    except Exception as error:  # zipfile's, those of what unpacks, NumPy's and the system's
        raise UserError(f"cannot read statistics from {path}: {escaped(error, 200)}") from None
    return arrays, {name: word for name, word in words.items() if word is not None}


def _is_array(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith(_SUFFIX) and info.compress_type in _PACKED


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, type) of an array; at most 64 KiB are read for it."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"an array has a header of version {version}, which is for arrays with fields")
    return np.lib.format.read_array_header_1_0(file)


def _numbers(archive: zipfile.ZipFile, info: zipfile.ZipInfo, wanted: tuple[int, ...], path: str) -> np.ndarray:
    with archive.open(info) as file:
        shape, columns_first, dtype = _header(file)
        name = info.filename.removesuffix(_SUFFIX)
        if shape != wanted:
            raise UserError(f"{path} is of other features: its {name} is {escaped(shape)}, {wanted} is wanted")
        if dtype.kind != "f":
            raise UserError(f"{path}: its {name} holds {quoted(dtype)}, real numbers are wanted")
        size = math.prod(shape) * dtype.itemsize
        data = file.read(size)
        if len(data) < size or file.read(1):  # at the end zipfile compares its checksum
            raise ValueError(f"the size of {name} is not that of its numbers")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if columns_first else "C")
    return array.astype(np.float64)


def _word(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str | None:
    """A single word or whole number as text; None where the array is something else."""
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
        if shape != () or dtype.kind not in "Uiu" or dtype.itemsize > LONGEST_WORD * np.dtype("U1").itemsize:
            return None
        return str(np.frombuffer(file.read(dtype.itemsize), dtype)[0])
