"""torch.save's two containers, written without PyTorch."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np

STORAGES = {
    "<f4": "FloatStorage",
    "<f2": "HalfStorage",
    "<f8": "DoubleStorage",
    "<i8": "LongStorage",
    "|b1": "BoolStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


class Saved:
    """A tensor as torch.save sees it: a view of a flat array."""

    def __init__(self, flat, size, stride, offset=0, kind=None):
        self.flat, self.size, self.stride, self.offset = flat, size, stride, offset
        self.kind = kind or STORAGES[flat.dtype.str]

    def __reduce__(self):
        import torch._utils

        return torch._utils._rebuild_tensor_v2, (
            self.storage(),
            self.offset,
            self.size,
            self.stride,
            False,
            OrderedDict(),
        )

    def storage(self):
        return Stored(self.flat, self.kind)


class Stored:
    def __init__(self, flat, kind):
        self.flat, self.kind = flat, kind


def torch_names():
    """Modules with what a pickler looks up when it writes a name; none of it is there when the file is read."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2():
        raise AssertionError("called")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2, torch._utils = _rebuild_tensor_v2, utils
    for name in (*STORAGES.values(), "BFloat16Storage", "ComplexFloatStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    return {"torch": torch, "torch._utils": utils}


def contiguous(array):
    strides = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides)
    return Saved(array.reshape(-1), array.shape, strides if array.ndim else ())


def dump(content, legacy=False, protocol=2):
    """(pickle, storages in order of their keys)."""
    stored, out = {}, io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, Stored):
                return None
            key, _ = stored.setdefault(id(thing.flat), (str(len(stored)), thing.flat))
            view = (None,) if legacy else ()
            return ("storage", getattr(sys.modules["torch"], thing.kind), key, "cpu", thing.flat.size, *view)

    Pickler(out, protocol).dump(content)
    return out.getvalue(), dict(stored.values())


def save_zip(path, content, pickled=None, compression=zipfile.ZIP_STORED, **extra):
    data, storages = dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data if pickled is None else pickled)
        archive.writestr("archive/byteorder", "little")
        for key, flat in storages.items():
            archive.writestr(f"archive/data/{key}", flat.tobytes())
        for name, text in extra.items():
            archive.writestr(f"archive/{name}", text)


def save_legacy(path, content):
    data, storages = dump(content, legacy=True)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [pickle.dumps(part, 2) for part in (MAGIC, 1001, system)] + [data, pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", flat.size) + flat.tobytes() for flat in storages.values()]
    path.write_bytes(b"".join(parts))


SAVERS = {"zip": save_zip, "legacy": save_legacy}
