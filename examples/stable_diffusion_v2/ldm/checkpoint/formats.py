"""Checkpoint files as containers of named arrays and named strings.

Each format has a module here: ``safetensors_file``, ``mindspore_file`` (both read and written) and ``pytorch_file``
(read). None needs the framework that defined the format.

The content decides what a file is; its name does not matter. Arrays are views of one read-only memory mapping, so
reading costs no memory until a number is used. NumPy lacks bfloat16, which is widened to float32.
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

_MODULES = {"mindspore": mindspore_file, "safetensors": safetensors_file, "pytorch": pytorch_file}
FORMATS = ("mindspore", "safetensors")  # the formats that are written

# Files that are passed by mistake: their beginning, what they are, what to do.
_FOREIGN = (
    (b"\x80", "a Python pickle, but not one of torch.save", "save its tensors as .safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "get the file with git lfs pull"),
    (b"<", "a web page, not a checkpoint", "the download failed: fetch the file again"),
    (b"{", "JSON text, not a checkpoint", "give the file that holds the weights"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
)


def read(path: str | Path, widen: bool = True) -> tuple[Tensors, Strings, str]:
    """(arrays, strings, name of the format) of a checkpoint file, with the file's own names.

    Without `widen` bfloat16 stays ``arrays.BFLOAT16``, which can only be written again. Raises UserError where the file
    is missing, unreadable, truncated, damaged or of another kind.
    """
    path = Path(path)
    try:
        data = _map(path)
        form = _identify(data)
        tensors, strings = _MODULES[form].read(data)
        if not tensors:
            raise FileError("holds no parameters")
        if widen:
            for name, array in tensors.items():
                tensors[name] = widened(array)
                if tensors[name] is not array:
                    release(array)
    except FileError as error:
        raise UserError(f"{path} {error}") from None
    return tensors, strings, form


def write(path: str | Path, tensors: Tensors, strings: Strings, form: str, dtype: str | None = None) -> None:
    """Write a checkpoint file of the format ``form`` (one of FORMATS), whole or not at all.

    Floating-point numbers are written as ``dtype``, NumPy's name of a type, where it is given. They are converted
    tensor by tensor, so it costs no memory. A tensor with a number that is too large for ``dtype`` stays float32, and a
    line says so. Keys and values of ``strings`` must not be empty: MindSpore cannot read an empty string back. Raises
    UserError where the disk or the folder refuses, or the format is unknown.
    """
    if form not in FORMATS:
        raise UserError(f"unknown checkpoint format {form!r}; choose one of {', '.join(FORMATS)}")
    if not all(strings) or not all(strings.values()):
        raise ValueError("empty string among the strings of a checkpoint")
    strings = {_printable(key): _printable(text) for key, text in strings.items()}
    types = {name: stored_type(array, dtype) for name, array in tensors.items()}
    _log_larger_types(path, tensors, types, dtype)
    with replacing(path) as file:
        for chunk in _MODULES[form].chunks(tensors, strings, types):
            file.write(chunk)


def _log_larger_types(path: Path, tensors: Tensors, types: dict[str, np.dtype], dtype: str | None) -> None:
    """Log a line where tensors are not written as `dtype`."""
    larger = [name for name, own in types.items() if dtype and own.kind == "f" and own != np.dtype(dtype)]
    if larger:
        first, most = larger[0], largest(tensors[larger[0]])
        told = "%s: %d of %d tensors stay %s, for %s cannot hold their numbers; the first is %s with %.6g"
        log.warning(told, path, len(larger), len(types), types[first], dtype, escaped(first), most)


def _printable(text: str) -> str:
    """The text without lone surrogates (from undecodable file names), which no format can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _map(path: Path) -> Mapping:
    try:
        data = Mapping(path)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            data.madvise(mmap.MADV_SEQUENTIAL)  # the system reads ahead in larger pieces: half the time from a disk
        return data
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist: give the path of a .ckpt or .safetensors file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a file is wanted here") from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def _identify(data: mmap.mmap) -> str:
    head = data[:64]
    for form, module in _MODULES.items():
        if module.fits(head):
            return form
    for begin, what, advice in _FOREIGN:
        if head.lstrip().startswith(begin):
            raise FileError(f"is {what}; {advice}")
    if len(data) < 16:
        raise FileError(f"is truncated: it has only {len(data)} bytes; fetch or copy the file again")
    raise FileError(f"is no checkpoint of a kind known here: it begins with {head[:8]!r}")
