"""Statistics from an .npz file, which anybody may have made. An array's header is checked before its numbers are read.

A file of 1.5 MB can hold 1.5 GB of zeros, so nothing is unpacked but the wanted arrays.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import IO

import numpy as np

from ldm.errors import UserError
from ldm.files import escaped, quoted

LONGEST_WORD = 200  # characters of a word in a file
_SUFFIX = ".npy"
_PACKED = (
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
)  # NumPy writes no other, and zipfile unpacks others only as a whole


def read(path: str, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(the wanted arrays as float64, the single words and whole numbers beside them as text).

    Args:
        path: the file.
        shapes: name -> shape of the wanted arrays. Other arrays are ignored.

    Raises:
        UserError: the file cannot be read, or an array is missing, has another shape, or does not hold real numbers.
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
    except Exception as error:  # errors of zipfile, the decompressors, NumPy and the system
        raise UserError(f"cannot read statistics from {path}: {escaped(error, 200)}") from None
    return arrays, {name: word for name, word in words.items() if word is not None}


def _is_array(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith(_SUFFIX) and info.compress_type in _PACKED


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, type) of an array; reads at most 64 KiB."""
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
        if len(data) < size or file.read(1):  # at the end zipfile compares the checksum
            raise ValueError(f"the size of {name} is not that of its numbers")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if columns_first else "C")
    return array.astype(np.float64)


def _word(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str | None:
    """The single word or whole number in an array as text; None where it holds something else."""
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
        if shape != () or dtype.kind not in "Uiu" or dtype.itemsize > LONGEST_WORD * np.dtype("U1").itemsize:
            return None
        return str(np.frombuffer(file.read(dtype.itemsize), dtype)[0])
