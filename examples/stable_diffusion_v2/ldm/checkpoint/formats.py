"""Checkpoint files as containers: named arrays and named strings, whatever the names are.

Each format has a file here, and needs none of the framework that defined it: ``safetensors_file``, ``mindspore_file``
(both read and written) and ``pytorch_file`` (read).

A file is recognised by what is in it. Arrays are views of one memory mapping, which nobody can write to: reading costs
no memory until a number is used. bfloat16, which NumPy lacks, is widened to float32.
"""

from __future__ import annotations

import logging
import mmap
from pathlib import Path

import numpy as np

from ldm.checkpoint import mindspore_file, pytorch_file, safetensors_file
from ldm.checkpoint.arrays import FileError, Mapping, Strings, Tensors, largest, release, stored_type, widened
from ldm.errors import UserError
from ldm.files import escaped, replacing

log = logging.getLogger(__name__)

_KINDS = {"mindspore": mindspore_file, "safetensors": safetensors_file, "pytorch": pytorch_file}
FORMATS = ("mindspore", "safetensors")  # that are written

# What people pass by mistake: how it begins, what it is, what to do.
_FOREIGN = (
    (b"\x80", "a Python pickle, but not one of torch.save", "save its tensors as .safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "get the file with git lfs pull"),
    (b"<", "a web page, not a checkpoint", "the download failed: fetch the file again"),
    (b"{", "JSON text, not a checkpoint", "give the file that holds the weights"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
)


def read(path: str | Path, widen: bool = True) -> tuple[Tensors, Strings, str]:
    """The arrays, the strings and the format's name of a checkpoint file, with the names that are in it.

    Without `widen` bfloat16 stays in the file, as ``arrays.BFLOAT16``, to be written and no more. Raises UserError
    where the file is missing, unreadable, truncated, damaged or of another kind.
    """
    path = Path(path)
    try:
        data = _map(path)
        kind = _identify(data)
        tensors, strings = _KINDS[kind].read(data)
        if not tensors:
            raise FileError("holds no parameters")
        if widen:
            for name, array in tensors.items():
                tensors[name] = widened(array)
                if tensors[name] is not array:
                    release(array)
    except FileError as error:
        raise UserError(f"{path} {error}") from None
    return tensors, strings, kind


def write(path: str | Path, tensors: Tensors, strings: Strings, kind: str, dtype: str | None = None) -> None:
    """Write a checkpoint file of format ``kind`` (one of FORMATS), or leave what was there as it was.

    Floating-point numbers are written as ``dtype``, one of NumPy's, where it is given: converted tensor by tensor, so
    it costs no memory. A tensor with a number that is too large for it stays float32, and a line says so. Keys and
    values of ``strings`` must not be empty (MindSpore cannot read an empty one back).
    Raises UserError where the disk or the folder refuses, or the format is unknown.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown checkpoint format {kind!r}; choose one of {', '.join(FORMATS)}")
    if not all(strings) or not all(strings.values()):
        raise ValueError("empty string among the strings of a checkpoint")
    strings = {_printable(key): _printable(text) for key, text in strings.items()}
    types = {name: stored_type(array, dtype) for name, array in tensors.items()}
    _tell_of_larger(path, tensors, types, dtype)
    with replacing(path) as file:
        for chunk in _KINDS[kind].chunks(tensors, strings, types):
            file.write(chunk)


def _tell_of_larger(path: Path, tensors: Tensors, types: dict[str, np.dtype], dtype: str | None) -> None:
    """A line where tensors are not written as `dtype`."""
    larger = [name for name, kind in types.items() if dtype and kind.kind == "f" and kind != np.dtype(dtype)]
    if larger:
        first, most = larger[0], largest(tensors[larger[0]])
        told = "%s: %d of %d tensors stay %s, for %s cannot hold their numbers; the first is %s with %.6g"
        log.warning(told, path, len(larger), len(types), types[first], dtype, escaped(first), most)


def _printable(text: str) -> str:
    """Without the half characters of undecodable file names, which no format can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _map(path: Path) -> Mapping:
    try:
        data = Mapping(path)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            data.madvise(mmap.MADV_SEQUENTIAL)  # it is read ahead in larger pieces, from a disk in half the time
        return data
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist: give the path of a .ckpt or .safetensors file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a file is wanted here") from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def _identify(data: mmap.mmap) -> str:
    head = data[:64]
    for kind, module in _KINDS.items():
        if module.fits(head):
            return kind
    for begin, what, advice in _FOREIGN:
        if head.lstrip().startswith(begin):
            raise FileError(f"is {what}; {advice}")
    if len(data) < 16:
        raise FileError(f"is truncated: it has only {len(data)} bytes; fetch or copy the file again")
    raise FileError(f"is no checkpoint of a kind known here: it begins with {head[:8]!r}")
