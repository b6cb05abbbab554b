"""Files of ``torch.save``, read without PyTorch and without running any program in them.

There are two containers. One is a zip archive with ``NAME/data.pkl`` and the numbers in ``NAME/data/KEY`` (PyTorch 1.6
and later). The older one is a row of pickles, followed by the numbers.

A pickle is a program for a small stack machine. ``_Machine`` is such a machine: it builds plain containers and notes
tensors, and it can neither import nor call anything. Where a pickle calls a function, a substitute in ADMITTED runs
instead. An object of any other class (a path, a date, NumPy's numbers, a program's settings) becomes an ``_Object``,
which keeps only its class's name. A file that wants to run a program is refused.

Training programs keep the parameters under a word, beside counters, averages and the optimizer's state.
``_state_dict`` finds them.

``torch.jit.save`` uses the same archive. It holds the program (``NAME/code``, which is not read) and, in data.pkl, a
tree of modules: objects of classes ``__torch__.*``. They become tables of their attributes. A tensor's name is the path
to it with dots, as in the module's state dict.
"""

from __future__ import annotations

import logging
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np

from ldm.checkpoint.arrays import BFLOAT16, FileError, Mapping, Strings, Tensors, array_at, nbytes, truncation, widened
from ldm.files import escaped

log = logging.getLogger(__name__)

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
STATE_DICTS = (  # words under which programs keep the parameters; the first that is found is taken
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "params", "weights", "unet"),
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema"),
)
DEPTH = 3  # levels of tables within tables
MAX_OPERATIONS = 10_000_000  # of one pickle; SD 1.5 with its moving average has 200,000
_TOO_LONG = f"is no checkpoint: its pickle has more than {MAX_OPERATIONS:,} operations"
MAX_PICKLE = 64 << 20  # bytes of a zip archive's data.pkl
MAX_ATTRIBUTES = 100_000  # of all TorchScript modules, each counted as often as there are paths to it
MAX_NAME = 300  # characters of the path to an attribute

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # _LEGACY_MAGIC as a pickle
_ZIP_HEAD = b"PK\x03\x04"
_SIZE_BEHIND, _SIZE_IN_EXTRA = 8, 0xFFFFFFFF  # in a zip member's header: a flag, and a value in place of the size


class _Global(NamedTuple):
    """The name of a class or a function. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Storage(NamedTuple):
    """A flat row of numbers in the file; `kind` is PyTorch's type, `dtype` NumPy's or None where it has none."""

    dtype: Any
    key: str
    count: int
    kind: str = ""


class _Tensor(NamedTuple):
    """A view of a storage; offset and stride in numbers."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module(dict):
    """A TorchScript module: its attributes by name."""


class _Object(dict):
    """A value of an unknown class, which may be a table: what the pickle put into it by key."""

    __slots__ = ("kind",)


_MARK = object()
_PARAMETERS = "torch.nn.modules.container.ParameterDict"
_OPTIMIZER = re.compile("optim|sched|scaler", re.IGNORECASE)


def fits(head: bytes) -> bool:
    """Whether a file that begins with these bytes has this format."""
    return head.startswith((_ZIP_HEAD, _LEGACY_HEAD))


def read(data: Mapping) -> tuple[Tensors, Strings]:
    """(the tensors of the state dict, the strings beside it); FileError where the file cannot be read."""
    open_container = _open_zip if data[:4] == _ZIP_HEAD else _open_legacy
    content, locate = open_container(data)
    if not isinstance(content, dict):
        raise FileError("holds no table of parameters but another object; save its state_dict()")
    table = _flat_attributes(content) if isinstance(content, _Module) else content
    strings = _text_entries(table)
    path, remark = _state_dict(table)
    if remark:
        log.info("%s: %s", data.path, remark)
    for word in path:
        table = table[word]
        strings.update(_text_entries(table))
    storages: dict[str, np.ndarray] = {}
    tensors = {}
    for name, value in table.items():
        if isinstance(name, str) and isinstance(value, _Tensor):
            tensors[name] = _tensor_view(escaped(name), value, storages, data, locate)
    return tensors, strings


def _text_entries(table: dict) -> Strings:
    return {key: text for key, text in table.items() if isinstance(key, str) and isinstance(text, str) and text}


def _state_dict(content: dict) -> tuple[tuple[str, ...], str]:
    """(the path of words to the table of parameters, a remark where other tables could be it too).

    An empty path means the content itself. A table under words of STATE_DICTS is taken where it holds no fewer tensors
    than the tables around it. Otherwise the table with the most tensors is taken.

    Raises:
        FileError: there is no table of tensors at all.
    """
    tables = _tables(content)
    counts = {path: _tensor_counts(table) for path, table in tables.items()}
    found = {path: count for path, count in counts.items() if count > (0, 0)}
    if not found:
        for path, table in tables.items():
            if isinstance(table, _Object) and {*path} <= {*STATE_DICTS}:
                raise FileError(f"holds its parameters in an object, {escaped(table.kind)}; save its state_dict()")
        return (), ""
    named = [
        path
        for path, count in found.items()
        if path and set(path) <= {*STATE_DICTS} and all(count >= counts[path[:n]] for n in range(len(path)))
    ]
    ranks = {path: [STATE_DICTS.index(word) for word in path] for path in named}
    chosen = min(named, key=ranks.get) if named else max(found, key=found.get)
    others = [
        f"{_dotted(path)} ({found[path][1]})"
        for path in found
        if path != chosen and 2 * found[path][0] >= found[chosen][0] > 0
    ]
    if not others:
        return chosen, ""
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    here = f"{_dotted(chosen)} ({found[chosen][1]} tensors)"
    return chosen, f"the parameters are taken from {here}, not from {', '.join(others[:4])}{more}"


def _tables(content: dict) -> dict[tuple[str, ...], dict]:
    """The tables in a file by the path of words to them, each once, without the tables of optimizers."""
    tables, waiting, seen = {}, [((), content)], set()
    for path, table in waiting:
        if id(table) in seen:
            continue
        seen.add(id(table))
        tables[path] = table
        if len(path) < DEPTH:
            inner = ((key, value) for key, value in table.items() if isinstance(key, str) and isinstance(value, dict))
            waiting += [((*path, key), value) for key, value in inner if not _OPTIMIZER.search(key)]
    return tables


def _tensor_counts(table: dict) -> tuple[int, int]:
    """(the tensors in a table that are no single number, all tensors in it)."""
    tensors = [value for name, value in table.items() if isinstance(name, str) and isinstance(value, _Tensor)]
    return sum(value.size != () for value in tensors), len(tensors)


def _dotted(path: tuple[str, ...]) -> str:
    return escaped(".".join(path)) if path else "its top"


def _flat_attributes(root: _Module) -> dict[str, Any]:
    """The tensors and texts in a tree of modules by dotted path, in the order of the file."""
    flat, count = {}, 0
    waiting = [iter([("", root)])]  # the attributes still to visit, of every module on the way down
    while waiting:
        path, value = next(waiting[-1], (None, None))
        if path is None:
            waiting.pop()
        elif isinstance(value, _Module):
            waiting.append(_with_paths(path, value))
        elif isinstance(value, (_Tensor, str)):
            flat[path] = value
        count += 1
        if count > MAX_ATTRIBUTES or len(waiting) > MAX_NAME:
            raise FileError("is no checkpoint: its modules are too many, or hold each other")
    return flat


def _with_paths(path: str, module: _Module) -> Iterator[tuple[str, Any]]:
    for name, value in module.items():
        if not isinstance(name, str) or len(path) + len(name) >= MAX_NAME:
            raise FileError(f"is no checkpoint: a module below {path[:80] or 'its root'} has no usable name")
        yield f"{path}.{name}" if path else name, value


def _tensor_view(
    name: str, tensor: _Tensor, storages: dict[str, np.ndarray], data: Mapping, locate: Callable[[_Storage], int]
) -> np.ndarray:
    storage, offset, size, stride = tensor
    if storage.dtype is None:
        raise _unreadable(name, storage.kind)
    sizes = (*size, *stride, offset)
    usable = all(type(n) is int and 0 <= n < 1 << 62 for n in sizes) and math.prod(n for n in size if n) < 1 << 60
    if len(size) != len(stride) or len(size) > 32 or not usable:
        raise FileError(f"is damaged: {name} has no usable shape")
    stride = [
        0 if n == 1 else step for n, step in zip(size, stride)
    ]  # along an axis of length 1 the stride has no meaning
    count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride))
    if count > storage.count or (count and last >= storage.count) or offset > storage.count:
        raise FileError(f"is damaged: {name}, shape {list(size)}, reaches beyond its {storage.count} numbers")
    if not count:
        return array_at(b"", storage.dtype if storage.dtype != BFLOAT16 else np.dtype("<f4"), list(size), 0)
    if storage.key not in storages:
        # Widened once for all tensors that share the storage.
        storages[storage.key] = widened(array_at(data, storage.dtype, [storage.count], locate(storage)))
    flat = storages[storage.key][offset:]
    return np.lib.stride_tricks.as_strided(flat, size, [step * flat.itemsize for step in stride])


def _unreadable(name: str, kind: str) -> FileError:
    return FileError(f"holds {name} as {escaped(kind)}, which is not read here: convert it to float32 or float16")


# ---- the two containers ----


def _open_zip(data: Mapping) -> tuple[Any, Callable[[_Storage], int]]:
    """(the content of data.pkl, a function from a storage to the place of its numbers)."""
    places, end = _zip_directory(data)
    pickles = [name for name in places if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FileError("is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    folder = pickles[0][: -len("data.pkl")]

    def place(name: str) -> tuple[int, int]:
        """(start, size) of a member; FileError where it is compressed or encrypted."""
        member, name = places.get(name), escaped(name)
        if member is None:
            raise FileError(f"is damaged: {name} is missing in its archive")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise FileError(f"is a repacked archive: {name} is compressed or encrypted; unpack it and zip it with -0")
        start = _content_start(data, member, name)
        if start + member.file_size > end:
            raise FileError(f"is damaged: {name} ends behind the archive's members")
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
            raise FileError(f"is damaged: {escaped(name)} has {size} bytes for {storage.count} numbers")
        return start

    return _Machine().run(data[start : start + size]), locate


def _zip_directory(data: Mapping) -> tuple[dict[str, zipfile.ZipInfo], int]:
    """(the members of an archive by name, the place behind the last of them)."""
    try:
        with zipfile.ZipFile(data) as archive:
            members, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError) as error:
        raise FileError(f"is truncated or damaged: {escaped(error)}; fetch or copy the file again") from None
    places = {member.filename: member for member in members}
    if len(places) < len(members):
        raise FileError("is damaged: its archive holds a name twice")
    return places, end


def _content_start(data: Mapping, member: zipfile.ZipInfo, name: str) -> int:
    """The place where a member's bytes begin; FileError where its header and the archive's directory disagree."""
    header = data[member.header_offset : member.header_offset + 30]
    if len(header) < 30 or header[:4] != _ZIP_HEAD:
        raise FileError(f"is damaged: {name} is not where its archive says")
    flags, packing, size, length, extra = struct.unpack("<6x2H12xI2H", header)
    start = member.header_offset + 30 + length
    own = data[member.header_offset + 30 : start]
    same_size = bool(flags & _SIZE_BEHIND) or size in (member.file_size, _SIZE_IN_EXTRA)
    if own not in _spellings(member.orig_filename) or packing != member.compress_type or not same_size:
        raise FileError(f"is damaged: {name} is not what its archive's directory says")
    return start + extra


def _spellings(name: str) -> list[bytes]:
    """The bytes that zipfile may have read a member's name from."""
    return [name.encode(encoding, "ignore") for encoding in ("utf-8", "cp437")]


def _open_legacy(data: Mapping) -> tuple[Any, Callable[[_Storage], int]]:
    """(the content, a function from a storage to the place of its numbers).

    The file is a row of pickles: magic number, protocol, facts of the machine, the content, the storages' keys. Then
    come count and numbers of each storage.
    """
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
        stored = machine.storages[key]
        if stored.dtype is None:
            raise _unreadable("numbers", stored.kind)
        start += 8 + nbytes(stored.dtype, [count])
        if start > len(data):
            raise truncation(start, len(data))

    def locate(storage: _Storage) -> int:
        start, count = places.get(storage.key, (0, -1))
        if count != storage.count:
            key = escaped(storage.key)
            raise FileError(f"is damaged: storage {key} has {count} numbers instead of {storage.count}")
        return start

    return content, locate


# ---- the stack machine ----


def _rebuild_tensor(storage, offset, size, stride, *_):
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise FileError("is damaged: a tensor without numbers")
    return _Tensor(storage, offset, size, stride)


def _rebuild_untyped(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
    """A tensor of a type that is newer than PyTorch's typed storages, for instance float8."""
    return _rebuild_tensor(_Storage(None, "", 0, str(dtype)), offset, size, stride)


def _rebuild_subclass(function, kind, arguments, *_):
    """A tensor with attributes of its own, or of a class of its own, which any function may have made."""
    rebuild = ADMITTED.get(function) if isinstance(function, _Global) else None
    return _unreadable_tensor(kind) if rebuild is None else rebuild(*arguments)


def _unreadable_tensor(kind: Any) -> _Tensor:
    return _Tensor(_Storage(None, "", 0, str(kind)), 0, (1,), (1,))


def _first_argument(value, *_):
    return value


def _make_table(pairs=(), *_):
    table: dict = {}
    for pair in pairs if isinstance(pairs, list) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            _set_item(table, *pair)
    return table


def _get_attribute(owner=None, name=None, *_):
    """An attribute of an unknown class or object: Python pickles an enumeration's member or a method so."""
    if not isinstance(owner, (_Global, _Object)) or not isinstance(name, str):
        raise _refusal(_Global("builtins", "getattr"))
    return _object(owner)


def _object(kind: Any = "") -> _Object:
    made = _Object()
    made.kind = kind.kind if isinstance(kind, _Object) else str(kind)
    return made


# The substitutes for functions that a file may call: they make the tensors and tables that are wanted.
ADMITTED: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_subclass,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("torch._utils", "_rebuild_parameter"): _first_argument,
    ("torch._utils", "_rebuild_parameter_with_state"): _first_argument,
    ("torch", "Size"): _first_argument,
    ("collections", "OrderedDict"): _make_table,
    **{(builtins, "getattr"): _get_attribute for builtins in ("builtins", "__builtin__")},
    **{("torch.jit._pickle", f"build_{kind}list"): _first_argument for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _first_argument,
}
# Nothing is ever called. But a file that asks for one of these is more than a checkpoint, and its user should know.
_RUNS = re.compile(
    r"(os|nt|posix|sys|subprocess|importlib|runpy|pty|ctypes|socket|shutil|commands|code|codeop|types|marshal|_?pickle"
    r"|operator|webbrowser|timeit|bdb|pdb|c?[pP]rofile|pip|asyncio|multiprocessing|threading|urllib|requests)(\.|$)"
    r"|(__builtin__|builtins)\.(?!(set|frozenset|bytearray|complex|slice|x?range|object|list|dict|tuple|int|float|str"
    r"|bytes|bool|long|unicode|getattr|\w+(Error|Exception|Warning))$)"
)


def _substitute(function: Any, arguments: Any) -> Callable:
    """The substitute for the function of a call; FileError where the call would run a program."""
    named = [thing for thing in (function, *arguments) if isinstance(thing, _Global)]
    harm = next((thing for thing in named if _RUNS.match(str(thing))), None)
    if harm or not isinstance(function, (_Global, _Object)):
        raise _refusal(harm or function)
    if isinstance(function, _Object):
        return lambda *_: _object()
    if function.module.split(".")[0] == "__torch__":  # TorchScript's module of the classes that the file defines
        return lambda *_: _Module()
    if function in ADMITTED:
        return ADMITTED[function]
    if function.module.startswith("torch.") and function.name.startswith("_rebuild"):
        return lambda *_: _unreadable_tensor(function)
    return lambda *_: _object(function)


def _refusal(function: Any) -> FileError:
    named = escaped(function) if isinstance(function, _Global) else "an object"
    return FileError(
        f"wants to call {named}, which no checkpoint needs; nothing of it was run. "
        "If you trust the file, load it in PyTorch and save its tensors as .safetensors"
    )


def _set_item(table: dict, key: Any, value: Any) -> None:
    if isinstance(key, (str, int, float, bytes, _Global)):  # no keys whose hash could take for ever
        table[key] = value


class _Machine:
    """Runs pickles; ``storages`` are all storages that the pickles name, by key."""

    def __init__(self):
        self.storages: dict[str, _Storage] = {}
        self.work = 0

    def run(self, source: bytes | Mapping) -> Any:
        """The object that the pickle at the source's place describes.

        Raises:
            FileError: the pickle is cut off or damaged, or would run a program.
        """
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):
                if count > MAX_OPERATIONS:
                    raise FileError(_TOO_LONG)
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
            raise FileError(f"is truncated or damaged: its pickle is not readable ({escaped(error)})") from None
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
        elif name == "INST":
            self.call(_Global(*argument.split(" ", 1)), self.since_mark())
        elif name not in ("PROTO", "FRAME"):
            raise FileError(f"holds the pickle operation {name}, which is not read here; save it as .safetensors")

    def since_mark(self) -> list:
        """Take the last mark off the stack with the values above it; returns the values."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:  # IndexError where there is none
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def take(self, count: int) -> list:
        """Take `count` values off the stack; ValueError where there are fewer."""
        if count > len(self.stack):
            raise ValueError("empty stack")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def spend(self, values: Sized) -> None:
        """Count the values that one operation works on: a file can use the same values again and again."""
        self.work += len(values)
        if self.work > MAX_OPERATIONS:
            raise FileError(_TOO_LONG)

    def call(self, function: Any, arguments: list | tuple) -> None:
        for values in (arguments, *arguments[:1]):
            if isinstance(values, (list, tuple, dict)):
                self.spend(values)
        self.stack.append(_substitute(function, arguments)(*arguments))

    def construct(self, words: list) -> None:
        """Call a class with arguments, as the oldest pickles have them: [class, argument, ...]."""
        self.call(words[0], words[1:])

    def storage(self) -> None:
        """Replace a persistent id, (a word, type, key, device, count), by the storage that it means."""
        (persistent,) = self.take(1)
        if persistent[0] == "module":  # an object's class, and the class's source
            self.stack.append(persistent[1])
            return
        mark, kind, key, _, count, *view = persistent
        if mark != "storage" or not isinstance(kind, _Global):
            raise ValueError("storage")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 62:
            raise ValueError("storage")
        if any(part is not None for part in view):
            raise FileError("is a file of PyTorch before 0.4, which is not read here; save it anew")
        stored = _Storage(TYPES.get(kind.name), key, count, str(kind))
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
        """Set an object's state, for modules (their attributes) and ParameterDicts (their parameters)."""
        (state,) = self.take(1)
        table = self.stack[-1]
        if isinstance(table, _Object) and table.kind == _PARAMETERS and isinstance(state, dict):
            state = state.get("_parameters")
        elif not isinstance(table, _Module):
            return
        if isinstance(state, dict):
            self.spend(state)
            table.update(state)

    def push_unread(self) -> None:
        """Replace the values since the last mark, which are not read, by an empty object."""
        self.since_mark()
        self.push(_object())

    def push(self, value: Any) -> None:
        self.stack.append(value)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
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
    "DICT": lambda m: m.push(_make_table(list(_pairs(m.since_mark())))),
    "SETITEM": lambda m: m.set_items(m.take(2)),
    "SETITEMS": lambda m: m.set_items(m.since_mark()),
    "EMPTY_SET": lambda m: m.push(_object()),
    "ADDITEMS": lambda m: m.since_mark(),
    "FROZENSET": lambda m: m.push_unread(),
    "STACK_GLOBAL": lambda m: m.push(_Global(*map(_checked_name, m.take(2)))),
    "REDUCE": lambda m: m.call(*m.take(2)),
    "NEWOBJ": lambda m: m.call(*m.take(2)),
    "NEWOBJ_EX": lambda m: m.call(*m.take(3)[:2]),
    "OBJ": lambda m: m.construct(m.since_mark()),
    "BUILD": lambda m: m.build(),
    "BINPERSID": lambda m: m.storage(),
}


def _checked_name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is no text")
    return value


def _pairs(values: list) -> Iterator[tuple]:
    return zip(values[::2], values[1::2])
