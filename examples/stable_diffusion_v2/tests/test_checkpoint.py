"""Checkpoints: every reference name both ways, round trips to the bit, damaged files, interrupted writes."""

from __future__ import annotations

import gzip
import json
import mmap
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_sdxl
from full_disk import files_of_at_most

from ldm import checkpoint
from ldm.checkpoint import formats, metadata, mindspore_file, names, safetensors_file
from ldm.checkpoint.arrays import BFLOAT16
from ldm.config.model import load_model_config
from ldm.errors import UserError
from ldm.networks.layers import ALIGNMENT
from ldm.weights import words_of

REFERENCE = Path(__file__).parent / "data" / "reference"
FORMATS = ["mindspore", "safetensors"]
UNET, TEXT = "model.diffusion_model.", "cond_stage_model."


def rows(name):
    """The rows of a reference table, shapes as tuples."""
    with gzip.open(REFERENCE / f"{name}.tsv.gz", "rt") as file:
        table = [line.rstrip("\n").split("\t") for line in file][1:]
    return [(*row[:-1], tuple(int(size) for size in row[-1].split(","))) for row in table]


def blank(shape):
    """An array of any size that takes one byte."""
    return np.broadcast_to(np.int8(0), shape)


def shapes(tensors):
    return {name: array.shape for name, array in tensors.items()}


def small(dtype=np.float32):
    """Parameters of an SD 2.x kind, a few numbers each, told apart by their values."""
    wanted = {
        UNET + "input_blocks.0.0.weight": (8, 4, 3, 3),
        UNET + "input_blocks.1.0.in_layers.0.weight": (8,),
        UNET + "input_blocks.1.0.in_layers.2.bias": (3,),
        UNET + "out.2.weight": (4, 8, 3, 3),
        "first_stage_model.decoder.mid.attn_1.q.weight": (5, 5, 1, 1),
        "cond_stage_model.model.token_embedding.weight": (20, 8),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
    }
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in wanted.items()}


META = {
    "prediction_type": "v",
    "schedule": json.dumps({"name": "scaled_linear", "zero_terminal_snr": False}),
    "resolution": "768x768",
    "step": "1000",
    "model_config": "model:\n  prediction_type: v  # 你好 🦊\n" * 50,
}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].shape == right[name].shape, name
        assert left[name].tobytes() == right[name].tobytes(), name


# ---- names ----


def test_mindone_names_of_sd2():
    table = rows("sd2_parameters")
    ours = {stability: blank(shape) for _, stability, shape in table}
    theirs = {mindone: blank(shape) for mindone, _, shape in table}
    assert len(ours) == len(theirs) == len(table) == 1214
    for mindone, stability, _ in table:
        assert list(names.to_mindone({stability: blank(1)})) == [mindone]
        assert list(names.from_mindone({mindone: blank(1)})) == [stability]
    assert shapes(names.to_mindone(ours)) == shapes(theirs)
    assert shapes(names.from_mindone(theirs)) == shapes(ours)
    assert shapes(names.from_mindone(ours)) == shapes(ours)


def test_mindone_names_of_sd1():
    ours = {name: blank(shape) for name, shape in rows("sd1_parameters_stability")}
    theirs = {name: blank(shape) for name, shape in rows("sd1_parameters_mindone")}
    assert (len(ours), len(theirs)) == (1130, 1082)
    assert shapes(names.to_mindone(ours)) == shapes(theirs)
    assert shapes(names.from_mindone(theirs)) == shapes(ours)
    assert shapes(names.from_mindone(ours)) == shapes(ours)
    assert names.text_variant(ours) == "clip"


def test_projections_are_merged_in_the_order_q_k_v():
    layer = "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn."
    ours = {f"{layer}{x}_proj.weight": np.full((4, 4), n, np.float32) for n, x in enumerate("qkv")}
    ours["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] = np.zeros((9, 4), np.float32)
    theirs = names.to_mindone(ours)
    merged = theirs["cond_stage_model.transformer.transformer_layer.resblocks.3.attn.attn.in_proj.weight"]
    assert merged[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert_same(names.from_mindone(theirs, "clip"), ours)
    openclip = names.from_mindone(theirs, "openclip")
    assert openclip["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"] is merged

    incomplete = dict(ours)
    del incomplete[f"{layer}k_proj.weight"]  # cannot be merged: stays what it is
    assert f"{layer}q_proj.weight" in names.to_mindone(incomplete)


@pytest.mark.parametrize("model", ["sd1", "sd2", "odd"])
def test_diffusers_names(model):
    """Pairs as diffusers' own converter has them; "odd": 3 levels of 1 block, attention at the middle one only."""
    table = rows(f"diffusers_{model}")
    pipeline = {"unet": {}, "vae": {}}
    for n, (_, part, name, shape) in enumerate(table):
        pipeline[part][name] = np.full([1] * len(shape), n)
    tensors = names.from_diffusers(pipeline["unet"], pipeline["vae"], {}, "openclip")
    assert {name: int(array.flat[0]) for name, array in tensors.items()} == {r[0]: n for n, r in enumerate(table)}

    back = names.to_diffusers(tensors)
    assert not back.pop("text_encoder")
    for part, arrays in back.items():
        assert_same(arrays, pipeline[part])


@pytest.mark.parametrize(
    ("model", "stability"), [("sd1", "sd1_parameters_stability"), ("sd2", "sd2_parameters")], ids=["sd1", "sd2"]
)
def test_diffusers_shapes(model, stability):
    pipeline = {"unet": {}, "vae": {}}
    for _, part, name, shape in rows(f"diffusers_{model}"):
        pipeline[part][name] = blank(shape)
    wanted = {row[-2]: row[-1] for row in rows(stability) if not row[-2].startswith("cond_stage_model.")}
    tensors = names.from_diffusers(pipeline["unet"], pipeline["vae"], {}, "openclip")
    assert shapes(tensors) == wanted
    back = names.to_diffusers(tensors)
    assert {part: shapes(back[part]) for part in pipeline} == {part: shapes(pipeline[part]) for part in pipeline}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_diffusers_text_encoders(prefix):
    """Twelve layers in Hugging Face's names, with and without their prefix, as SD 1.x and as SD 2.x have them."""
    start = "cond_stage_model.transformer.text_model."
    sd1 = {name[len(start) :]: shape for name, shape in rows("sd1_parameters_stability") if name.startswith(start)}
    text = {prefix + name: blank(shape) for name, shape in sd1.items()}
    clip = names.from_diffusers({}, {}, text, "clip")
    assert shapes(clip) == {start + name: shape for name, shape in sd1.items()}
    assert names.to_diffusers(clip)["text_encoder"].keys() == {"text_model." + name for name in sd1}

    openclip = names.from_diffusers({}, {}, text, "openclip")
    wanted = {name for _, name, _ in rows("sd2_parameters") if name.startswith("cond_stage_model.")}
    assert openclip.keys() == {name for name in wanted if not re.search(r"resblocks\.(1[2-9]|2\d)\.", name)}
    assert shapes(names.to_diffusers(openclip)["text_encoder"]) == shapes(names.to_diffusers(clip)["text_encoder"])


def test_old_attention_names_of_diffusers_vae():
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn", "group_norm": "group_norm"}
    start = "decoder.mid_block.attentions.0."
    vae = {start + name + ".weight": np.ones((2, 2)) for name in new}
    old = {start + new[name] + ".weight": np.ones((2, 2)) for name in new}
    tensors = names.from_diffusers({}, vae, {}, "clip")
    assert shapes(names.from_diffusers({}, old, {}, "clip")) == shapes(tensors)
    assert tensors["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (2, 2, 1, 1)
    assert tensors["first_stage_model.decoder.mid.attn_1.norm.weight"].shape == (2, 2)


def test_unknown_names_are_kept():
    unknown = {"something.else": np.ones(2), UNET + "label_emb.0.weight": np.ones(3)}
    assert_same(names.from_mindone(unknown), unknown)
    assert_same(names.to_mindone(unknown), unknown)
    assert list(names.from_diffusers({"class_embedding.weight": np.ones(1)}, {}, {}, "clip")) == [
        UNET + "class_embedding.weight"
    ]
    with pytest.raises(UserError, match="no place in a diffusers pipeline .first: something.else"):
        names.to_diffusers(unknown)


def test_short_names_of_some_sd1_files():
    short = {"cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias": np.ones(2)}
    assert list(names.from_mindone(short)) == ["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"]


def test_two_names_for_one_parameter_are_refused(tmp_path):
    path = tmp_path / "twice.ckpt"
    norm = "first_stage_model.encoder.norm_out."
    formats.write(path, {norm + "weight": np.ones(2), norm + "gamma": np.ones(2)}, {}, "mindspore")
    with pytest.raises(UserError, match="twice, under two names"):
        checkpoint.load(path)


# ---- names of SDXL ----

XL = [
    ("sdxl_base_parameters", 2514, 799, "sdxl-inference"),
    ("sdxl_refiner_parameters", 1858, None, "sdxl-refiner-inference"),
]


def xl_rows(table):
    """(Stability's name, diffusers' names, MindONE's name, what becomes of the numbers) of every parameter."""
    with gzip.open(REFERENCE / f"{table}.tsv.gz", "rt") as file:
        return [
            (row[0], row[1].split("+"), row[3], row[4]) for row in (line.rstrip("\n").split("\t") for line in file)
        ][1:]


def inside(table):
    """{Stability's name in the file: our name}: the base's encoders keep their numbers, the refiner's has none."""
    theirs, ours = ("conditioner.", TEXT) if "base" in table else ("conditioner.embedders.0.", TEXT)
    return {row[0]: row[0].replace(theirs, ours) for row in xl_rows(table)}


@pytest.mark.parametrize(("table", "number", "different", "config"), XL, ids=["base", "refiner"])
def test_names_of_sdxl_both_ways(table, number, different, config):
    rows, ours = xl_rows(table), inside(table)
    named = {ours[row[0]]: np.array(n) for n, row in enumerate(rows)}
    stability, mindone = ({row[which]: n for n, row in enumerate(rows)} for which in (0, 2))
    assert len(named) == len(stability) == len(mindone) == number
    for table_, way in ((stability, names.to_conditioner), (mindone, names.to_mindone)):
        assert {name: int(array) for name, array in way(named).items()} == table_
        assert_same(names.from_mindone({name: np.array(n) for name, n in table_.items()}), named)
    assert_same(names.from_mindone(named), named)
    if different:
        assert sum(row[0] != row[2] for row in rows) == different
    wrapped = {name.replace(".gamma", "._backbone.gamma"): np.array(n) for name, n in mindone.items()}
    assert wrapped.keys() != mindone.keys()
    assert_same(names.from_mindone(names.without_wrappers(wrapped)), named)
    known = tiny_sdxl.parameters(load_model_config(f"configs/{config}.yaml"))
    assert named.keys() - known.keys() == {ours[row[0]] for row in rows if row[1] == ["-"]}  # logit_scale
    assert all(map(names.is_parameter, known)) and all(map(names.is_extra, named.keys() - known.keys()))


@pytest.mark.parametrize(("table", "number", "different", "config"), XL, ids=["base", "refiner"])
def test_diffusers_names_of_sdxl(table, number, different, config):
    """Every name and what becomes of its numbers, which are few here and told apart by their values."""
    ours, tensors, parts = inside(table), {}, {}
    for n, (stability, theirs, _, change) in enumerate(xl_rows(table)):
        array = np.full({"squeeze 1x1": (2, 2, 1, 1), "transpose": (2, 2)}.get(change, (3, 2)), 10 * n)
        array[0, 1] += 1
        tensors[ours[stability]] = array
        if change.startswith("rows"):
            array[:] = [[10 * n], [10 * n + 1], [10 * n + 2]]
        changed = {"squeeze 1x1": array.reshape(-1, 2), "transpose": array.T}.get(change, array)
        pieces = np.split(changed, 3) if change.startswith("rows") else [changed]
        for name, piece in zip(theirs if theirs != ["-"] else [], pieces):
            part, _, name = name.partition("/")
            parts.setdefault(part, {})[name] = piece
    written = names.to_diffusers(tensors, 32)
    assert written.keys() == parts.keys() | {"text_encoder"}
    for part, arrays in written.items():
        assert_same(arrays, parts.get(part, {}))
    read = names.from_diffusers(
        parts["unet"], parts["vae"], parts.get("text_encoder", {}), "clip", parts["text_encoder_2"]
    )
    assert_same(read, {name: array for name, array in tensors.items() if not name.endswith("logit_scale")})


@pytest.mark.parametrize("form", FORMATS)
def test_what_files_of_sdxl_hold_beside_parameters(tmp_path, form):
    """The numbers of positions and a scale, which no network has, stay in a file and have no place in a folder."""
    config = tiny_sdxl.tiny_sdxl_config()
    extras = {
        f"{TEXT}embedders.0.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
        f"{TEXT}embedders.1.model.logit_scale": np.array(4.6052, np.float32),
    }
    tensors = tiny_sdxl.random_tensors(config)
    checkpoint.save(tmp_path / "xl", {**tensors, **extras}, words_of(config), form)
    inside = [name for name in formats.read(tmp_path / "xl")[0] if name.endswith(("position_ids", "logit_scale"))]
    assert sorted(inside) == [name.replace(TEXT, "conditioner.") for name in sorted(extras)]
    read = checkpoint.load(tmp_path / "xl")
    assert_same({name: read.tensors[name] for name in sorted(read.tensors)}, dict(sorted((tensors | extras).items())))
    checkpoint.check_names(read, "xl")
    assert checkpoint.match(read.tensors, tiny_sdxl.parameters(config), "xl").keys() == tensors.keys()
    checkpoint.save(tmp_path / "folder", read.tensors, read.meta, "diffusers")
    assert checkpoint.load(tmp_path / "folder").tensors.keys() == tensors.keys()


def test_sd2_by_stabilitys_newer_program_is_no_refiner():
    name = "model.transformer.resblocks.3.ln_1.weight"
    sd2 = {UNET + "input_blocks.0.0.weight": blank((8, 4, 3, 3)), f"conditioner.embedders.0.{name}": blank(8)}
    read = names.from_mindone(sd2)
    assert TEXT + name in read and not names.is_xl(read)
    assert names.to_conditioner(read).keys() == read.keys()  # in its files it has the older name


def test_a_parameter_without_a_place_in_diffusers_is_named():
    tensors = tiny_sdxl.random_tensors(tiny_sdxl.tiny_sdxl_config())
    for name in ("embedders.2.model.positional_embedding", "embedders.0.transformer.strange", "model.ln_final.bias"):
        with pytest.raises(UserError, match=f"1 parameters have no place .*{name.rpartition('.')[2]}"):
            names.to_diffusers({**tensors, TEXT + name: np.ones(2)})


# ---- round trips ----


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip_is_exact(tmp_path, kind, dtype):
    path = tmp_path / "a.anything"
    tensors = small(dtype)
    tensors[UNET + "out.2.bias"] = np.array([np.nan, np.inf, -0.0, 6e-8], dtype)
    checkpoint.save(path, tensors, META, kind)
    loaded = checkpoint.load(path)
    assert loaded.format == kind
    assert loaded.meta == META
    assert_same(loaded.tensors, tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["a.anything"]


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip_of_every_type_and_odd_shapes(tmp_path, kind):
    types = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
    tensors = {f"t.{name}": np.arange(6).reshape(2, 3).astype(name) for name in types}
    tensors["t.scalar"] = np.array(3.5, np.float32)
    tensors["t.one"] = np.array([3.5], np.float32)
    tensors["t.empty"] = np.zeros((0,), np.float32)
    tensors["t.flat"] = np.zeros((3, 0, 2), np.float16)
    tensors["t.transposed"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tensors["t.ünïcode"] = np.ones(1, np.int8)
    strings = {"a": "b", "long": "x" * 70_000, "undecodable": "caf\udce9"}
    formats.write(tmp_path / "t", tensors, strings, kind)
    read, read_strings, _ = formats.read(tmp_path / "t")
    assert_same(read, dict(zip(read, (tensors[name] for name in read))))
    assert read.keys() == tensors.keys()
    assert read_strings == {**strings, "undecodable": "caf?"}


@pytest.mark.parametrize("kind", FORMATS)
def test_sd1_round_trip_with_merged_projections(tmp_path, kind):
    generator = np.random.default_rng(1)
    text = [r for r in rows("sd1_parameters_stability") if "layers.0." in r[0] or "embedding" in r[0]]
    tensors = {name: generator.standard_normal([min(n, 12) for n in shape]).astype(np.float32) for name, shape in text}
    checkpoint.save(tmp_path / "t", tensors, {}, kind)  # its width, 12, does not say which text encoder it is
    assert_same(checkpoint.load(tmp_path / "t").tensors, tensors)


def test_large_parameters_are_written_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_file, "SLICE", 40)
    tensors = small()
    checkpoint.save(tmp_path / "t", tensors, META, "mindspore")
    assert_same(checkpoint.load(tmp_path / "t").tensors, tensors)


def test_bfloat16_is_widened(tmp_path):
    wide = np.array([1.0, -2.5, 0.0, np.inf, 3.0e38, 1e-40], np.float32)
    halves = (wide.view(np.uint32) >> 16).astype(np.uint16)
    expected = (halves.astype(np.uint32) << 16).view(np.float32)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "s").write_bytes(struct.pack("<Q", len(header)) + header + halves.tobytes())
    chunks = mindspore_file._value_chunks("a", (2, 3), "BFloat16", halves.view(np.uint8))
    (tmp_path / "m").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    for name in "sm":
        array = checkpoint.load(tmp_path / name).tensors["a"]
        assert array.dtype == np.float32
        assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_bfloat16_is_converted_without_being_widened_first(tmp_path, kind, dtype):
    halves = np.array([[0x3F80, 0xC020], [0x0000, 0x4049]], np.uint16)  # 1, -2.5, 0, 3.140625
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "s").write_bytes(struct.pack("<Q", len(header)) + header + halves.tobytes())
    stored = checkpoint.load(tmp_path / "s", widen=False).tensors
    assert stored["a"].nbytes == 8 and stored["a"].base is not None
    checkpoint.save(tmp_path / "t", stored, {}, kind, dtype)
    array = checkpoint.load(tmp_path / "t").tensors["a"]
    assert array.dtype == (dtype or "float32")
    assert array.tolist() == [[1.0, -2.5], [0.0, 3.140625]]


STORED = ["float16", "float32", "float32", "float64", "float32", "float16", "float32", "float16", "int64"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("error")
def test_what_float16_cannot_hold_stays_float32_and_is_said(tmp_path, kind, caplog):
    """65,519 becomes 65,504, the largest of float16; 65,520 would become infinite. So would bfloat16's 1e30."""
    tensors = {
        "a": np.array([1, -65519], np.float32),
        "b": np.array([[0, -70000.5]], np.float32),
        "c": np.array([1e5], np.float64),
        "d": np.array([1e300], np.float64),
        "e": np.array([0x7149], np.uint16).view(BFLOAT16),
        "f": np.array([np.nan, np.inf, 2], np.float32),
        "g": np.array([np.inf, 65520], np.float32),
        "h": np.zeros((0, 3), np.float32),
        "i": np.array([100_000]),
    }
    checkpoint.save(tmp_path / "t", tensors, {}, kind, "float16")
    read = checkpoint.load(tmp_path / "t").tensors
    types = {name: array.dtype.name for name, array in read.items()}
    assert types == dict(zip("abcdefghi", STORED))
    assert read["a"].tolist() == [1, -65504] and read["b"].tolist() == [[0, -70000.5]]
    assert np.isfinite([*read["c"], *read["d"], *read["e"]]).all()
    (line,) = caplog.messages
    assert "t: 5 of 9 tensors stay float32, for float16 cannot hold their numbers; the first is b with 70000.5" in line


def test_released_numbers_leave_memory_and_are_read_again(tmp_path):
    rng = np.random.default_rng(0)
    checkpoint.save(tmp_path / "t", {"a": rng.standard_normal((1 << 22,), np.float32)}, {}, "safetensors")
    array, there = checkpoint.load(tmp_path / "t").tensors["a"], resident()
    total = array.sum()
    assert resident() - there > 12 << 20
    checkpoint.release(array)
    assert resident() - there < 4 << 20
    assert array.sum() == total
    checkpoint.release(np.ones(3))  # no view of a file: nothing to do


def resident() -> int:
    """Bytes of memory that this process has of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


@pytest.mark.parametrize("kind", FORMATS)
def test_arrays_are_views_of_the_file_that_cannot_be_written_to(tmp_path, kind):
    path = tmp_path / "t"
    checkpoint.save(path, small(), {}, kind)
    for array in checkpoint.load(path).tensors.values():
        owner = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner.obj if isinstance(owner, memoryview) else owner, mmap.mmap)
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 7


def test_memory_that_can_be_written_is_not_given_back(tmp_path, monkeypatch):
    """Were files mapped so that arrays can be written to, what was written would be lost."""
    monkeypatch.setattr(mmap, "ACCESS_READ", mmap.ACCESS_COPY)
    formats.write(tmp_path / "t", {"a": np.ones(5000, np.float32)}, {}, "safetensors")
    with pytest.raises(AssertionError, match="never given back"):
        checkpoint.release(formats.read(tmp_path / "t")[0]["a"])


def test_a_file_that_is_written_to_is_noticed_and_one_that_is_replaced_does_no_harm(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    formats.write(one, {"a": np.ones(5000, np.float32)}, {}, "safetensors")
    formats.write(other, {"a": np.zeros(5000, np.float32)}, {}, "safetensors")
    views, time = formats.read(one)[0], one.stat().st_mtime_ns
    assert checkpoint.changed([*views.values(), np.ones(3)]) is None
    os.replace(other, one)
    assert checkpoint.changed(views.values()) is None and views["a"].all()
    formats.write(one, {"a": np.ones(5000, np.float32)}, {}, "safetensors")
    for change in (lambda file: file.truncate(4096), lambda file: os.utime(one, ns=(time, time + 1))):
        views = formats.read(one)[0]
        with open(one, "r+b") as file:
            change(file)
        assert checkpoint.changed(views.values()) == one
        formats.write(one, {"a": np.ones(5000, np.float32)}, {}, "safetensors")


def test_numbers_are_aligned_in_safetensors(tmp_path):
    tensors = {"a": np.ones(3, np.float16), "b": np.ones(1, np.int8), "c": np.ones(2, np.float32)}
    formats.write(tmp_path / "t", tensors, {}, "safetensors")
    assert all(array.flags.aligned for array in formats.read(tmp_path / "t")[0].values())


def test_what_we_write_can_be_used_where_it_is(tmp_path):
    tensors = {f"{n:02}": np.ones((n, 16), np.float32) for n in range(1, 20)} | {"00": np.ones(3, np.float32)}
    formats.write(tmp_path / "t", tensors, {"a": "b"}, "safetensors")
    read = formats.read(tmp_path / "t")[0]
    assert all(array.ctypes.data % ALIGNMENT == 0 for name, array in read.items() if name != "00")


# ---- what other programs see ----


def test_safetensors_library_reads_ours(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "model.safetensors"
    checkpoint.save(path, small(), {**META, "schedule": json.dumps({"zero_terminal_snr": True})}, "safetensors")
    with safe_open(path, framework="np") as file:
        assert_same({name: file.get_tensor(name) for name in file.keys() if "." in name}, small())  # noqa: SIM118
        assert file.get_tensor("v_pred").size == 0
        assert file.get_tensor("ztsnr").size == 0
        said = file.metadata()
    assert {key[10:]: text for key, text in said.items() if key.startswith("modelspec.")} == {
        "sai_model_spec": "1.0.0",
        "architecture": "latent-diffusion",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "model",
        "resolution": "768x768",
        "prediction_type": "v",
    }
    assert said["format"] == "pt"
    assert json.loads(checkpoint.load(path).meta["schedule"]) == {"zero_terminal_snr": True}


def test_safetensors_library_writes_for_us(tmp_path):
    from safetensors.numpy import save_file

    tensors = {**small(), "odd": np.ones(3, np.float16), "flag": np.array([True, False, True])}
    save_file(tensors, tmp_path / "t", {"modelspec.prediction_type": "epsilon", "modelspec.author": "me", "a": "b"})
    loaded = checkpoint.load(tmp_path / "t")
    assert_same(loaded.tensors, {name: tensors[name] for name in loaded.tensors})
    assert loaded.tensors.keys() == tensors.keys()
    assert loaded.meta == {"prediction_type": "eps", "modelspec.author": "me", "a": "b"}


def test_mindspore_reads_ours(tmp_path):
    ms = pytest.importorskip("mindspore")
    path = tmp_path / "model.ckpt"
    checkpoint.save(path, small(np.float16), META, "mindspore")
    loaded = ms.load_checkpoint(str(path))
    parameters = {name: value.asnumpy() for name, value in loaded.items() if not isinstance(value, str)}
    assert_same(parameters, names.to_mindone(small(np.float16)))
    strings = {name: value for name, value in loaded.items() if isinstance(value, str)}
    assert {key: strings[key] for key in META} == META

    net = ms.nn.Dense(2, 2)  # as MindONE fills its networks: strings are passed over
    ms.load_param_into_net(net, {"weight": ms.Parameter(ms.Tensor([[1.0, 2], [3, 4]])), **strings})
    assert net.weight.asnumpy().tolist() == [[1, 2], [3, 4]]


def test_mindspore_writes_for_us(tmp_path):
    ms = pytest.importorskip("mindspore")
    path = str(tmp_path / "model.ckpt")
    theirs = {**names.to_mindone(small()), "scalar": np.float32(3), "ints": np.arange(3)}
    saved = [{"name": name, "data": ms.Tensor(value)} for name, value in theirs.items()]
    said = {"prediction_type": "velocity", "epoch_num": 3}
    for options in ({}, {"crc_check": True}):
        ms.save_checkpoint(saved, path, append_dict=said, **options)
        loaded = checkpoint.load(path)
        assert_same({name: loaded.tensors[name] for name in small()}, small())
        assert loaded.tensors["scalar"].shape == ()
        assert loaded.tensors["ints"].tolist() == [0, 1, 2]
        assert loaded.tensors["epoch_num"] == 3
        assert loaded.meta == {"prediction_type": "v"}

    data = bytearray(Path(path).read_bytes())
    data[400] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load(tmp_path / "flipped.ckpt")


def messages(data):
    """The protobuf messages that a MindSpore file is a sequence of."""
    found = []
    while data:
        size, start = mindspore_file._varint(data, 1, len(data))
        found.append(data[: start + size])
        data = data[start + size :]
    return found


def test_files_equal_mindspores_own_to_the_byte(tmp_path):
    ms = pytest.importorskip("mindspore")
    tensors = {**small(), "half": np.ones((2, 2), np.float16), "scalar": np.array(1.5, np.float32)}
    saved = [{"name": name, "data": ms.Tensor(value)} for name, value in tensors.items()]
    marks = {mindspore_file.BEGIN: "1", "prediction_type": "v", mindspore_file.END: "1"}
    ms.save_checkpoint(saved, str(tmp_path / "theirs.ckpt"), append_dict=marks)
    formats.write(tmp_path / "ours.ckpt", tensors, {"prediction_type": "v"}, "mindspore")
    theirs, ours = (messages((tmp_path / name).read_bytes()) for name in ("theirs.ckpt", "ours.ckpt"))
    begin, said, end = theirs[-3:]  # MindSpore has the strings last, we have them first
    assert ours == [begin, said, *theirs[:-3], end]


def test_mindspore_writing_safetensors_with_its_own_names(tmp_path):
    ms = pytest.importorskip("mindspore")
    saved = [{"name": name, "data": ms.Tensor(value)} for name, value in names.to_mindone(small()).items()]
    ms.save_checkpoint(saved, str(tmp_path / "t.safetensors"), format="safetensors")
    loaded = checkpoint.load(tmp_path / "t.safetensors")
    assert loaded.meta == {}
    assert_same({name: loaded.tensors[name] for name in small()}, small())


# ---- what files say of themselves ----


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["eps", "v", "x0", "something new"])
def test_prediction_type_survives(tmp_path, kind, name):
    checkpoint.save(tmp_path / "t", small(), {"prediction_type": name}, kind)
    assert checkpoint.load(tmp_path / "t").meta == {"prediction_type": name}
    assert ("v_pred" in formats.read(tmp_path / "t")[0]) == (kind == "safetensors" and name == "v")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_says_nothing_says_nothing(tmp_path, kind):
    checkpoint.save(tmp_path / "t", small(), {}, kind)
    assert checkpoint.load(tmp_path / "t").meta == {}


@pytest.mark.parametrize(
    ("marks", "strings", "expected"),
    [
        (["v_pred"], {}, {"prediction_type": "v"}),
        (["v_pred", "ztsnr"], {}, {"prediction_type": "v", "schedule": '{"zero_terminal_snr": true}'}),
        ([], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "eps"}),
        ([], {"modelspec.predict_key": "v"}, {"prediction_type": "v"}),
        ([], {"modelspec.predict_key": "epsilon"}, {}),
        ([], {"prediction_type": "v_prediction", "modelspec.prediction_type": "v"}, {"prediction_type": "v"}),
        ([], {"modelspec.resolution": "512x768", "x": ""}, {"resolution": "512x768"}),
    ],
)
def test_foreign_ways_to_say_it(tmp_path, marks, strings, expected):
    tensors = {**small(), **{mark: np.zeros(0, np.float32) for mark in marks}}
    header, *body = safetensors_file.chunks(tensors, strings, {name: array.dtype for name, array in tensors.items()})
    (tmp_path / "t").write_bytes(b"".join(map(bytes, [header, *body])))
    loaded = checkpoint.load(tmp_path / "t")
    assert loaded.meta == expected
    assert loaded.tensors.keys() == small().keys()


def test_the_text_encoder_of_generative_models(tmp_path):
    """SD 2.x files in that naming differ in one prefix and carry the schedule."""
    named = {"conditioner.embedders.0.model.ln_final.weight": np.ones(4, np.float32)}
    tensors = {**named, "denoiser.sigmas": np.ones(9, np.float32)}
    formats.write(tmp_path / "t.safetensors", tensors, {}, "safetensors")
    tensors = checkpoint.load(tmp_path / "t.safetensors").tensors
    assert set(tensors) == {"cond_stage_model.model.ln_final.weight", "denoiser.sigmas"}
    checkpoint.match(tensors, {"cond_stage_model.model.ln_final.weight": (4,)}, "t")


def test_a_content_key_changes_with_any_file_of_a_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    keys = set()
    for name, content in (("a", b"1"), ("unet/b", b"2"), ("unet/b", b"3"), ("a", b"4")):
        (tmp_path / name).write_bytes(content)
        keys |= {checkpoint.content_key(tmp_path), checkpoint.content_key(tmp_path / name)}
    assert len(keys) == 8
    with pytest.raises(UserError, match="cannot read .*: No such file"):
        checkpoint.content_key(tmp_path / "c")


@pytest.mark.parametrize(
    "strings", [{"prediction_type": "epsilon"}, {"prediction_type": "v", "modelspec.prediction_type": "sample"}]
)
def test_contradiction_is_an_error(tmp_path, strings):
    formats.write(tmp_path / "t", {**small(), "v_pred": np.zeros(0, np.float32)}, strings, "safetensors")
    with pytest.raises(UserError, match="t contradicts itself: its prediction type is (eps and v|v and x0)"):
        checkpoint.load(tmp_path / "t")


@pytest.mark.parametrize("schedule", ["{", "[1]", "[" * 100_000])
def test_unreadable_schedule_is_an_error(tmp_path, schedule):
    formats.write(tmp_path / "t", small(), {"schedule": schedule}, "safetensors")
    with pytest.raises(UserError, match="t says schedule .* no table of names and values: it is damaged"):
        checkpoint.load(tmp_path / "t")


def test_architecture_is_named_for_model_browsers():
    for config, expected in (("", "stable-diffusion-xl-v1-base"), ("refiner-", "stable-diffusion-xl-v1-refiner")):
        wanted = tiny_sdxl.parameters(load_model_config(f"configs/sdxl-{config}inference.yaml"))
        assert metadata.architecture({name: blank(shape) for name, shape in wanted.items()}, "v") == expected
    for table, prediction_type, expected in (
        ("sd1_parameters_stability", "eps", "stable-diffusion-v1"),
        ("sd1_parameters_stability", "v", "stable-diffusion-v1"),
        ("sd2_parameters", "eps", "stable-diffusion-v2-512"),
        ("sd2_parameters", "v", "stable-diffusion-v2-768-v"),
    ):
        tensors = {row[-2]: blank(row[-1]) for row in rows(table)}
        assert metadata.architecture(tensors, prediction_type) == expected


# ---- damage ----


@pytest.mark.parametrize("kind", FORMATS)
def test_truncation_anywhere_is_noticed(tmp_path, kind):
    path = tmp_path / "t"
    checkpoint.save(path, small(np.float16), {"prediction_type": "v"}, kind)
    data = path.read_bytes()
    places = {round(place) for place in np.linspace(1, len(data) - 1, 400)}
    places |= set(range(1, 40)) | {len(data) - n for n in range(1, 40)}
    if kind == "mindspore":  # between two messages, where protobuf sees nothing amiss
        places |= {int(end) for end in np.cumsum([len(part) for part in messages(data)])}
    places.discard(len(data))
    for place in places:
        path.write_bytes(data[:place])
        with pytest.raises(UserError, match="truncated") as error:
            checkpoint.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_truncation_says_how_much_is_missing(tmp_path):
    path = tmp_path / "t"
    checkpoint.save(path, small(), {}, "safetensors")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"at least {size} bytes expected, {size - 100} there"):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_random_damage_is_an_error_or_another_number(tmp_path, kind):
    """Bytes changed, removed, inserted: a UserError or a file that reads; never anything else."""
    generator = np.random.default_rng(2)
    path = tmp_path / "t"
    tensors = {name: array.reshape(-1)[:4] for name, array in small().items()}
    checkpoint.save(path, tensors, {**META, "model_config": "x"}, kind)
    data, refused = path.read_bytes(), 0
    for _ in range(600):
        damaged = bytearray(data)
        place = int(generator.integers(len(data)))
        change = generator.integers(4)
        if change == 0:
            damaged[place] = generator.integers(256)
        elif change == 1:
            damaged[place : place + int(generator.integers(1, 9))] = b""
        elif change == 2:
            damaged[place:place] = generator.bytes(int(generator.integers(1, 9)))
        else:
            damaged[place : place + 8] = b"\xff" * 8
        path.write_bytes(damaged)
        try:
            checkpoint.load(path)
        except UserError:
            refused += 1
    assert refused > 200


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(shape=[2, 3])}, "do not fit its shape"),
        ({"a": entry(shape=[-2, -2])}, "nothing usable"),
        ({"a": entry(shape=[2.0, 2])}, "nothing usable"),
        ({"a": entry(shape=[True, 4])}, "nothing usable"),
        ({"a": entry(shape="4")}, "nothing usable"),
        ({"a": entry(shape=[1] * 40 + [4])}, "impossible shape"),
        ({"a": entry(shape=[2**62, 2**62])}, "do not fit its shape"),
        ({"b": entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "a": entry()}, "impossible shape"),
        ({"a": entry(data_offsets=[0, 2**60])}, "do not fit its shape"),
        ({"a": entry(data_offsets=[16, 0])}, "do not"),
        ({"a": entry(data_offsets=[0, 8, 16])}, "no place"),
        ({"a": entry(data_offsets=[4, 20])}, "do not follow"),
        ({"a": entry(), "b": entry()}, "do not follow"),
        ({"a": entry(dtype="F8_E4M3")}, "holds a as F8_E4M3"),
        ({"a": entry(dtype=["F32"])}, "holds a as"),
        ({"a": entry(dtype=None)}, "holds a as"),
        ({"a": 3}, "nothing usable"),
        ({"a": entry(shape=[2], data_offsets=[0, 8])}, "8 bytes more"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__"),
        ({"a": entry(), "__metadata__": ["x"]}, "__metadata__"),
        ({}, "16 bytes more"),
    ],
)
def test_wrong_safetensors_headers(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "t")


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": ',
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 3}',
        b"{" + b'"a": {' * 100_000,
        b'{"\xff": 3}',
        b'{"a": {"shape": [' + b"9" * 5000 + b"]}}",
    ],
    ids=["cut", "twice", "deep", "no utf-8", "huge"],
)
def test_unreadable_safetensors_headers(tmp_path, text):
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(tmp_path / "t")


def field(number, content):
    return bytes([number << 3 | 2]) + mindspore_file._to_varint(len(content)) + content


def parameter(tag=b"a", dims=(1,), kind=b"Float32", content=b"1234"):
    tensor = b"".join(b"\x08" + mindspore_file._to_varint(dim) for dim in dims)
    tensor += field(2, kind) + field(3, content)
    return field(1, field(1, tag) + field(2, tensor))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (parameter(dims=(2,)), "a needs 8 bytes, 4 there"),
        (parameter(dims=(2**63,)), "no usable shape"),
        (parameter(dims=(2**62, 2**62, 4)), "truncated or damaged"),
        (parameter(dims=(0, 2**62, 2**62), content=b""), "impossible shape"),
        (parameter(dims=(1,) * 40), "impossible shape"),
        (parameter(kind=b"Float31"), "holds a as Float31"),
        (parameter(kind=b"\xff"), "not utf-8"),
        (parameter(tag=b"\xff"), "not utf-8"),
        (parameter(kind=b"str", content=b"123"), "not utf-32"),
        (parameter() + parameter(b"b") + parameter(), "holds a twice"),
        (parameter() + parameter(kind=b"Int32"), "holds a twice"),
        (parameter() + parameter(), "a needs 4 bytes, 8 there"),
        (field(1, field(1, b"a")), "field 2 is missing"),
        (field(1, field(1, b"a") + field(2, field(2, b"Float32"))), "field 3 is missing"),
        (field(1, field(1, b"a") + field(3, b"")), "map parameter"),
        (field(1, field(1, b"a") + b"\x10\x05"), "field 2 is missing or no bytes"),
        (field(1, field(1, b"a") + b"\x12\x7f"), "longer than what it is in"),
        (field(1, field(1, b"a") + b"\x15\x7f\x00\x00\x00"), "wire type 5"),
        (parameter() + b"\x08\x05", "without content"),
        (parameter() + field(9, b"x"), "unknown field 9"),
        (parameter() + bytes(20), "unknown field 0"),
        (parameter() + b"\x0a" + b"\xff" * 11, "number without end"),
        (parameter(kind=b"str", content="v".encode("utf-32-le")), "no parameters"),
    ],
)
def test_wrong_mindspore_messages(tmp_path, data, said):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(UserError, match=said):
        checkpoint.load(tmp_path / "t")


def test_scalars_of_older_mindspore(tmp_path):
    (tmp_path / "t").write_bytes(parameter(dims=(0,), content=np.float32(2.5).tobytes()))
    scalar = checkpoint.load(tmp_path / "t").tensors["a"]
    assert scalar.shape == ()
    assert scalar == 2.5


def test_checksum_of_mindspore(tmp_path):
    data = parameter() + parameter(b"b")
    (tmp_path / "t").write_bytes(data + b"crc_num" + zlib.crc32(data).to_bytes(10, "big"))
    assert checkpoint.load(tmp_path / "t").tensors.keys() == {"a", "b"}
    (tmp_path / "t").write_bytes(data + b"crc_num" + bytes(10))
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"\x80\x04K\x01." + bytes(100), "a Python pickle, but not one of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"\n\n<!DOCTYPE html><html>Not found", "web page"),
        (b"<html>", "web page"),
        (b'{"weight_map": {}}', "JSON"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "no checkpoint of a kind known here"),
        (bytes(100), "no checkpoint of a kind known here"),
        (b"\xff" * 8 + b"{" + bytes(100), "no checkpoint of a kind known here"),
        (b"hello", "truncated"),
    ],
)
def test_other_files_are_named(tmp_path, data, said):
    path = tmp_path / "model.ckpt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(str(path))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="none.ckpt does not exist"):
        checkpoint.load(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="is a folder, but no diffusers pipeline"):
        checkpoint.load(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        checkpoint.load(tmp_path / "file" / "model.ckpt")


# ---- writing ----


@pytest.mark.parametrize("kind", FORMATS)
def test_full_disk_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "sd-1.ckpt"
    tensors = {UNET + "out.0.weight": np.arange(10, dtype=np.float32)}
    checkpoint.save(path, tensors, {"step": "1"}, kind)
    too_much = {UNET + "out.0.weight": np.zeros(100_000, np.float32)}
    full = pytest.raises(UserError, match="cannot write .*sd-1.ckpt: File too large; the previous file is intact")
    with full, files_of_at_most(4096):
        checkpoint.save(path, too_much, {"step": "2"}, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["sd-1.ckpt"]
    assert checkpoint.load(path).meta == {"step": "1"}
    assert_same(checkpoint.load(path).tensors, tensors)

    full = pytest.raises(UserError, match="sd-2.ckpt: File too large; nothing is left behind")
    with full, files_of_at_most(4096):
        checkpoint.save(tmp_path / "sd-2.ckpt", too_much, {}, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["sd-1.ckpt"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="Not a directory; nothing is left behind"):
        checkpoint.save(tmp_path / "file" / "t.ckpt", small(), {}, "mindspore")
    with pytest.raises(UserError, match="No such file or directory"):
        checkpoint.save(tmp_path / "none" / "t.ckpt", small(), {}, "safetensors")
    with pytest.raises(UserError, match="cannot write .*folder"):
        checkpoint.save(tmp_path / "folder", small(), {}, "safetensors")
    assert {file.name for file in tmp_path.iterdir()} == {"file", "folder"}
    with pytest.raises(UserError, match="unknown checkpoint format 'pickle'; choose one of mindspore, safetensors"):
        checkpoint.save(tmp_path / "t", small(), {}, "pickle")


def test_a_file_being_read_may_be_replaced(tmp_path):
    path = tmp_path / "t"
    checkpoint.save(path, small(), {}, "safetensors")
    loaded = checkpoint.load(path)
    checkpoint.save(path, {name: array * 0 for name, array in small().items()}, {}, "safetensors")
    assert_same({name: loaded.tensors[name] for name in small()}, small())


# ---- match ----


def test_match_gives_what_the_network_wants():
    tensors = {**small(), "model_ema.decay": np.ones(1), "betas": np.ones(1000)}
    tensors["sqrt_recipm1_alphas_cumprod"] = np.ones(1000)
    for name in ("logit_scale", "text_projection", "transformer.resblocks.23.ln_1.weight", "attn_mask"):
        tensors[f"cond_stage_model.model.{name}"] = np.ones(1)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.ones((1, 77))
    tensors["first_stage_model.loss.logvar"] = np.ones(())
    assert_same(checkpoint.match(tensors, shapes(small()), "f.ckpt"), small())


def test_extras_are_only_passed_over_where_the_network_has_none():
    last = "cond_stage_model.model.transformer.resblocks.23.ln_1.weight"
    tensors = {last: np.ones(3)}
    assert checkpoint.match(tensors, {last: (3,)}, "f").keys() == {last}
    for table in ("sd1_parameters_stability", "sd2_parameters"):
        assert not [row for row in rows(table) if names.is_extra(row[-2])]


def test_match_says_what_does_not_fit():
    expected = {f"a.{n}": (n + 1,) for n in range(9)}
    tensors = {f"a.{n}": np.ones(n + 1) for n in range(5, 9)}
    tensors["a.7"] = np.ones((8, 1))
    tensors["b"] = np.ones(1)
    with pytest.raises(UserError) as error:
        checkpoint.match(tensors, expected, "some.ckpt")
    assert str(error.value) == (
        "some.ckpt does not fit this model: missing 5 (first: a.0, a.1, a.2), unexpected 1 (first: b), "
        "wrong shape 1 (first: a.7 has (8, 1), model wants (8,)); is it of another model config?"
    )


def test_match_of_a_part():
    unet = {name: array for name, array in small().items() if name.startswith(UNET)}
    others = {"lora.x": np.ones(2)}
    assert_same(checkpoint.match({**unet, **others}, shapes(small()), "f", (UNET,)), unet)
    with pytest.raises(UserError, match="missing 3"):
        checkpoint.match(unet, shapes(small()), "f")
    with pytest.raises(UserError, match=r"unexpected 1 .first: model.diffusion_model.more"):
        checkpoint.match({**unet, UNET + "more": np.ones(1)}, shapes(small()), "f", (UNET,))
