"""What ``torch.save`` writes, read without PyTorch and without running anything that the file says.

Two containers: a zip archive with ``NAME/data.pkl`` and the numbers in ``NAME/data/KEY`` (PyTorch 1.6 and later), and
the older row of pickles with the numbers behind it. A pickle is a program for a small stack machine; ``_Machine`` is
such a machine that builds plain containers, notes tensors, and knows no way to import or to call. What a pickle calls
must be in ADMITTED, otherwise the file is refused; a class that is only named is a word.

``torch.jit.save`` uses the same archive, with the program beside it (``NAME/code``, never looked at) and a tree of
modules in data.pkl: objects of classes ``__torch__.*``. They become tables of their attributes, and a tensor's name is
the path to it with dots, as in the module's state dict.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ldm.checkpoint.arrays import BFLOAT16, FileError, Strings, Tensors, array_at, nbytes, truncation, widened

TYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("bool"),
}
STATE_DICTS = ("state_dict", "model", "module")  # where training frameworks keep the parameters
MAX_OPERATIONS = 10_000_000  # of one pickle; SD 1.5 with its moving average has 200,000
MAX_PICKLE = 64 << 20  # bytes of a zip archive's data.pkl
MAX_ATTRIBUTES = 100_000  # of all TorchScript modules, each counted as often as there are paths to it
MAX_NAME = 300  # characters of such a path

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # that number as a pickle
_ZIP_HEAD = b"PK\x03\x04"


class _Global(NamedTuple):
    """The name of something importable. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Storage(NamedTuple):
    """A flat row of numbers somewhere in the file."""

    dtype: Any
    key: str
    count: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and stride in numbers."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module(dict):
    """A TorchScript module: its attributes by name."""


_MARK, _OPAQUE = object(), object()  # _OPAQUE: a value that is of no use here


def fits(head: bytes) -> bool:
    """Whether a file that begins so is one of these."""
    return head.startswith((_ZIP_HEAD, _LEGACY_HEAD))


def read(data: mmap.mmap) -> tuple[Tensors, Strings]:
    """The tensors of the state dict, and the strings beside it."""
    content, locate = (_open_zip if data[:4] == _ZIP_HEAD else _open_legacy)(data)
    if not isinstance(content, dict):
        raise FileError("holds no table of parameters but another object; save its state_dict()")
    if isinstance(content, _Module):
        content = _flat(content)
    strings = {key: text for key, text in content.items() if isinstance(key, str) and isinstance(text, str) and text}
    if not any(isinstance(value, _Tensor) for value in content.values()):
        content = next((content[key] for key in STATE_DICTS if isinstance(content.get(key), dict)), content)
    storages: dict[str, np.ndarray] = {}
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, _Tensor):
            tensors[name] = _view(name, value, storages, data, locate)
    return tensors, strings


def _flat(root: _Module) -> dict[str, Any]:
    """The tensors and texts of a tree of modules, by dotted path and in the order of the file."""
    flat, count = {}, 0
    waiting = [iter([("", root)])]  # the attributes still to come, of every module on the way down
    while waiting:
        path, value = next(waiting[-1], (None, None))
        if path is None:
            waiting.pop()
        elif isinstance(value, _Module):
            waiting.append(_paths(path, value))
        elif isinstance(value, (_Tensor, str)):
            flat[path] = value
        count += 1
        if count > MAX_ATTRIBUTES or len(waiting) > MAX_NAME:
            raise FileError("is no checkpoint: its modules are too many, or hold each other")
    return flat


def _paths(path: str, module: _Module) -> Iterator[tuple[str, Any]]:
    for name, value in module.items():
        if not isinstance(name, str) or len(path) + len(name) >= MAX_NAME:
            raise FileError(f"is no checkpoint: a module below {path[:80] or 'its root'} has no usable name")
        yield f"{path}.{name}" if path else name, value


def _view(
    name: str, tensor: _Tensor, storages: dict[str, np.ndarray], data: mmap.mmap, locate: Callable[[_Storage], int]
) -> np.ndarray:
    storage, offset, size, stride = tensor
    sizes = (*size, *stride, offset)
    if len(size) != len(stride) or len(size) > 32 or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
        raise FileError(f"is damaged: {name} has no usable shape")
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if count > storage.count or (count and last >= storage.count) or offset > storage.count:
        raise FileError(f"is damaged: {name}, shape {list(size)}, reaches beyond its {storage.count} numbers")
    if storage.key not in storages:
        # Widened here, once: of all the tensors that share a storage each would be a copy.
        storages[storage.key] = widened(array_at(data, storage.dtype, [storage.count], locate(storage)))
    flat = storages[storage.key][offset:]
    if not count:
        return flat[:0].reshape(size)
    return np.lib.stride_tricks.as_strided(flat, size, [step * flat.itemsize for step in stride])


# ---- the two containers ----


def _open_zip(data: mmap.mmap) -> tuple[Any, Callable[[_Storage], int]]:
    """(what data.pkl holds, storage -> where its numbers are)."""
    try:
        with zipfile.ZipFile(data) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        raise FileError(f"is truncated or damaged: {error}; fetch or copy the file again") from None
    places = {member.filename: member for member in members}
    if len(places) < len(members):
        raise FileError("is damaged: its archive holds a name twice")
    pickles = [name for name in places if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FileError("is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    folder = pickles[0][: -len("data.pkl")]

    def place(name: str) -> tuple[int, int]:
        """(start, size) of a member, which must lie in the file as it is."""
        member = places.get(name)
        if member is None:
            raise FileError(f"is damaged: {name} is missing in its archive")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise FileError(f"is a repacked archive: {name} is compressed or encrypted; unpack it and zip it with -0")
        header = data[member.header_offset : member.header_offset + 30]
        if len(header) < 30 or header[:4] != _ZIP_HEAD:
            raise FileError(f"is damaged: {name} is not where its archive says")
        start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + member.file_size > len(data):
            raise FileError(f"is damaged: {name} ends behind the file")
        return start, member.file_size

    if folder + "byteorder" in places:
        start, size = place(folder + "byteorder")
        if data[start : start + min(size, 16)] != b"little":
            raise FileError("was written on a big-endian machine; convert it there to .safetensors")
    start, size = place(pickles[0])
    if size > MAX_PICKLE:
        raise FileError(f"is damaged: its data.pkl has {size} bytes")

    def locate(storage: _Storage) -> int:
        name = f"{folder}data/{storage.key}"
        start, size = place(name)
        if size != nbytes(storage.dtype, [storage.count]):
            raise FileError(f"is damaged: {name} has {size} bytes for {storage.count} numbers")
        return start

    return _Machine().run(data[start : start + size]), locate


def _open_legacy(data: mmap.mmap) -> tuple[Any, Callable[[_Storage], int]]:
    """Magic number, protocol, the machine, the object, the storages' keys; then count and numbers of each storage."""
    data.seek(0)
    machine = _Machine()
    magic, _, system, content, keys = [machine.run(data) for _ in range(5)]
    if magic != _LEGACY_MAGIC or not isinstance(system, dict) or not isinstance(keys, list):
        raise FileError("is damaged: it begins like torch.save's older format and goes on otherwise")
    if system.get("little_endian") is False:
        raise FileError("was written on a big-endian machine; convert it there to .safetensors")
    start, places = data.tell(), {}
    for key in keys:
        if not isinstance(key, str) or key not in machine.storages:
            raise FileError("is damaged: it holds numbers that nothing in it names")
        count = int.from_bytes(data[start : start + 8], "little")
        places[key] = start + 8, count
        start += 8 + nbytes(machine.storages[key].dtype, [count])
        if start > len(data):
            raise truncation(start, len(data))

    def locate(storage: _Storage) -> int:
        start, count = places.get(storage.key, (0, -1))
        if count != storage.count:
            raise FileError(f"is damaged: storage {storage.key} has {count} numbers instead of {storage.count}")
        return start

    return content, locate


# ---- the stack machine ----


def _rebuild_tensor(storage, offset, size, stride, *_):
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise FileError("is damaged: a tensor without numbers")
    return _Tensor(storage, offset, size, stride)


def _first(value, *_):
    return value


def _table(pairs=(), *_):
    table: dict = {}
    for pair in pairs if isinstance(pairs, list) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            _set_item(table, *pair)
    return table


def _opaque(*_):
    return _OPAQUE


def _module(*_):
    return _Module()


# What a file may call, and what is done instead. Tensors and tables are what is wanted; the rest are numbers and
# settings that training frameworks leave beside them.
ADMITTED: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): _first,
    ("collections", "OrderedDict"): _table,
    ("collections", "defaultdict"): _opaque,
    ("torch", "device"): _opaque,
    ("numpy.core.multiarray", "scalar"): _opaque,
    ("numpy._core.multiarray", "scalar"): _opaque,
    ("numpy", "dtype"): _opaque,
    ("_codecs", "encode"): _opaque,
    **{(builtins, kind): _opaque for builtins in ("builtins", "__builtin__") for kind in ("set", "frozenset")},
    **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _first,
}


def _admitted(function: Any) -> Callable | None:
    """What to do instead of a call; None where there is no such thing and the file is refused."""
    if not isinstance(function, _Global):
        return None
    if function.module.split(".")[0] == "__torch__":  # where TorchScript puts the classes that a file defines itself
        return _module
    return ADMITTED.get(tuple(function))


def _set_item(table: dict, key: Any, value: Any) -> None:
    if isinstance(key, (str, int, float, bytes, _Global)):  # nothing whose hash could take for ever
        table[key] = value


class _Machine:
    """Runs pickles; ``storages`` are all that they named."""

    def __init__(self):
        self.storages: dict[str, _Storage] = {}

    def run(self, source: bytes | mmap.mmap) -> Any:
        """What the pickle at the source's place describes.

        Raises:
            FileError: it is cut off or damaged, or calls what is not admitted.
        """
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):
                if count > MAX_OPERATIONS:
                    raise FileError(f"is no checkpoint: its pickle has more than {MAX_OPERATIONS:,} operations")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
            raise FileError(f"is truncated or damaged: its pickle is not readable ({str(error)[:80]})") from None
        raise FileError("is truncated or damaged: its pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _BUILDERS:
            _BUILDERS[name](self)
        elif name == "GLOBAL":
            stack.append(_Global(*argument.split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            raise FileError(f"holds the pickle operation {name}, which is not read here; save it as .safetensors")

    def since_mark(self) -> list:
        """What was pushed since the last mark, taken away with it."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:  # IndexError where there is none
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def take(self, count: int) -> list:
        if count > len(self.stack):
            raise ValueError("empty stack")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def call(self) -> None:
        function, arguments = self.take(2)
        instead = _admitted(function)
        if instead is None:
            raise FileError(
                f"wants to call {_named(function)}, which no checkpoint needs; nothing of it was run. "
                "If you trust the file, load it in PyTorch and save its tensors as .safetensors"
            )
        self.stack.append(instead(*arguments))

    def storage(self) -> None:
        ((mark, kind, key, _, count, *view),) = self.take(1)
        if mark != "storage" or not isinstance(kind, _Global) or kind.name not in TYPES:
            raise FileError(
                f"holds numbers as {_named(kind)}, which is not read here: convert it to float32 or float16"
            )
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 62:
            raise ValueError("storage")
        if any(part is not None for part in view):
            raise FileError("is a file of PyTorch before 0.4, which is not read here; save it anew")
        stored = _Storage(TYPES[kind.name], key, count)
        self.storages.setdefault(key, stored)
        self.stack.append(stored)

    def append(self, values: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def set_items(self, values: list) -> None:
        table = self.stack[-1]
        if isinstance(table, dict):
            for key, value in zip(values[::2], values[1::2]):
                _set_item(table, key, value)

    def build(self) -> None:
        """An object's state: a module's attributes; of no use to what is a plain container here."""
        (state,) = self.take(1)
        if isinstance(self.stack[-1], _Module) and isinstance(state, dict):
            self.stack[-1].update(state)

    def push(self, value: Any) -> None:
        self.stack.append(value)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_BUILDERS: dict[str, Callable[[_Machine], None]] = {
    "POP": lambda m: m.take(1),
    "POP_MARK": lambda m: m.since_mark(),
    "DUP": lambda m: m.push(m.stack[-1]),
    "EMPTY_LIST": lambda m: m.push([]),
    "LIST": lambda m: m.push(m.since_mark()),
    "APPEND": lambda m: m.append(m.take(1)),
    "APPENDS": lambda m: m.append(m.since_mark()),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE": lambda m: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m: m.push(tuple(m.take(1))),
    "TUPLE2": lambda m: m.push(tuple(m.take(2))),
    "TUPLE3": lambda m: m.push(tuple(m.take(3))),
    "EMPTY_DICT": lambda m: m.push({}),
    "DICT": lambda m: m.push(_table(list(_pairs(m.since_mark())))),
    "SETITEM": lambda m: m.set_items(m.take(2)),
    "SETITEMS": lambda m: m.set_items(m.since_mark()),
    "EMPTY_SET": lambda m: m.push(_OPAQUE),
    "ADDITEMS": lambda m: m.since_mark(),
    "FROZENSET": lambda m: (m.since_mark(), m.push(_OPAQUE)),
    "STACK_GLOBAL": lambda m: m.push(_Global(*map(_word, m.take(2)))),
    "REDUCE": lambda m: m.call(),
    "NEWOBJ": lambda m: m.call(),
    "BUILD": lambda m: m.build(),
    "BINPERSID": lambda m: m.storage(),
}


def _named(value: Any) -> str:
    return str(value) if isinstance(value, _Global) else "an object"


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value


def _pairs(values: list) -> Iterator[tuple]:
    return zip(values[::2], values[1::2])
