"""Adapters: every form read and written, added to weights, taken from them, and damaged files."""

import contextlib
import csv
import gzip
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm import checkpoint
from ldm.checkpoint import formats, lora, names
from ldm.checkpoint.lora import Adapter, Pair, naming
from ldm.errors import UserError
from ldm.parts import UNET

REFERENCE = Path(__file__).parent / "data" / "reference"
SD = names.Scheme(4, 2, (False, True, True, True))
XL = names.Scheme(3, 2, (True, True, False))
LAYOUTS = {
    "sd1": lora.Layout(SD, {"text_encoder": "cond_stage_model.transformer.text_model."}, False),
    "sd2": lora.Layout(SD, {"text_encoder": "cond_stage_model.model."}, False),
    "sdxl": lora.Layout(
        XL,
        {
            "text_encoder": "cond_stage_model.embedders.0.transformer.text_model.",
            "text_encoder_2": "cond_stage_model.embedders.1.model.",
        },
        True,
    ),
}
SUFFIXES = {"peft": "", "diffusers": ".safetensors", "kohya": ".safetensors", "mindone": ".ckpt"}
TINY = "models/tiny-vpred.safetensors"
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def rows(model):
    """The modules of a published model, a table each."""
    with gzip.open(REFERENCE / "lora_modules.tsv.gz", "rt", newline="") as file:
        return [row for row in csv.DictReader(file, delimiter="\t") if row["model"] == model]


def module(row):
    return f"{row['part']}.{row['diffusers_module']}"


def pair(inputs, outputs, rank=2, alpha=None, seed=0, kernel=None):
    rng = np.random.default_rng([seed, inputs, outputs])
    shapes = ((rank, inputs), (outputs, rank)) if kernel is None else (
        (rank, inputs, kernel, kernel), (outputs, rank, 1, 1))  # fmt: skip
    down, up = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return Pair(down, up, float(rank if alpha is None else alpha))


def adapter(model, attention=False):
    """A random one with all modules of a model, in mixed ranks and alphas; `attention`: MindONE's layers alone."""
    pairs = {}
    for n, row in enumerate(rows(model)):
        if attention and row["mindone_down"] == "-":
            continue
        kernel = 1 if "1x1" in row["note"] else None
        rank = 2 + n % 3
        pairs[module(row)] = pair(int(row["in"]), int(row["out"]), rank, rank * (1, 0.5, 4)[n % 3], n, kernel)
    return Adapter(pairs, {"prediction_type": "v"}, "diffusers")


def equal(one, two):
    assert one.pairs.keys() == two.pairs.keys()
    for name, (down, up, alpha) in one.pairs.items():
        there = two.pairs[name]
        assert np.array_equal(down, there.down) and np.array_equal(up, there.up) and alpha == there.alpha, name


@pytest.fixture(scope="module")
def tiny():
    return checkpoint.load(TINY)


# ---- names ----


def weights(model):
    """Our names of a model's weights that a LoRA changes, and of those that tell its layout, with their shapes."""
    if model == "sdxl":
        scaffold = ("label_emb.0.0", "input_blocks.3.0.op", "output_blocks.0.1.norm", "output_blocks.3.1.norm")
        shapes = {f"{UNET}{name}.weight": () for name in scaffold}
        for row in rows(model):
            name, merged, _ = row["stability_module"].partition(" rows")
            name = name.replace("conditioner.", "cond_stage_model.", 1) + ("" if merged else ".weight")
            shapes[name] = (int(row["out"]) * (3 if merged else 1), int(row["in"]))
        return shapes
    table = {"sd1": "sd1_parameters_stability", "sd2": "sd2_parameters"}[model]
    with gzip.open(REFERENCE / f"{table}.tsv.gz", "rt") as file:
        shapes = dict(line.rstrip("\n").split("\t")[-2:] for line in file)
    return {name: tuple(int(n) for n in shape.split(",")) for name, shape in shapes.items() if shape != "shape"}


@pytest.mark.parametrize("model", LAYOUTS)
def test_every_module_is_our_parameter_and_back(model):
    shapes = weights(model)
    layout = lora.layout_of(shapes)
    assert layout == LAYOUTS[model]
    for row in rows(model):
        name, which = lora.parameter(module(row), layout)
        assert shapes[name][:2] == (int(row["out"]) * (1 if which is None else 3), int(row["in"]))
        if which is None:
            ours = row["stability_module"].replace("conditioner.", "cond_stage_model.", 1)
            assert name == f"{ours}.weight"
        assert lora.module(name, layout, which) == module(row)


def test_the_refiners_only_text_encoder_is_the_second_one(tmp_path):
    name = "cond_stage_model.model.transformer.resblocks.3.attn.out_proj.weight"
    layout = lora.layout_of([f"{UNET}label_emb.0.0.weight", name])
    layer = lora.module(name, layout)
    assert layer == "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj"
    assert lora.parameter(layer, layout) == (name, None)
    config = {"model": {"unet": {"adm_in_channels": 2560, "num_res_blocks": 2}, "text_2": None}}
    one = Adapter({layer: pair(1280, 1280), TO_Q: pair(8, 8)}, {"model_config": json.dumps(config)}, "peft")
    lora.save(tmp_path / "x.ckpt", one, "mindone")
    inside_file = "conditioner.embedders.0.model.transformer.resblocks.3.attn.out_proj.lora_A.weight"
    tensors, strings, _ = formats.read(tmp_path / "x.ckpt")
    assert inside_file in tensors
    equal(lora.load(tmp_path / "x.ckpt"), one)
    wrapped = {name.replace(".lora_", "._backbone.lora_"): array for name, array in tensors.items()}
    formats.write(tmp_path / "wrapped.ckpt", wrapped, strings, "mindspore")
    equal(lora.load(tmp_path / "wrapped.ckpt"), one)
    lora.save(tmp_path / "k", one, "kohya")
    assert formats.read(tmp_path / "k")[1]["modelspec.architecture"] == "stable-diffusion-xl-v1-refiner/lora"


@pytest.mark.parametrize("model", LAYOUTS)
def test_names_in_files_are_those_that_others_read(tmp_path, model):
    """All names, and no others: an SDXL file of kohya's has Stability's names, and its encoder one a number."""
    whole, part = adapter(model), adapter(model, attention=True)
    for form in ("kohya", "diffusers", "peft"):
        lora.save(tmp_path / form, whole, form)
    lora.save(tmp_path / "mindone", part, "mindone")
    read = {form: set(formats.read(tmp_path / form)[0]) for form in ("kohya", "diffusers", "mindone")}
    columns = {"kohya": "kohya_down", "diffusers": "diffusers_A", "mindone": "mindone_down"}
    wanted = {form: {row[column] for row in rows(model)} - {"-"} for form, column in columns.items()}
    for form, first in (("kohya", "lora_down"), ("diffusers", "lora_A"), ("mindone", "lora_(down|A)")):
        assert {name for name in read[form] if re.search(first, name)} == wanted[form]
    assert len(read["kohya"]) == 3 * len(whole.pairs) and len(read["diffusers"]) == 2 * len(whole.pairs)
    folders = {"unet": "unet", "text_encoder": "text_encoder_one", "text_encoder_2": "text_encoder_two"}
    assert {folder.name for folder in (tmp_path / "peft").iterdir()} == {folders[row["part"]] for row in rows(model)}
    for part, folder in folders.items():
        downs = {row["peft_A"] for row in rows(model) if row["part"] == part}
        if part == "text_encoder":
            downs |= {name.replace(".text_model", "") for name in downs}
        if downs:
            there = set(formats.read(tmp_path / "peft" / folder / "adapter_model.safetensors")[0])
            assert there == downs | {name.replace("lora_A", "lora_B") for name in downs}


@pytest.mark.parametrize("model", LAYOUTS)
@pytest.mark.parametrize("column", ["peft_A", "diffusers_A", "diffusers_old_down", "kohya_down", "mindone_down"])
def test_names_of_others_are_read(model, column):
    wanted = {}  # by name and part: PEFT's folders say the part
    for row in rows(model):
        if row[column] != "-":
            wanted.setdefault((row[column], row["part"]), set()).add(module(row))
    form, places = naming.entries({name for name, _ in wanted})
    assert form == column.split("_")[0] and {place.way for place in places.values()} == {"down"}
    found = {place.module for place in places.values()}
    layout = naming.file_layout(naming.depth_of_counted(found), bool(naming.is_xl(found)))
    for (name, part), modules in wanted.items():
        assert {each for each, _ in naming.modules_of(form, places[name].module, part, layout)} == modules


def test_older_names_of_diffusers_are_read(tmp_path):
    q, text = pair(8, 8), pair(4, 4)
    unet, encoder = TO_Q.removeprefix("unet."), Q_PROJ
    forms = [
        {"unet.{m}.lora.{w}.weight": q, encoder + ".lora_linear_layer.{w}.weight": text},
        {"unet." + unet.replace("to_q", "processor.to_q_lora") + ".{w}.weight": q},
        {unet.replace("to_q", "processor.to_q_lora") + ".{w}.weight": q},
        {"unet." + unet.replace("to_q", "processor.to_out_lora") + ".{w}.weight": q},
        {encoder.replace("text_model.", "") + ".lora_linear_layer.{w}.weight": text},
    ]
    wanted = [{TO_Q, Q_PROJ}, {TO_Q}, {TO_Q}, {TO_Q.replace("to_q", "to_out.0")}, {Q_PROJ}]
    for form, modules in zip(forms, wanted):
        tensors = {
            name.format(m=unet, w=way): getattr(each, way) for name, each in form.items() for way in ("down", "up")
        }
        formats.write(tmp_path / "t", tensors, {}, "safetensors")
        read = lora.load(tmp_path / "t")
        assert read.pairs.keys() == modules and read.form == "diffusers"
        assert all(each.alpha == each.rank for each in read.pairs.values())


# ---- round trips ----


@pytest.mark.parametrize("model", LAYOUTS)
@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_what_is_written_is_read_to_the_last_bit(tmp_path, model, form):
    whole = adapter(model)
    path = tmp_path / f"x{SUFFIXES[form]}"
    lora.save(path, whole, form, resolution="768x768")
    assert lora.is_adapter(path)
    read = lora.load(path)
    equal(whole, read)
    assert read.form == form and read.meta["prediction_type"] == "v" and read.meta["resolution"] == "768x768"
    with pytest.raises(UserError, match="LoRA.*--lora_ckpt_path"):
        checkpoint.load(path)


@pytest.mark.parametrize("model", LAYOUTS)
def test_mindones_form_keeps_every_product(tmp_path, model, caplog):
    """One rank for all layers: SD's merged in_proj wants that of q, k and v together; SDXL's has no LoRA."""
    caplog.set_level(logging.INFO)
    part = adapter(model, attention=True)
    lora.save(tmp_path / "x.ckpt", part, "mindone")
    rank, down = (4, "lora_A") if model == "sdxl" else (9, "lora_down")
    told = "q, k and v become one in_proj in blocks, which is exact: rank 9, not 4"
    assert (told in caplog.text) == (model != "sdxl")
    tensors = formats.read(tmp_path / "x.ckpt")[0]
    assert tensors.get("lora_rank") == (None if model == "sdxl" else 9)
    assert {len(array) for name, array in tensors.items() if down in name} == {rank}
    read = lora.load(tmp_path / "x.ckpt")
    assert lora.is_adapter(tmp_path / "x.ckpt")
    assert read.form == "mindone" and read.pairs.keys() == part.pairs.keys()
    assert all(read.pairs[name].rank == each.rank for name, each in part.pairs.items())
    for name, each in list(part.pairs.items())[::5]:
        assert np.array_equal(read.pairs[name].product(), each.product()), name


def test_an_in_proj_that_shares_its_a_keeps_its_rank(tmp_path):
    down, q = np.ones((2, 8), np.float32), pair(8, 8)
    thirds = {Q_PROJ.replace("q_proj", f"{x}_proj"): Pair(down, q.up * n, 2.0) for n, x in enumerate("qkv", 1)}
    lora.save(tmp_path / "x.ckpt", Adapter(thirds, {}, "peft"), "mindone")
    assert formats.read(tmp_path / "x.ckpt")[0]["lora_rank"] == 2
    equal(lora.load(tmp_path / "x.ckpt"), Adapter(thirds, {}, ""))


def test_mindones_scale_is_the_callers(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    one = Adapter({TO_Q: pair(8, 8, 2, alpha=1.4)}, {}, "peft")
    lora.save(tmp_path / "exact.ckpt", one, "mindone", scale=0.7)
    assert "rounded" not in caplog.text
    equal(lora.load(tmp_path / "exact.ckpt", scale=0.7), one)
    lora.save(tmp_path / "folded.ckpt", one, "mindone")
    assert "B is multiplied by alpha / rank / --lora_scale (0.7) and rounded" in caplog.text
    folded = lora.load(tmp_path / "folded.ckpt").pairs[TO_Q]
    assert np.allclose(folded.product(), one.pairs[TO_Q].product(), atol=1e-6)


def test_layers_that_mindone_lacks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has attention layers alone, and 110 of 284 are others \(first: model"):
        lora.save(tmp_path / "x.ckpt", adapter("sd2"), "mindone")
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(UserError, match=r"second text encoder: out_proj alone\), and 1 of 1 are others"):
        lora.save(tmp_path / "x.ckpt", Adapter({layer: pair(8, 8)}, {}, "peft"), "mindone")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", lora.FORMS)
def test_a_narrow_type_and_any_depth(tmp_path, tiny, form):
    """The tiny model has one residual block at a level; float16 rounds the matrices and no alpha."""
    layout = lora.layout_of(tiny.tensors)
    names_ = [name for name in tiny.tensors if re.search(r"attn\d\.to_(q|out).*weight", name)]
    modules = [lora.module(name, layout) for name in names_]
    assert "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q" in modules
    tall = Adapter({name: pair(16, 16, 4, 4 / 3 if form != "mindone" else 4) for name in modules}, {}, "peft")
    path = tmp_path / f"x{SUFFIXES[form]}"
    facts = {"model_config": tiny.meta["model_config"]} if form == "kohya" else {}  # else told by the names
    lora.save(path, tall, form, "float16", **facts)
    read = lora.load(path)
    assert read.pairs.keys() == tall.pairs.keys()
    for name, each in read.pairs.items():
        assert each.down.dtype == np.float16 and each.alpha == tall.pairs[name].alpha
        assert np.array_equal(each.up, tall.pairs[name].up.astype(np.float16))


@pytest.mark.parametrize(
    ("model", "base", "two", "architecture"),
    [
        ("sd1", "sd_v1", "False", "stable-diffusion-v1"),
        ("sd2", "sd_v2_v", "True", "stable-diffusion-v2-768-v"),
        ("sdxl", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base"),
    ],
)
def test_what_the_files_say_to_others(tmp_path, model, base, two, architecture):
    schedule = json.dumps({"zero_terminal_snr": True})
    whole = adapter(model)
    lora.save(tmp_path / "k", whole, "kohya", schedule=schedule, resolution="1024x1024")
    said = formats.read(tmp_path / "k")[1]
    assert said["ss_base_model_version"] == base and said["ss_v2"] == two
    assert said["modelspec.architecture"] == f"{architecture}/lora" and said["modelspec.resolution"] == "1024x1024"
    assert said["modelspec.prediction_type"] == "v" and said["ss_v_parameterization"] == "True"
    assert said["ss_zero_terminal_snr"] == "True"
    lora.save(tmp_path / "d", whole, "diffusers")
    table = json.loads(formats.read(tmp_path / "d")[1]["lora_adapter_metadata"])
    keys = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
    assert table.keys() == {f"{part}.{key}" for part in ("unet", *LAYOUTS[model].texts) for key in keys}
    lora.save(tmp_path / "p", whole, "peft")
    for folder in (tmp_path / "p").iterdir():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and len(config) == 18
    formats.write(tmp_path / "v", formats.read(tmp_path / "k")[0], {"ss_v_parameterization": "True"}, "safetensors")
    assert lora.load(tmp_path / "v").meta["prediction_type"] == "v"


def test_configs_of_peft(tmp_path):
    """One folder of one part; patterns by the ends of names; the root of the rank; kohya's alpha 0."""
    lora.save(tmp_path / "x", Adapter({TO_Q: pair(8, 8, 4)}, {}, "peft"), "peft")
    folder = tmp_path / "x/unet"
    for config, alpha in (
        ({"r": 4, "lora_alpha": 8}, 8),
        ({"r": 4}, 4),
        ({"lora_alpha": 8, "use_rslora": True}, 16),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2, "attn2.to_q": 3}}, 2),
        ({"lora_alpha": 8, "alpha_pattern": {r"^down_blocks\.0\.attentions\.0\.x$": 2}}, 8),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        for path in (folder, tmp_path / "x", folder / "adapter_model.safetensors"):
            assert lora.load(path).pairs[TO_Q].alpha == alpha
    tensors = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{w}": a for w, a in
               (("lora_down.weight", np.ones((2, 4), np.float32)), ("lora_up.weight", np.ones((8, 2), np.float32)),
                ("alpha", np.zeros((), np.float32)))}  # fmt: skip
    formats.write(tmp_path / "k", tensors, {}, "safetensors")
    assert lora.load(tmp_path / "k").pairs["text_encoder.text_model.encoder.layers.0.mlp.fc1"].alpha == 2


def test_a_folder_is_replaced_only_where_it_is_an_adapter(tmp_path):
    one, two = (Adapter({TO_Q: pair(8, 8, rank)}, {}, "peft") for rank in (1, 2))
    lora.save(tmp_path / "x", one, "peft")
    lora.save(tmp_path / "x", two, "peft")
    equal(lora.load(tmp_path / "x"), two)
    (tmp_path / "y").mkdir()
    (tmp_path / "y/mine").touch()
    with pytest.raises(UserError, match="y exists and is no LoRA"):
        lora.save(tmp_path / "y", one, "peft")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_a_model_and_a_training_state_are_no_adapter(tmp_path):
    assert not lora.is_adapter(TINY) and not lora.is_adapter(tmp_path)
    layer = f"{UNET}input_blocks.1.1.to_q"
    state = {f"{layer}.{n}": np.ones((2, 2), np.float32) for n in ("linear.weight", "lora_up.weight")}
    formats.write(tmp_path / "s", {**state, f"adam_m.{layer}": np.ones(2)}, {}, "safetensors")
    assert not lora.is_adapter(tmp_path / "s")


# ---- added to weights ----


def some(tiny):
    """Adapters of the tiny model: a self-attention, q and v of the text encoder, a 3x3 convolution."""
    channels = tiny.tensors[f"{UNET}input_blocks.7.1.transformer_blocks.0.attn1.to_q.weight"].shape[0]
    unet = "unet.down_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q"
    conv = "unet.down_blocks.3.resnets.0.conv1"
    shape = tiny.tensors[lora.parameter(conv, lora.layout_of(tiny.tensors))[0]].shape
    one = {unet: pair(channels, channels, 3, 1.5), Q_PROJ: pair(128, 128, 2, 1)}
    two = {Q_PROJ: pair(128, 128, 2, 1, seed=3), Q_PROJ.replace("q_", "v_"): pair(128, 128, 4, 1),
           conv: pair(shape[1], shape[0], 2, 2, kernel=3)}  # fmt: skip
    return Adapter(one, {}, "peft", "one"), Adapter(two, {}, "kohya", "two")


def test_adapters_are_added_to_the_weights_they_touch(tiny):
    one, two = some(tiny)
    before = {name: array.copy() for name, array in tiny.tensors.items()}
    got = lora.merged(tiny.tensors, [(one, 0.8), (two, -0.5)])
    changed = {name for name in got if got[name] is not tiny.tensors[name]}
    in_proj = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    to_q, conv = (f"{UNET}input_blocks.7.{n}.weight" for n in ("1.transformer_blocks.0.attn1.to_q", "0.in_layers.2"))
    assert changed == {in_proj, to_q, conv}
    assert all(np.array_equal(before[name], array) for name, array in tiny.tensors.items())

    def product(down, up, alpha):
        return alpha / len(down) * np.tensordot(up.reshape(len(up), -1).astype(float), down.astype(float), 1)

    wanted = {name: before[name].astype(float) for name in changed}
    q, v = Q_PROJ, Q_PROJ.replace("q_", "v_")
    wanted[in_proj][:128] += 0.8 * product(*one.pairs[q]) - 0.5 * product(*two.pairs[q])
    wanted[in_proj][256:] -= 0.5 * product(*two.pairs[v])
    wanted[to_q] += 0.8 * product(*next(iter(one.pairs.values())))
    wanted[conv] -= 0.5 * product(*list(two.pairs.values())[-1])
    for name in changed:
        assert got[name].dtype == np.float32
        assert np.array_equal(got[name], wanted[name].astype(np.float32)) or np.allclose(
            got[name], wanted[name], rtol=1e-6, atol=1e-7
        )


def test_sdxls_two_text_encoders_have_adapters_of_their_own(caplog):
    """The first one's q_proj is a weight, the second one's a third of its in_proj."""
    caplog.set_level(logging.INFO)
    one = "cond_stage_model.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    two = "cond_stage_model.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight"
    in_proj = "cond_stage_model.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    shapes = {one: (8, 8), two: (64, 16), in_proj: (48, 16)}
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    second = Q_PROJ.replace("text_encoder", "text_encoder_2")
    pairs = {Q_PROJ: pair(8, 8), second.replace("q_", "k_"): pair(16, 16)}
    pairs[second.replace("self_attn.q_proj", "mlp.fc1")] = pair(16, 64)
    got = lora.merged(base, [(Adapter(pairs, {}, "peft"), 0.5)])
    k = np.zeros((48, 16))
    first, k[16:32], fc = (0.5 * each.product() for each in pairs.values())
    for name, wanted in ((one, first), (in_proj, k), (two, fc)):
        np.testing.assert_allclose(got[name], wanted, rtol=1e-6)
    assert lora.difference(got, base, 2).pairs.keys() == pairs.keys() and "holds 100.0 %" in caplog.text


def test_a_1x1_convolution_and_a_linear_layer_are_one(tiny):
    name = f"{UNET}input_blocks.7.1.proj_in.weight"
    width = len(tiny.tensors[name])
    layer = "unet.down_blocks.3.attentions.0.proj_in"
    flat, conv = pair(width, width), pair(width, width, kernel=1)
    bases = (tiny.tensors[name], tiny.tensors[name][:, :, None, None])
    results = [
        lora.merged({**tiny.tensors, name: base}, [(Adapter({layer: each}, {}, ""), 1.0)])[name]
        for base in bases
        for each in (flat, conv)
    ]
    assert results[0].shape == (width, width) and results[3].shape == (width, width, 1, 1)
    assert all(np.array_equal(results[0].ravel(), each.ravel()) for each in results)


def test_half_precision_becomes_single_where_it_is_touched(tiny):
    one, _ = some(tiny)
    half = {name: array.astype(np.float16) for name, array in tiny.tensors.items()}
    got = lora.merged(half, [(one, 1.0)])
    assert {got[name].dtype for name in got if got[name] is not half[name]} == {np.dtype(np.float32)}
    assert sum(got[name] is half[name] for name in got) == len(half) - 2


def test_a_misfit_is_one_line(tiny):
    with pytest.raises(UserError) as error:
        lora.merged(tiny.tensors, [(adapter("sd2"), 1.0)])
    line = str(error.value)
    assert re.match(
        r"the LoRA does not fit this model: \d+ of its \d+ layers are not in it \(first: unet\..*\), ", line
    )
    assert re.search(r"\d+ have another shape \(first: .* is for \(.*\), model has .*; is it of another base\?", line)
    for model, other, said in (("sdxl", "sd2", "SDXL, the model is of Stable Diffusion 1.x or 2.x"),
                               ("sd2", "sdxl", "Stable Diffusion 1.x or 2.x, the model is of SDXL"),
                               ("sd1", "sdxl", "Stable Diffusion 1.x or 2.x, the model is of SDXL")):  # fmt: skip
        tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in weights(other).items()}
        with pytest.raises(UserError, match=f"^the LoRA is a LoRA of {said}: choose a LoRA of this model$"):
            lora.merged(tensors, [(adapter(model), 1.0)])
    said = json.dumps({"model": {"unet": {"adm_in_channels": 2816}}})
    for meta in ({"model_config": said}, {"ss_base_model_version": "sdxl_base_v1-0"}):  # where the layers do not tell
        with pytest.raises(UserError, match="is a LoRA of SDXL, the model is of Stable Diffusion"):
            lora.check_family(Adapter({Q_PROJ: pair(4, 4)}, meta, "kohya"), lora.layout_of(tiny.tensors))
    lora.check_family(Adapter({Q_PROJ: pair(4, 4)}, {}, "kohya"), lora.layout_of(tiny.tensors))
    v = Adapter({}, {"prediction_type": "v"}, "peft", "x")
    lora.check_type(v, "v")
    with pytest.raises(UserError, match="x was trained with prediction_type 'v', the model with 'eps'"):
        lora.check_type(v, "eps")


# ---- taken from weights ----


def test_a_difference_of_a_rank_is_found(tiny, caplog):
    caplog.set_level(logging.INFO)
    one, two = some(tiny)
    tuned = lora.merged(tiny.tensors, [(one, 1.0), (two, 1.0)])
    modules = [*one.pairs, *two.pairs]
    found = lora.difference(tuned, tiny.tensors, 4, modules)
    assert found.pairs.keys() == set(modules) and "holds 100.0 %" in caplog.text
    again = lora.merged(tiny.tensors, [(found, 1.0)])
    for name in tiny.tensors:
        size = np.abs(tuned[name] - tiny.tensors[name]).max()
        assert np.abs(again[name] - tuned[name]).max() <= 1e-5 * size, name
    linear = lora.difference(tuned, tiny.tensors, 4)
    assert linear.pairs.keys() == {name for name in modules if "conv1" not in name}
    small = lora.difference(tuned, tiny.tensors, 1, list(one.pairs)[:1])
    product, whole = small.pairs[list(one.pairs)[0]].product(), one.pairs[list(one.pairs)[0]].product()
    values = np.linalg.svd(whole, compute_uv=False)
    assert np.isclose(np.linalg.norm(whole - product), np.sqrt(np.square(values[1:]).sum()), rtol=1e-4)


def test_no_difference_and_other_models_are_refused(tiny):
    with pytest.raises(UserError, match="differ in no layer that a LoRA changes"):
        lora.difference(tiny.tensors, tiny.tensors, 4)
    some_of_it = dict(list(tiny.tensors.items())[5:])
    with pytest.raises(UserError, match="of different models: 5 of"):
        lora.difference(some_of_it, tiny.tensors, 4)


# ---- damage ----


def kohya(**changed):
    base = {"lora_down.weight": np.ones((2, 4), np.float32), "lora_up.weight": np.ones((4, 2), np.float32)}
    base = {**base, "alpha": np.ones((), np.float32), **changed}
    return {f"lora_unet_mid_block_attentions_0_proj_in.{name}": a for name, a in base.items() if a is not None}


TENSORS = {
    "NaN alpha": (kohya(alpha=np.array(np.nan, np.float32)), "alpha that is no finite number"),
    "infinite alpha": (kohya(alpha=np.array(np.inf, np.float32)), "alpha that is no finite number"),
    "two alphas": (kohya(alpha=np.ones(2, np.float32)), "alpha that is no finite number"),
    "up without down": (kohya(**{"lora_down.weight": None}), "has no A"),
    "down without up": (kohya(**{"lora_up.weight": None}), "has no B"),
    "alpha alone": (kohya(**{"lora_up.weight": None, "lora_down.weight": None}), "has no A"),
    "no product": (kohya(**{"lora_up.weight": np.ones((4, 3), np.float32)}), "do not multiply"),
    "rank 0": (kohya(**{"lora_down.weight": np.ones((0, 4), np.float32),
                        "lora_up.weight": np.ones((4, 0), np.float32)}), "rank 0"),
    "three dimensions": (kohya(**{"lora_up.weight": np.ones((4, 2, 1), np.float32)}), "no LoRA's"),
    "a wide B": (kohya(**{"lora_up.weight": np.ones((4, 2, 3, 3), np.float32),
                          "lora_down.weight": np.ones((2, 4, 3, 3), np.float32)}), "no LoRA's"),
    "integers": (kohya(**{"lora_up.weight": np.ones((4, 2), np.int32)}), "not as floating-point numbers"),
    "NaN": (kohya(**{"lora_up.weight": np.full((4, 2), np.nan, np.float32)}), "NaN or infinity"),
    "a third matrix": (kohya(**{"lora_mid.weight": np.ones((2, 2), np.float32)}), "names that are not known"),
    "DoRA": (kohya(dora_scale=np.ones((4, 1), np.float32)), "names that are not known"),
    "a model's": ({**kohya(), "conv_in.weight": np.ones(2, np.float32)}, "first: conv_in.weight"),
    "twice": ({**kohya(), **{f"lora_unet_middle_block_1_proj_in.{n}": a * 2 for n, a in
                             (("lora_down.weight", np.ones((2, 4), np.float32)),
                              ("lora_up.weight", np.ones((4, 2), np.float32)))}}, "twice, in two ways"),
    "an in_proj": ({f"cond_stage_model.transformer.transformer_layer.resblocks.0.attn.attn.in_proj.lora_{w}.weight": a
                    for w, a in (("down", np.ones((2, 4), np.float32)), ("up", np.ones((4, 2), np.float32)))},
                   "not q, k and v"),
    "PEFT's without a config": ({f"base_model.model.{TO_Q[5:]}.lora_{x}.weight": np.ones((2, 2), np.float32)
                                 for x in "AB"}, "no adapter_config.json beside it"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_damaged_tensors_are_one_line(tmp_path, what):
    tensors, said = TENSORS[what]
    formats.write(tmp_path / "x.safetensors", tensors, {}, "safetensors")
    refused(tmp_path / "x.safetensors", said)


def refused(path, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        lora.load(path)
    line = str(error.value)
    assert line.startswith(str(path)) or "cannot" in line
    assert line.isprintable() and len(line) < 500


CONFIGS = [
    ("[1]", "holds no table"),
    ("{", "is damaged"),
    ("[" * 100_000, "is damaged"),
    ('{"r": 2, "lora_alpha": "8"}', "lora_alpha or alpha_pattern is no number"),
    ('{"r": 2, "lora_alpha": NaN}', "lora_alpha or alpha_pattern is no number"),
    ('{"r": 2, "alpha_pattern": [1]}', "lora_alpha or alpha_pattern is no number"),
    ('{"r": 2, "alpha_pattern": {"(a+)+$": 1}}', "patterns are not read here"),
    ('{"lora_alpha": 2, "use_rslora": 3}', "use_rslora no truth value"),
    ('{"r": 2, "use_dora": true}', "says use_dora 'True'"),
    ('{"r": 2, "peft_type": "LOHA"}', "says peft_type 'LOHA'"),
    ('{"r": 2, "init_lora_weights": "pissa_niter_4"}', "fits a changed base alone"),
    ("{}", "lora_alpha or alpha_pattern is no number"),
]


@pytest.mark.parametrize(("text", "said"), CONFIGS)
def test_damaged_configs_are_one_line(tmp_path, text, said):
    lora.save(tmp_path / "x", Adapter({TO_Q: pair(4, 4)}, {}, "peft"), "peft")
    config = tmp_path / "x/unet/adapter_config.json"
    config.write_text(text)
    refused(tmp_path / "x", said)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):  # other texts are damaged as they are
        text = json.dumps({f"unet.{key}": value for key, value in json.loads(text).items()})
    tensors = {f"{TO_Q}.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}
    strings = {"lora_adapter_metadata": text}
    if text != "{}":  # a file that says nothing has alpha = rank
        formats.write(tmp_path / "d", tensors, strings, "safetensors")
        refused(tmp_path / "d", said)


def test_damaged_files_and_folders_are_one_line(tmp_path):
    lora.save(tmp_path / "x", Adapter({TO_Q: pair(4, 4), Q_PROJ: pair(4, 4)}, {}, "peft"), "peft")
    file = tmp_path / "x/unet/adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="truncated"):
        lora.load(tmp_path / "x")
    file.write_bytes(whole.replace(b'"shape":[4,2]', b'"shape":[9,9]'))
    with pytest.raises(UserError, match="do not fit its shape"):
        lora.load(tmp_path / "x")
    file.write_bytes(whole)
    shutil.copytree(tmp_path / "x/text_encoder_one", tmp_path / "x/text_encoder")
    refused(tmp_path / "x", "holds a part twice, in two folders")
    file.unlink()
    with pytest.raises(UserError, match="has adapter_config.json but no adapter_model.safetensors"):
        lora.load(tmp_path / "x")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is a folder, but no LoRA")
    with pytest.raises(UserError, match="does not exist"):
        lora.load(tmp_path / "nothing")
    both = {"prediction_type": "v", "modelspec.prediction_type": "epsilon"}
    formats.write(tmp_path / "c", kohya(), both, "safetensors")
    refused(tmp_path / "c", "contradicts itself: its prediction type is eps and v")
