"""Files of torch.save, written here without PyTorch and read without it; and files that mean harm."""

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import pickletools
import re
import struct
import sys
import types
import uuid
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
from torch_save import SAVERS, Saved, contiguous, dump, save_zip, torch_names

from ldm import checkpoint
from ldm.checkpoint import formats
from ldm.errors import UserError


@pytest.fixture(autouse=True)
def torch_stub(monkeypatch):
    if "torch" in sys.modules:
        pytest.skip("PyTorch is loaded; tests/parity has the same with it")
    for name, module in torch_names().items():
        monkeypatch.setitem(sys.modules, name, module)


def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 4, 2)).astype(np.float32),
        "a.bias": rng.standard_normal(3).astype(np.float16),
        "steps": np.array(7, np.int64),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda t: {"state_dict": t, "epoch": 3}])
def test_every_tensor_comes_out(tmp_path, kind, wrap):
    expected = tensors()
    SAVERS[kind](tmp_path / "t.ckpt", wrap({name: contiguous(array) for name, array in expected.items()}))
    read, _, found = formats.read(tmp_path / "t.ckpt")
    assert found == "pytorch"
    assert list(read) == list(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype and np.array_equal(read[name], array), name


@pytest.mark.parametrize("kind", SAVERS)
def test_views_of_one_storage(tmp_path, kind):
    flat = np.arange(24, dtype=np.float32)
    views = {
        "all": Saved(flat, (4, 6), (6, 1)),
        "transposed": Saved(flat, (6, 4), (1, 6)),
        "part": Saved(flat, (2, 3), (6, 1), offset=7),
    }
    SAVERS[kind](tmp_path / "t.pt", views)
    read = formats.read(tmp_path / "t.pt")[0]
    whole = flat.reshape(4, 6)
    for name, expected in {"all": whole, "transposed": whole.T, "part": whole[1:3, 1:4]}.items():
        assert np.array_equal(read[name], expected)


@pytest.mark.parametrize("kind", SAVERS)
def test_bfloat16_is_widened(tmp_path, kind):
    halves = np.array([0x3F80, 0xC000, 0x4049], np.uint16)
    SAVERS[kind](tmp_path / "t.pt", {"w": Saved(halves, (3,), (1,), kind="BFloat16Storage")})
    assert formats.read(tmp_path / "t.pt")[0]["w"].tolist() == [1.0, -2.0, 3.140625]


def test_what_training_frameworks_leave_beside_the_weights(tmp_path):
    content = {
        "state_dict": OrderedDict(w=contiguous(np.ones(2, np.float32))),
        "callbacks": {OrderedDict: {"best": np.float64(0.5), "names": {"a", "b"}, "bytes": b"x"}},
        "prediction_type": "v_prediction",
        "hyper_parameters": [1, 2.5, None, True, (1, 2, 3, 4), frozenset({1})],
    }
    save_zip(tmp_path / "t.ckpt", content)
    loaded = checkpoint.load(tmp_path / "t.ckpt")
    assert list(loaded.tensors) == ["w"]
    assert loaded.meta["prediction_type"] == "v"


def weights(n, *names):
    return OrderedDict((name, contiguous(np.full(2, n, np.float32))) for name in names or ("a.weight", "a.bias"))


NUMBER = contiguous(np.array(500, np.int64))


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize(
    ("content", "remark"),
    [
        ({"state_dict": weights(1), "global_step": NUMBER}, None),
        ({"global_step": NUMBER, "lr": NUMBER, "model_state_dict": weights(1, "w")}, None),
        ({"model": weights(1), "ema": weights(2), "step": 3}, r"from model \(2 tensors\), not from ema \(2\)"),
        (
            {"ema": {"module": weights(2)}, "model": {"module": weights(1)}},
            r"from model\.module .* not from ema\.module",
        ),
        ({"module": {"state_dict": weights(1)}, "optimizer": {"m": weights(2, *"abcdefg")}}, None),
        ({"optimizer_state_dict": {"state": {0: weights(2)}}, "net": weights(1)}, None),
        ({"generator": weights(1, *"abc"), "discriminator": weights(2)}, r"from generator \(3 tensors\)"),
        ({**weights(1, *"abc"), "model": weights(2)}, r"from its top \(3 tensors\), not from model \(2\)"),
        ({"state_dict": {"steps": NUMBER}}, None),
    ],
)
def test_parameters_are_found_by_what_a_table_holds(tmp_path, caplog, kind, content, remark):
    SAVERS[kind](tmp_path / "t.pt", content)
    with caplog.at_level("INFO"):
        read = formats.read(tmp_path / "t.pt")[0]
    assert {tuple(array.reshape(-1)) for array in read.values()} in ({(1.0, 1.0)}, {(500,)})
    if remark:
        assert re.search(r"t\.pt: the parameters are taken " + remark, caplog.text)
    else:
        assert caplog.text == ""


def test_texts_around_the_parameters_are_kept(tmp_path):
    save_zip(tmp_path / "t.pt", {"name": "x", "model": {"prediction_type": "v", "state_dict": weights(1)}})
    assert formats.read(tmp_path / "t.pt")[1] == {"name": "x", "prediction_type": "v"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module.", "_orig_mod.module."])
def test_wrappers_around_a_network_are_no_part_of_its_names(tmp_path, prefix):
    names = [f"{prefix}model.diffusion_model.out.2.weight", f"{prefix}first_stage_model._orig_mod.decoder.conv_in.bias"]
    save_zip(tmp_path / "t.pt", {"state_dict": weights(1, *names)})
    read = checkpoint.load(tmp_path / "t.pt").tensors
    assert list(read) == ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.bias"]
    save_zip(tmp_path / "t.pt", weights(1, "model.x", f"{prefix}model.x"))
    refused(tmp_path / "t.pt", "holds model.x twice")


class Settings(dict):
    """A program's own class, which is not there when the file is read."""


class Mode(enum.Enum):
    FAST = 1


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
def test_values_of_any_class_are_passed_over(tmp_path, protocol):
    settings = Settings(rate=contiguous(np.zeros((2, 2), np.float32)))
    settings.note = "x"
    content = {
        "numbers": [np.float64(0.5), np.int64(3), np.bool_(True), np.ones(3), np.dtype("f4"), np.array(["x"])],
        "arguments": argparse.Namespace(path=pathlib.PurePosixPath("/x"), at=datetime.datetime(2024, 1, 1), c=1 + 2j),
        "others": [datetime.timedelta(3), decimal.Decimal("1.5"), fractions.Fraction(1, 3), uuid.uuid4(), range(3)],
        "more": [Mode.FAST, collections.Counter("abc"), collections.deque([1]), bytearray(b"x"), slice(1), {1, 2}],
        "best": defaultdict(list, a=[1]),
        "settings": {"deep": {"deeper": {"deepest": settings}}},
        "model": defaultdict(list, weights(1)),
    }
    data, _ = dump(content, protocol=protocol)
    save_zip(tmp_path / "t.pt", content, pickled=data)
    assert {name: array.tolist() for name, array in formats.read(tmp_path / "t.pt")[0].items()} == {
        "a.weight": [1, 1],
        "a.bias": [1, 1],
    }


def test_a_whole_object_in_place_of_its_table(tmp_path):
    save_zip(tmp_path / "t.pt", {"model": argparse.Namespace(weights=weights(1)), "epoch": 3})
    refused(tmp_path / "t.pt", r"holds its parameters in an object, argparse\.Namespace; save its state_dict\(\)")


def test_tensors_of_other_kinds_are_never_dropped(tmp_path, monkeypatch):
    """Passed over beside the parameters, refused by name among them."""
    odd = Saved(np.zeros(2, np.float32), (2,), (1,), kind="ComplexFloatStorage")
    save_zip(tmp_path / "t.pt", {"state_dict": weights(1), "fft": {"odd": odd}})
    assert list(formats.read(tmp_path / "t.pt")[0]) == ["a.weight", "a.bias"]
    float8 = type("float8_e4m3fn", (), {"__module__": "torch"})
    monkeypatch.setattr(sys.modules["torch"], "float8_e4m3fn", float8, raising=False)
    for name, word in (
        ("_rebuild_tensor_v3", r"torch\.float8_e4m3fn"),
        ("_rebuild_qtensor", r"torch\._utils\._rebuild_qtensor"),
        ("_rebuild_wrapper_subclass", r"torch\._utils\._rebuild_wrapper_subclass"),
    ):
        rebuild = types.FunctionType((lambda: None).__code__, {}, name)
        rebuild.__module__, rebuild.__qualname__ = "torch._utils", name
        monkeypatch.setattr(sys.modules["torch._utils"], name, rebuild, raising=False)
        odd = Calls(rebuild, contiguous(np.zeros(2, np.float32)).storage(), 0, (2,), (1,), False, OrderedDict(), float8)
        save_zip(tmp_path / "t.pt", {**weights(1), "odd": odd})
        refused(tmp_path / "t.pt", f"holds odd as {word}, which is not read here")


# ---- TorchScript ----


def script_module(state=None, reduce=False, place="__torch__.model", **attributes):
    """An object as torch.jit.save writes it: class, NEWOBJ (or REDUCE), table of attributes, BUILD."""
    kind = type("Net", (), {"__module__": place})
    if reduce:
        kind.__reduce__ = lambda self: (kind, (), self.__dict__)
    if state is not None:
        kind.__getstate__ = lambda self: state
    module = kind()
    module.__dict__.update(attributes)
    return module


def save_script(path, content):
    """data.pkl as torch.jit.save writes it, and a program beside it that nobody may look at."""

    def classes(thing, seen):
        if id(thing) not in seen and hasattr(thing, "__dict__") and type(thing).__name__ == "Net":
            seen[id(thing)] = type(thing)
            for value in thing.__dict__.values():
                classes(value, seen)
        return seen

    with pytest.MonkeyPatch.context() as patch:
        for number, kind in enumerate(classes(content, {}).values()):  # the pickler looks every class up by its name
            kind.__qualname__ = kind.__name__ = f"Net{number}"
            for name in (kind.__module__.split(".")[0], kind.__module__):
                patch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
            setattr(sys.modules[kind.__module__], kind.__name__, kind)
        save_zip(path, content, **{"code/__torch__.py": "raise SystemExit", "version": "3"})


@pytest.mark.parametrize("reduce", [False, True])
def test_a_scripted_module_is_its_state_dict(tmp_path, reduce):
    expected = tensors()
    block = script_module(reduce=reduce, training=False, bias=contiguous(expected["a.bias"]))
    block.weight = contiguous(expected["a.weight"])
    net = script_module(
        reduce=reduce, a=block, steps=contiguous(expected["steps"]), sizes=[1, 2], empty=script_module()
    )
    save_script(tmp_path / "t.pt", net)
    read, strings, found = formats.read(tmp_path / "t.pt")
    assert found == "pytorch" and strings == {}
    assert sorted(read) == ["a.bias", "a.weight", "steps"]
    assert all(np.array_equal(read[name], expected[name]) and read[name].dtype == expected[name].dtype for name in read)


def test_a_module_that_is_shared_has_both_names(tmp_path):
    shared = script_module(w=contiguous(np.arange(3, dtype=np.float32)))
    save_script(tmp_path / "t.pt", script_module(a=shared, b=shared))
    assert list(formats.read(tmp_path / "t.pt")[0]) == ["a.w", "b.w"]


def test_lists_with_a_type_tag_are_passed_over(tmp_path):
    raw = b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00sctorch.jit._pickle\nrestore_type_tag\n](K\x01e"
    raw += b"X\x09\x00\x00\x00List[int]\x86RsX\x01\x00\x00\x00tctorch.jit._pickle\nbuild_intlist\n]\x85Rsb."
    save_zip(tmp_path / "t.pt", {}, pickled=raw)
    refused(tmp_path / "t.pt", "holds no parameters")


def test_modules_that_hold_each_other_or_too_many(tmp_path):
    w = contiguous(np.ones(2, np.float32))
    ring = script_module(w=w)
    ring.again = ring
    doubled = script_module(w=w)
    for _ in range(60):
        doubled = script_module(a=doubled, b=doubled)
    named = script_module(**{"n" * 400: w})
    for content, words in ((ring, "is no checkpoint"), (doubled, "too many"), (named, "no usable name")):
        save_script(tmp_path / "t.pt", content)
        refused(tmp_path / "t.pt", words)


def test_a_scripted_module_calls_nothing(tmp_path):
    witness = tmp_path / "witness"
    save_script(tmp_path / "t.pt", script_module(w=Calls(exec, f"open({str(witness)!r}, 'w')")))
    refused(tmp_path / "t.pt", r"wants to call \w+\.exec")
    save_script(tmp_path / "t.pt", script_module(place="__torchx__.model", w=contiguous(np.ones(2, np.float32))))
    refused(tmp_path / "t.pt", r"holds its parameters in an object, __torchx__\.model\.Net0; save its state_dict")
    save_script(tmp_path / "t.pt", script_module(state=("no", "table")))
    refused(tmp_path / "t.pt", "holds no parameters")
    assert not witness.exists()


# ---- harm ----


class Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def refused(path, words):
    with pytest.raises(UserError, match=words) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("function", [exec, __import__, getattr])
def test_a_pickle_that_calls_is_refused_and_nothing_is_run(tmp_path, function, protocol):
    witness = tmp_path / "witness"
    code = f"open({str(witness)!r}, 'w')"
    content = {"x": Calls(function, code), "w": contiguous(np.ones(2, np.float32))}
    data, _ = dump(content, protocol=protocol)
    save_zip(tmp_path / "t.ckpt", content, pickled=data)
    refused(tmp_path / "t.ckpt", rf"wants to call \w+\.{function.__name__}, .* nothing of it was run")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", r"wants to call os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", r"wants to call os\.system"),
        (b"(S'true'\nios\nsystem\n.", r"wants to call os\.system"),
        (b"(cos\nsystem\nS'true'\no.", r"wants to call os\.system"),
        (b"\x80\x02cos\nsystem\nS'true'\n\x85\x81.", r"wants to call os\.system"),
        (b"\x80\x02\x82\x01.", "operation EXT1"),
        (b"P1\n.", "operation PERSID"),
        (b"(dS'x'\nj\xff\xff\xff\x7f.", "not readable"),  # a memo of two thousand million entries
        (b"r\xff\xff\xff\x7f.", "not readable"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.", "not readable"),  # a text of 2^63 bytes
        (b"\x8b\xff\xff\xff\x7f\x01.", "not readable"),
        (b"N.", "no table of parameters"),
        (b"}", "no end|not readable"),
        (b"", "no end|not readable"),
        (b"1.", "not readable"),
        (b"(" + b")\x86" * 3 + b".", "not readable|no table"),
    ],
)
def test_odd_pickles(tmp_path, pickled, words):
    save_zip(tmp_path / "t.ckpt", {}, pickled=pickled)
    refused(tmp_path / "t.ckpt", words)


def test_nested_keys_cost_no_time(tmp_path):
    """A tuple of itself twice, sixty deep: whoever takes its hash waits for ever."""
    doubled = b")" + b"2\x86" * 60
    save_zip(tmp_path / "t.ckpt", {}, pickled=b"\x80\x02}" + doubled + b"K\x01s.")
    refused(tmp_path / "t.ckpt", "holds no parameters")
    save_zip(tmp_path / "t.ckpt", {}, pickled=b"\x80\x02}" + doubled + b"R.")
    refused(tmp_path / "t.ckpt", "wants to call an object")


def tensor_of(size, stride, offset=0, count=4):
    flat = np.zeros(4, np.float32)
    saved = Saved(flat, size, stride, offset)
    data, _ = dump({"w": saved})
    return {"w": saved}, data.replace(b"K\x04t", b"K" + bytes([count]) + b"t")


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2, 2), (3, 1), 1),
        ((10**12,), (0,), 0),
        ((10**6, 10**6), (0, 0), 0),
        ((1 << 62, 4), (0, 1), 0),
        ((-1,), (1,), 0),
        ((4,), (-1,), 3),
        ((4,), (1, 1), 0),
        ((1,) * 40, (1,) * 40, 0),
        ((0,), (1,), 10**9),
        ((1.5,), (1,), 0),
        ((4,), (1,), -1),
        ((0, 1 << 61), (1, 1), 0),
        ((1 << 61, 0), (1 << 61, 1), 0),
        ((1 << 63,), (0,), 0),
        ((True,), (1,), 0),
    ],
)
def test_shapes_that_reach_beyond_the_numbers(tmp_path, size, stride, offset):
    save_zip(tmp_path / "t.ckpt", *tensor_of(size, stride, offset))
    refused(tmp_path / "t.ckpt", "is damaged: w")


@pytest.mark.parametrize(("size", "count"), [((1,), 1), ((1, 1), 1), ((4, 1), 4), ((), 1)])
def test_strides_where_there_is_no_next_number_do_not_matter(tmp_path, size, count):
    stride = tuple(1 if n > 1 else 1 << 61 for n in size)
    saved = Saved(np.arange(4, dtype=np.float32), size, stride)
    save_zip(tmp_path / "t.ckpt", {"w": saved})
    read = formats.read(tmp_path / "t.ckpt")[0]["w"]
    assert read.shape == size and read.reshape(-1).tolist() == list(range(count)) and read.flags.c_contiguous


def test_empty_tensors_of_any_stride(tmp_path):
    save_zip(tmp_path / "t.ckpt", {"w": Saved(np.zeros(4, np.float32), (0, 3), (1 << 61, 1 << 61))})
    assert formats.read(tmp_path / "t.ckpt")[0]["w"].shape == (0, 3)


def test_members_that_are_not_what_the_directory_says(tmp_path):
    """The directory, which others read, against the member's own header, which lies at the place it gives."""
    path = tmp_path / "t.ckpt"
    save_zip(path, {"a": contiguous(np.zeros(4, np.float32)), "b": contiguous(np.ones(4, np.float32))})
    whole = path.read_bytes()
    places = {member.filename: member.header_offset for member in zipfile.ZipFile(path).infolist()}
    a, b = places["archive/data/0"], places["archive/data/1"]
    directory = whole.rindex(b"archive/data/0") - 46
    assert whole[directory : directory + 4] == b"PK\x01\x02"
    damages = {
        "another's place": (directory + 42, struct.pack("<I", b)),
        "another name": (a + 30, b"archive/data/7"),
        "packed": (a + 8, struct.pack("<H", 8)),
        "another size": (a + 22, struct.pack("<I", 12)),
    }
    for start, content in damages.values():
        path.write_bytes(whole[:start] + content + whole[start + len(content) :])
        refused(path, "archive/data/0 is not what its archive's directory says")


def test_the_same_values_again_and_again_cost_no_time(tmp_path):
    """A list of many entries, made a table many times over."""
    many = b"\x80\x02(" + b"N" * 200_000 + b"lq\x00" + b"0ccollections\nOrderedDict\nq\x01"
    save_zip(tmp_path / "t.ckpt", {}, pickled=many + b"h\x01h\x00\x85R0" * 100_000 + b"}.")
    refused(tmp_path / "t.ckpt", "more than 10,000,000 operations")


def test_counts_that_the_archive_does_not_hold(tmp_path):
    save_zip(tmp_path / "t.ckpt", *tensor_of((4,), (1,), count=200))
    refused(tmp_path / "t.ckpt", "16 bytes for 200 numbers")


def test_archives_that_are_something_else(tmp_path):
    path = tmp_path / "t.ckpt"
    content = {"w": contiguous(np.zeros(64, np.float32))}
    save_zip(path, content, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed or encrypted")
    save_zip(path, content, byteorder="big")
    refused(path, "holds a name twice|big-endian")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    refused(path, "not one that torch.save wrote")
    for key in ("../../etc/passwd", "/etc/passwd", "1"):
        data, _ = dump(content)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", data)
            archive.writestr(f"a/data/{key}", b"x" * 256)
        refused(path, "a/data/0 is missing")


def test_types_that_nothing_here_can_hold(tmp_path):
    save_zip(tmp_path / "t", {"w": Saved(np.zeros(2, np.float32), (2,), (1,), kind="ComplexFloatStorage")})
    refused(tmp_path / "t", r"holds w as torch\.ComplexFloatStorage")


@pytest.mark.parametrize("kind", SAVERS)
def test_truncation_anywhere_is_noticed(tmp_path, kind):
    path = tmp_path / "t.ckpt"
    SAVERS[kind](path, {name: contiguous(array) for name, array in tensors().items()})
    whole = path.read_bytes()
    for size in {*range(1, len(whole), max(1, len(whole) // 40)), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            checkpoint.load(path)


@pytest.mark.parametrize("kind", SAVERS)
def test_random_damage_is_an_error_or_another_number(tmp_path, kind):
    path, rng = tmp_path / "t.ckpt", np.random.default_rng(5)
    SAVERS[kind](path, {name: contiguous(array) for name, array in tensors().items()})
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    outcomes = set()
    for _ in range(1500):
        damaged = whole.copy()
        at = rng.integers(len(damaged), size=rng.integers(1, 6))
        damaged[at] = rng.integers(256, size=len(at))
        path.write_bytes(damaged.tobytes())
        try:
            read = checkpoint.load(path).tensors
            assert sum(array.size for array in read.values()) < 1000
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_no_operation_of_pickle_is_forgotten():
    """Each is either run, or refused by name."""
    from ldm.checkpoint import pytorch_file as file

    known = {*file._CONSTANTS, *file._LITERALS, *file._BUILDERS, "GLOBAL", "INST", "STOP", "PROTO", "FRAME", "MEMOIZE"}
    known |= {"PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"}
    others = {opcode.name for opcode in pickletools.opcodes} - known
    assert others == {
        *("PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"),
    }
