"""What a file is: every kind by its names and shapes, what is refused, autoencoders alone, MindONE's training state."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import tiny_sdxl

from ldm import checkpoint
from ldm.checkpoint import arrays, formats, kinds, names
from ldm.config.model import load_model_config, to_dict
from ldm.errors import UserError
from ldm.parts import PARTS, TEXT, UNET, VAE

REFERENCE = Path(__file__).parent / "data" / "reference"
TINY = "models/tiny-vpred.safetensors"
XL, REFINER = (load_model_config(f"configs/sdxl-{name}inference.yaml") for name in ("", "refiner-"))
BLOCK = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
THEIRS = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def test_the_prefixes_of_parts_are_written_in_one_file():
    root = Path(kinds.__file__).parents[2]
    files = [
        *root.glob("*.py"),
        *(path for folder in ("ldm", "eval", "tools") for path in (root / folder).rglob("*.py")),
    ]
    spelt = {word for prefix in PARTS for word in (prefix, prefix.replace(".", r"\."))}
    holding = [path.name for path in files if any(word in path.read_text(encoding="utf-8") for word in spelt)]
    assert holding == ["parts.py"]


def blank(*shape):
    """An array of any size that takes one byte."""
    return np.broadcast_to(np.int8(0), shape)


def model(table):
    """The parameters of a published model, by Stability's names."""
    with gzip.open(REFERENCE / f"{table}.tsv.gz", "rt") as file:
        rows = [line.rstrip("\n").split("\t")[-2:] for line in file][1:]
    return {name: blank(*map(int, shape.split(","))) for name, shape in rows}


@pytest.fixture(scope="module")
def tiny():
    return checkpoint.load(TINY)


NAMES = [
    (f"lora_unet_{THEIRS.replace('.', '_')}.lora_down.weight", "a LoRA (kohya's names)"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA (kohya's names)"),
    (f"base_model.model.{THEIRS}.lora_A.weight", "a LoRA (PEFT's names)"),
    (f"unet.{THEIRS}.lora_A.weight", "a LoRA (diffusers' names)"),
    (f"unet.{THEIRS}.lora.up.weight", "a LoRA (diffusers' names)"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight", "a LoRA (diffusers'"),
    (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        "a LoRA (diffusers'",
    ),
    (f"{UNET}{BLOCK}.lora_down.weight", "a LoRA (MindONE's names)"),
    ("cond_stage_model.transformer.transformer_layer.resblocks.0.attn.attn.in_proj.lora_up.weight", "a LoRA (MindONE"),
    ("conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "a LoRA (MindO"),
    (f"lora_unet_{THEIRS.replace('.', '_')}.hada_w1_a", "a LyCORIS adapter"),
    ("control_model.zero_convs.0.0.weight", "a ControlNet"),
    (f"{UNET}controlnet.input_hint_block.0.conv.weight", "a ControlNet"),
    ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
    ("ip_adapter.1.to_k_ip.weight", "an IP adapter"),
    ("body.0.in_conv.weight", "a T2I adapter"),
    ("adapter.body.0.resnets.0.block1.weight", "a T2I adapter"),
    ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "a motion module"),
    ("double_blocks.0.img_attn.qkv.weight", "a model of Flux' kind"),
    (f"{UNET}joint_blocks.0.context_block.attn.qkv.weight", "a model of Stable Diffusion 3's kind"),
    ("transformer_blocks.0.attn1.to_q.weight", "a diffusion transformer"),
    ("edm_vpred.sigma_max", "a model of EDM's kind"),
    ("edm_mean", "a model of EDM's kind"),
    ("vision_model.embeddings.class_embedding", "a CLIP model"),
    ("visual.conv1.weight", "a CLIP model"),
    ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
    (f"{UNET}input_blocks.1.0.in_layers.2.weight.absmax", "a quantised model"),
]


@pytest.mark.parametrize(("name", "what"), NAMES)
def test_a_file_is_known_by_a_name_in_it(name, what):
    tensors = {"conv_in.weight": blank(320, 4, 3, 3), name: blank(4, 640)}
    assert kinds.recognise(tensors).name.startswith(what)
    renamed = names.from_part_alone(names.from_mindone(tensors))
    assert kinds.recognise(renamed).name.startswith(what)


@pytest.mark.parametrize(
    ("tensors", "strings"),
    [
        ({"<cat-toy>": blank(768)}, {}),
        ({"emb_params": blank(3, 1024)}, {}),
        ({"clip_g": blank(8, 1280), "clip_l": blank(8, 768)}, {}),
        ({f"{TEXT}transformer.embedding_table": blank(2, 1024), "num_vectors": blank()}, {}),
        ({f"{TEXT}model.token_embedding.weight": blank(1, 768)}, {"placeholder_token": "<cat-toy>"}),
    ],
)
def test_words_that_were_learnt_are_no_model(tensors, strings):
    assert kinds.recognise(tensors, strings) is kinds.TEXTUAL_INVERSION


def test_relatives_are_known_by_their_shapes():
    sd2, first = model("sd2_parameters"), UNET + "input_blocks.0.0.weight"
    assert kinds.recognise(sd2).name == "a model of Stable Diffusion 2.x"
    assert kinds.recognise(model("sd1_parameters_stability")).name == "a model of Stable Diffusion 1.x"
    for channels, what in ((9, "an inpainting model of Stable Diffusion 2.x"), (5, "a depth model of")):
        kind = kinds.recognise({**sd2, first: blank(320, channels, 3, 3)})
        assert kind.name.startswith(what) and kind.serves
    sd1 = {**model("sd1_parameters_stability"), first: blank(320, 9, 3, 3)}
    assert kinds.recognise(sd1).name == "an inpainting model of Stable Diffusion 1.x"
    assert not kinds.recognise({**sd2, first: blank(320, 8, 3, 3)}).serves
    label = UNET + "label_emb.0.0.weight"
    for width, what in ((2816, "a model of Stable Diffusion XL"), (2560, "the refiner"), (2048, "an unCLIP model")):
        assert kinds.recognise({**sd2, label: blank(1280, width)}).name.startswith(what)
    inpainting = kinds.recognise({**sd2, label: blank(1280, 2816), first: blank(320, 9, 3, 3)})
    assert inpainting.name.startswith("an inpainting model") and not inpainting.serves


def test_sdxl_is_a_model_and_so_are_its_parts():
    for config, name in ((XL, "a model of Stable Diffusion XL"), (REFINER, "the refiner of Stable Diffusion XL")):
        tensors = {name: blank(*shape) for name, shape in tiny_sdxl.parameters(config).items()}
        assert kinds.recognise(tensors).name == name and kinds.recognise(tensors).serves
        assert all(map(names.is_parameter, tensors))
        assert kinds.label_width(tensors) == config.unet.adm_in_channels
        for prefix in PARTS:
            part = {name: array for name, array in tensors.items() if name.startswith(prefix)}
            assert kinds.recognise(part).name.endswith("alone") and kinds.recognise(part).serves
    tiny = dict.fromkeys(tiny_sdxl.parameters(tiny_sdxl.tiny_sdxl_config()), blank(1))
    assert kinds.recognise(tiny) is None and all(map(names.is_parameter, tiny))


def test_the_models_here_are_not_refused(tiny):
    for tensors in (model("sd1_parameters_stability"), model("sd2_parameters"), tiny.tensors):
        kind = kinds.recognise(tensors)
        assert kind is None or kind.serves
        assert all(map(names.is_parameter, tensors))
        for prefix in PARTS:
            part = {name: array for name, array in tensors.items() if name.startswith(prefix)}
            assert kinds.recognise(part).serves and kinds.recognise(part).name.endswith("alone")


def test_load_refuses_what_is_no_model(tmp_path):
    lora = {f"{UNET}{BLOCK}.lora_{way}.weight": np.ones((4, 4), np.float32) for way in ("down", "up")}
    for kind in formats.FORMATS:
        formats.write(tmp_path / "lora", lora, {}, kind)
        with pytest.raises(UserError, match=r"lora is a LoRA \(MindONE's names\): give its base model here and"):
            checkpoint.load(tmp_path / "lora")
    formats.write(tmp_path / "state", {"a": np.ones(1)}, {"train_state": "{}"}, "safetensors")
    with pytest.raises(UserError, match="state is a run's resume state: give the checkpoint sd-N beside it"):
        checkpoint.load(tmp_path / "state")


def test_a_misfit_begins_with_what_the_file_is():
    sd1, sd2 = model("sd1_parameters_stability"), model("sd2_parameters")
    wanted = {name: array.shape for name, array in sd1.items()}
    with pytest.raises(
        UserError, match="x is a model of Stable Diffusion 2.x and does not fit this model: missing 196"
    ):
        checkpoint.match(sd2, wanted, "x")
    unet = {name: array for name, array in sd1.items() if name.startswith(UNET)}
    with pytest.raises(UserError, match="x is a UNet alone and does not fit .*--pretrained_model_path REST"):
        checkpoint.match(unet, wanted, "x")
    short = {name: array for name, array in sd1.items() if not name.endswith("time_embed.0.bias")}
    with pytest.raises(UserError, match=r"^x does not fit this model: missing 1 .*another model config"):
        checkpoint.match(short, wanted, "x")  # it is of the right kind


def test_names_that_are_not_known_are_refused(tiny):
    def check(tensors):
        checkpoint.check_names(checkpoint.Checkpoint(tensors, {}, "safetensors"), "x")

    check(tiny.tensors)
    check({**tiny.tensors, "model_ema.decay": blank(1), "betas": blank(1000)})
    with pytest.raises(UserError, match=r"x is no model .*: 1 of its \d+ tensors .*first: a\\nb"):
        check({**tiny.tensors, "a\nb": blank(1)})
    with pytest.raises(UserError, match="first: none"):
        check({"global_step": blank(1)})


def test_numbers_that_are_none_are_named():
    tensors = {"a": np.ones(3, np.float16), "b": np.full(3, 3e38, np.float32), "c": np.ones(2), "d": np.arange(3)}
    tensors["c"][1] = np.nan
    halves = np.array([0x3F80, 0x7F80], np.uint16).view([("bfloat16", "<u2")])  # 1, infinity
    assert checkpoint.not_finite({**tensors, "e": halves}) == ["c", "e"]


def test_a_config_of_another_model_is_noticed(tiny):
    own, sd2 = (to_dict(load_model_config(f"configs/{name}.yaml"))["model"] for name in ("tiny-vpred", "v2-inference"))
    assert kinds.contradiction(tiny.tensors, own) is None
    assert kinds.contradiction(model("sd2_parameters"), sd2) is None
    sd1 = model("sd1_parameters_stability")
    assert kinds.contradiction(sd1, sd2) == "model.unet.context_dim is 1024, the weights have 768"
    xl = to_dict(tiny_sdxl.tiny_sdxl_config())["model"]
    refiner = to_dict(tiny_sdxl.tiny_refiner_config())["model"]
    guided = {**own, "unet": {**own["unet"], "time_cond_proj_dim": 8}}
    told = set()
    for model_, tensors in (
        (guided, {**tiny.tensors, names.GUIDANCE: blank(64, 8)}),
        (own, tiny.tensors),
        (xl, {name: blank(*shape) for name, shape in tiny_sdxl.parameters(tiny_sdxl.tiny_sdxl_config()).items()}),
        (
            refiner,
            {name: blank(*shape) for name, shape in tiny_sdxl.parameters(tiny_sdxl.tiny_refiner_config()).items()},
        ),
    ):
        assert kinds.contradiction(tensors, model_) is None
        for section, key, *_ in kinds._SIZES:
            if (model_.get(section) or {}).get(key) is not None:
                told.add((section, key))
                other = {**model_, section: {**model_[section], key: 5}}
                assert kinds.contradiction(tensors, other).startswith(f"model.{section}.{key} is 5, the weights have")
    assert told == {(section, key) for section, key, *_ in kinds._SIZES}


# ---- autoencoders alone ----


def vae_alone(tiny, naming):
    """The tiny model's autoencoder as published ones are: without a prefix, in Stability's names or diffusers'."""
    own = {name: array for name, array in tiny.tensors.items() if name.startswith(VAE)}
    if naming == "diffusers":
        return names.to_diffusers(own)["vae"]
    return {**{name[len(VAE) :]: array for name, array in own.items()}, "loss.logvar": np.zeros(())}


@pytest.mark.parametrize("naming", ["stability", "diffusers", "diffusers, old"])
def test_a_published_autoencoder_serves(tmp_path, tiny, naming):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = vae_alone(tiny, naming.split(",")[0])
    for new, word in old.items() if "old" in naming else ():
        tensors = {name.replace(f".{new}.", f".{word}."): array for name, array in tensors.items()}
    formats.write(tmp_path / "vae", tensors, {}, "safetensors")
    scale = float(tiny.meta["scale_factor"])
    own = {name: np.zeros_like(array) if name.startswith(VAE) else array for name, array in tiny.tensors.items()}
    joined = checkpoint.with_vae({**own, VAE + "loss.logvar": np.zeros(())}, tmp_path / "vae", scale)
    assert joined.keys() == tiny.tensors.keys()
    assert all(np.array_equal(joined[name], array) for name, array in tiny.tensors.items())


def test_an_autoencoder_that_does_not_serve(tmp_path, tiny):
    unet = {name: array for name, array in tiny.tensors.items() if name.startswith(UNET)}
    checkpoint.save(tmp_path / "unet", unet, {}, "safetensors")
    with pytest.raises(UserError, match="unet is a UNet alone without an autoencoder"):
        checkpoint.load_vae(tmp_path / "unet", 0.18215)
    with pytest.raises(UserError, match="scales its latents by 0.855.*, the model by 0.18215"):
        checkpoint.load_vae(TINY, 0.18215)
    wide = {**vae_alone(tiny, "stability"), "encoder.conv_in.weight": np.zeros((64, 3, 3, 3), np.float32)}
    formats.write(tmp_path / "wide", wide, {}, "safetensors")
    with pytest.raises(UserError, match="wide does not fit this model: wrong shape 1"):
        checkpoint.with_vae(tiny.tensors, tmp_path / "wide", 0.18215)


# ---- MindONE's training state ----


def mindone_state(tensors, average):
    """What its train_resume.ckpt holds for these parameters, with the moving average `average` of some."""
    counters = {"learning_rate": np.ones(9, np.float32), "scale_sense": np.float32(1), "updates": np.float32(3)}
    counters["cur_step"], counters["epoch_num"] = np.int64(1), np.int64(2)
    state = {**tensors, **average, **{f"swap.{name}": tensors[name] for name in average}}
    for slot in ("ema", "adam_m", "adam_v", "grad_accumulated_"):
        state.update({f"{slot}.{name}": np.full_like(array, 9) for name, array in average.items()})
    return {**state, **{name: np.asarray(value) for name, value in counters.items()}}


def test_a_training_state_of_mindone_is_read_to_go_on_and_to_draw(tmp_path, tiny, caplog):
    caplog.set_level("INFO")
    theirs = names.to_mindone(tiny.tensors)
    average = {name: array + 1 for name, array in theirs.items() if name.startswith(UNET)}
    formats.write(tmp_path / "train_resume.ckpt", mindone_state(theirs, average), {}, "mindspore")
    drawn, trained = (checkpoint.load(tmp_path / "train_resume.ckpt", raw=raw).tensors for raw in (False, True))
    assert [record.message.split("its ")[1] for record in caplog.records] == [
        "weights' moving average (EMA)",
        "weights themselves, not their moving average",
    ]
    assert drawn.keys() == trained.keys() == tiny.tensors.keys()
    for name, array in tiny.tensors.items():
        assert np.array_equal(trained[name], array)
        assert np.array_equal(drawn[name], array + 1 if name.startswith(UNET) else array)


def test_a_lora_in_a_training_state_is_added(tmp_path):
    rng = np.random.default_rng(0)
    layer = f"{UNET}{BLOCK}"
    text = "cond_stage_model.transformer.transformer_layer.resblocks.0.attn.attn.in_proj"
    base = {f"{name}.linear.weight": rng.standard_normal((rows, 6)) for name, rows in ((layer, 6), (text, 18))}
    lora = {f"{name}.lora_down.weight": rng.standard_normal((2, 6)) for name in (layer, text)}
    lora |= {f"{name}.lora_up.weight": rng.standard_normal((rows, 2)) for name, rows in ((layer, 6), (text, 18))}
    base[f"{text}.linear.bias"] = np.ones(18)
    state = {name: array.astype(np.float32) for name, array in {**base, **lora}.items()}
    slots = {f"adam_m.{name}": state[name] for name in lora}
    formats.write(tmp_path / "t.ckpt", {**state, **slots}, {}, "mindspore")
    read = checkpoint.load(tmp_path / "t.ckpt").tensors
    for ours, name in (
        (f"{layer}.weight", layer),
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", text),
    ):
        sum_ = base[f"{name}.linear.weight"] + lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
        np.testing.assert_allclose(read.pop(ours), sum_, rtol=1e-5, atol=1e-5)
    assert list(read) == ["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"]
    del state[f"{layer}.lora_up.weight"]
    formats.write(tmp_path / "t.ckpt", {**state, **slots}, {}, "mindspore")
    with pytest.raises(UserError, match="the LoRA of .*to_q.linear.weight is not whole"):
        checkpoint.load(tmp_path / "t.ckpt")


def without(state, *endings):
    return {name: array for name, array in state.items() if not name.endswith(endings)}


STATE_DAMAGES = {  # what becomes of a state with a LoRA, and what is said
    "half of a LoRA": (lambda s: without(s, "lora_up.weight"), "is not whole or does not fit"),
    "no weight under it": (lambda s: without(s, "linear.weight"), "is not whole or does not fit"),
    "another shape": (lambda s: {**s, "x.lora_up.weight": np.ones((6, 3), np.float32)}, "does not fit"),
    "a row": (lambda s: {**s, "x.lora_down.weight": np.ones(6, np.float32)}, "does not fit"),
    "truth values": (lambda s: {**s, "x.linear.weight": np.ones((6, 6), bool)}, "not of floating-point"),
    "whole numbers": (lambda s: {**s, "x.lora_up.weight": np.ones((6, 2), np.int64)}, "not of floating-point"),
    "two names": (lambda s: {**s, "x.weight": s["x.linear.weight"]}, "it holds x.weight twice"),
    "a long name": (lambda s: {f"{'y' * 10**5}\n{name}": array for name, array in s.items()}, None),
}


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("damage", STATE_DAMAGES)
def test_a_damaged_training_state_of_mindone_is_one_line(tmp_path, damage, widen):
    shapes = {"linear.weight": (6, 6), "lora_up.weight": (6, 2), "lora_down.weight": (2, 6)}
    state = {f"x.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    change, words = STATE_DAMAGES[damage]
    path = tmp_path / "train_resume.ckpt"
    formats.write(path, {**change(state), "adam_m.x": np.ones(3, np.float32)}, {}, "mindspore")
    if words:
        with pytest.raises(UserError, match=words) as error:
            checkpoint.load(path, widen)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            checkpoint.load(path, widen)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_bfloat16_in_a_training_state(tmp_path):
    """The LoRA is added in float32, whatever the weight is kept in."""
    halves = np.full((6, 6), 0x3F80, np.uint16).view(arrays.BFLOAT16)
    state = {"x.linear.weight": halves, "x.lora_up.weight": np.ones((6, 2)), "x.lora_down.weight": np.ones((2, 6))}
    read, _ = names.from_mindone_state({**state, "adam_m.x": np.ones(3)}, raw=True)
    assert read["x.weight"].dtype == np.float32 and (read["x.weight"] == 3).all()
