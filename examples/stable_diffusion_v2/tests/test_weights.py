"""Which model a command means, and what a file says against it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldm import checkpoint
from ldm.checkpoint import Checkpoint
from ldm.config.model import SamplingConfig, from_yaml, load_model_config, save_model_config, to_dict
from ldm.config.versions import VERSIONS, published
from ldm.config.yaml_file import dump_yaml
from ldm.errors import UserError
from ldm.parts import PARTS, TEXT, UNET, VAE
from ldm.weights import Choice, Weights, check_words, choose_config, config_key, tensors_of, words_of

V, EPS = load_model_config("configs/v2-vpred-inference.yaml"), load_model_config("configs/v2-inference.yaml")
TINY = load_model_config("configs/tiny-vpred.yaml")


def file(path="x.ckpt", meta=None, parts=PARTS, by_mindone=False, **rest):
    tensors = {part + "weight": np.zeros(1, np.float32) for part in parts}
    return Weights(path, Checkpoint(tensors, meta or {}, "mindspore", by_mindone), **rest)


def choose(weights, *words):
    return choose_config(weights, *words).config


@pytest.mark.parametrize("version", [word for word in VERSIONS if word != "xl-vpred" and "tiny" not in word])
def test_a_published_file_is_known_by_its_name(version):
    known = VERSIONS[version]
    for name in (known.checkpoint, *(f"{stem}.safetensors" for stem in known.also)):
        assert published(f"some/where/{name}") == version
        config, wanted = choose(file(name)), load_model_config(known.config)
        text_2 = wanted.text_2
        assert replace(config, text=replace(config.text, padding=None), text_2=text_2) == wanted
    assert published("sd-20.ckpt") is None and published("/") is None


@pytest.mark.parametrize("words", [("configs/v2-inference.yaml",), (None, "2.0")])
def test_a_published_v_model_is_not_taken_for_eps(words):
    weights = file("models/sd_v2_768_v-e12e3a9b.ckpt")
    with pytest.raises(UserError, match="published model 2.0-v, trained with prediction_type 'v'.* says 'eps'"):
        choose(weights, *words)
    assert choose(weights, "configs/v2-vpred-inference.yaml").prediction_type == "v"
    assert choose(file(weights.path, {"prediction_type": "eps"}), *words).prediction_type == "eps"  # its own word


def test_a_file_that_says_nothing_is_asked_about():
    with pytest.raises(UserError, match="sd-20.ckpt does not say which model it is: add --version .*2.0-v.*config"):
        choose(file("sd-20.ckpt"))
    assert choose(file("sd-20.ckpt"), None, "2.0-v").prediction_type == "v"


XL = load_model_config("configs/sdxl-vpred-inference.yaml")


def unet(width, meta=None, path="x.safetensors"):
    """A file with a UNet of full width that is told of so many values: 2816 is SDXL's, 0 SD 2.x'."""
    tensors = {UNET + "input_blocks.0.0.weight": np.zeros((320, 4, 3, 3), np.float16)}
    context = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    tensors[context] = np.zeros((1280, {2816: 2048, 2560: 1280}.get(width, 1024)), np.float16)
    if width:
        tensors[UNET + "label_emb.0.0.weight"] = np.zeros((1280, width), np.float16)
    return Weights(path, Checkpoint(tensors, meta or {}, "safetensors"))


@pytest.mark.parametrize("version", [None, "xl-vpred"])
@pytest.mark.parametrize("zero", [True, False])
def test_the_marks_of_sdxl_choose_its_config(tmp_path, version, zero):
    marks = {"v_pred": np.zeros(0, np.float32)} | ({"ztsnr": np.zeros(0, np.float32)} if zero else {})
    checkpoint.formats.write(tmp_path / "x", {**unet(2816).checkpoint.tensors, **marks}, {}, "safetensors")
    weights = Weights("x", checkpoint.load(tmp_path / "x"))
    config, origin = choose_config(weights, None, version)
    assert config.prediction_type == "v" and config.schedule.zero_terminal_snr is zero
    sampling = XL.sampling if zero else replace(XL.sampling, spacing=None, guidance_rescale=None)
    assert config.sampling == sampling and config.unet == XL.unet
    check_words("x", weights.checkpoint, config, origin)
    with pytest.raises(UserError, match="trained with prediction_type 'v', --version xl says 'eps'"):
        check_words("x", weights.checkpoint, *choose_config(weights, None, "xl"))


def test_a_file_of_sdxl_without_marks_is_asked_about():
    asked = "x.safetensors is {} and does not say which model it is: add --version [(]{}[)], or"
    v = {"prediction_type": "v"}  # of ModelSpec, which does not say the schedule
    for weights in (unet(2816), unet(2816, v)):
        with pytest.raises(UserError, match=asked.format("a model of Stable Diffusion XL", "xl, xl-vpred")):
            choose(weights)
    with pytest.raises(UserError, match=asked.format("the refiner of Stable Diffusion XL", "xl-refiner")):
        choose(unet(2560))
    with pytest.raises(UserError, match=asked.format("a model of Stable Diffusion 2.x", "1.5, .*-v, tiny, tiny-4step")):
        choose(unet(0))
    for zero in ("true", "false"):
        marked = unet(0, {**v, "schedule": f'{{"zero_terminal_snr": {zero}}}'})
        with pytest.raises(UserError, match="does not say which model it is"):
            choose(marked)


@pytest.mark.parametrize(
    ("width", "config", "told"),
    [
        (
            0,
            "xl",
            "is a model of Stable Diffusion 2.x, --version xl is for Stable Diffusion XL: choose .*--version 2.1",
        ),
        (
            2816,
            "2.1-v",
            "is a model of Stable Diffusion XL, .* is for Stable Diffusion 1.x or 2.x: choose its .*xl-vpred",
        ),
        (2560, "xl", "is the refiner of Stable Diffusion XL, .* is for Stable Diffusion XL: choose its .*xl-refiner"),
        (2816, "xl-refiner", "is a model of Stable Diffusion XL, .* is for the refiner of Stable Diffusion XL: choose"),
        (
            160,
            "xl",
            "is a model like Stable Diffusion XL, of other widths, .* is for Stable Diffusion XL: choose its own",
        ),
    ],
)
def test_a_file_of_another_family_is_named_before_anything_is_built(width, config, told):
    own, other = unet(width), load_model_config(VERSIONS[config].config)
    with pytest.raises(UserError, match=f"^x.safetensors {told}") as error:
        tensors_of(own, Choice(other, f"--version {config}"))
    assert "\n" not in str(error.value)
    check_words("x", own.checkpoint, other, parts=(VAE,))  # its UNet is not wanted
    check_words("x", unet(other.unet.adm_in_channels or 0).checkpoint, other)


def test_how_an_autoencoder_is_computed_makes_no_other_model():
    other = replace(XL, vae=replace(XL.vae, force_upcast=False))
    check_words("x", file(meta=words_of(other)).checkpoint, XL)


def test_what_a_checkpoint_carries_decides():
    own = replace(TINY, sampling=SamplingConfig("ddim", 4, 1.0, "trailing", "zero"))
    weights = file("student.safetensors", words_of(own))
    for words in ((), (None, "tiny")):
        assert choose(weights, *words).sampling == own.sampling
    assert choose(weights, "configs/tiny-vpred.yaml").sampling == TINY.sampling  # the command's config decides more
    with pytest.raises(UserError, match="student.safetensors .*--version 2.1 says"):
        choose(weights, None, "2.1")


def test_changes_of_the_command_are_made_after_the_choice(tmp_path):
    own, changes = file("own.safetensors", words_of(TINY)), ["model.sampling.steps=3", "model.unet.use_checkpoint=true"]
    choices = [
        choose_config(own, None, None, changes),
        choose_config(own, "configs/tiny-vpred.yaml", None, changes),
        choose_config(file("tiny-vpred.safetensors"), changes=changes),
        choose_config(beside(tmp_path, "x.ckpt", dump_yaml(to_dict(TINY))), changes=changes),
    ]
    for config, origin in choices:
        assert (config.sampling.steps, config.unet.use_checkpoint) == (3, True) and origin.endswith(" with --set")
        assert config_key(config) == config_key(choose(own))
    assert config_key(choose_config(own, changes=["model.text.heads=2"]).config) != config_key(choose(own))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.prediction_type=eps", "prediction_type 'v', its config with --set says 'eps'"),
        ("model.schedule.beta_end=0.02", "schedule beta_end: '0.012', its config with --set says '0.02'"),
        ("model.scale_factor=1", "scaled by .* says scale_factor 1.0"),
        ("model.unet.num_res_blocks=3", "unet.num_res_blocks '1', its config with --set says '3'"),
        ("model.text.padding=end", "text.padding 'zero', its config with --set says 'end'"),
    ],
)
def test_changes_that_a_checkpoint_contradicts_are_refused(change, told):
    weights = file("own.safetensors", words_of(TINY))
    with pytest.raises(UserError, match=told):
        tensors_of(weights, choose_config(weights, changes=[change]))


def test_changes_do_not_make_a_published_model_another():
    for name in ("sd_v2_768_v-e12e3a9b.ckpt", "768-v-ema.safetensors"):
        with pytest.raises(UserError, match="published model 2.0-v, .* --version 2.0-v with --set says 'eps'"):
            choose_config(file(name), changes=["model.prediction_type=eps"])
    with pytest.raises(UserError, match="--set: unknown key"):
        choose_config(file("sd_v2_768_v-e12e3a9b.ckpt"), changes=["model.type=eps"])


def beside(tmp_path, name, text, meta=None):
    """A checkpoint with a YAML file of its name beside it."""
    path = tmp_path / name
    path.write_bytes(b"weights")
    path.with_suffix(".yaml").write_text(text)
    return file(str(path), meta)


def test_a_yaml_file_beside_a_checkpoint_says_what_it_is(tmp_path, caplog):
    """Behind --config and the checkpoint's own words, before its name and --version."""
    caplog.set_level("INFO")
    text = 'model: {params: {parameterization: "v"}}'  # as many a model has it for A1111
    weights = beside(tmp_path, "photos.safetensors", text)
    for words in ((), (None, "2.1-v")):
        caplog.clear()
        choice = choose_config(weights, *words)
        assert (choice.config.prediction_type, choice.config.image_size) == ("v", 768)
        assert choice.origin.endswith("photos.yaml")
        said = [line for line in caplog.messages if "lies beside" in line]
        assert len(said) == 1 and "photos.safetensors" in said[0]
    assert choose(weights, "configs/v2-inference.yaml").prediction_type == "eps"
    assert choose(beside(tmp_path, "own.ckpt", text, words_of(TINY))).unet == TINY.unet
    assert (
        choose(beside(tmp_path, "512-base-ema.ckpt", "model: {prediction_type: eps, image_size: 384}")).image_size
        == 384
    )
    with pytest.raises(UserError, match="photos.yaml, .*says prediction_type 'v', --version 2.1 'eps'"):
        choose(weights, None, "2.1")
    with pytest.raises(UserError, match="published model 2.0, .*'eps', .*512-base-ema.yaml says 'v'"):
        choose(beside(tmp_path, "512-base-ema.ckpt", text))


def test_a_yaml_file_beside_a_checkpoint_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match="x.yaml: unknown key 'note'.*lies beside .*x.ckpt: .*as config"):
        choose(beside(tmp_path, "x.ckpt", "note: 3"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.yaml").write_text("epochs: 3")
    with pytest.raises(UserError, match="does not say which model"):
        choose(file(str(tmp_path / "folder")))


def test_the_file_in_the_repository_says_how_it_draws_best():
    old = words_of(TINY)["model_config"].replace("  sampling:", "  left_out:")
    assert "sampling:" not in old
    lines = [line for line in old.splitlines() if "left_out" not in line]
    start = next(i for i, line in enumerate(lines) if "sampler:" in line)
    text = "\n".join(lines[:start] + lines[start + len(to_dict(TINY)["model"]["sampling"]) :])
    assert from_yaml(text, "x").sampling == SamplingConfig()
    meta = {**words_of(TINY), "model_config": text}
    assert choose(file("models/tiny-vpred.safetensors", meta)).sampling == TINY.sampling
    assert choose(file("of-mine.safetensors", meta)).sampling == SamplingConfig()


def test_the_words_are_those_of_the_file_with_the_unet():
    unet, rest = file("unet.safetensors", parts=(UNET,)), file("base.safetensors", words_of(V))
    both = replace(unet, rest_path=rest.path, rest=rest.checkpoint)
    with pytest.raises(UserError, match="unet.safetensors does not say which model"):
        choose(both)
    vae = file("vae.safetensors", {"prediction_type": "eps"}, parts=(VAE,))
    assert choose(replace(vae, rest_path=rest.path, rest=rest.checkpoint)).prediction_type == "v"
    tensors = tensors_of(both, Choice(V, "the config"))
    assert tensors.keys() == rest.checkpoint.tensors.keys()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: replace(c, prediction_type="eps"), "prediction_type 'v', the config says 'eps'"),
        (lambda c: replace(c, schedule=replace(c.schedule, beta_end=0.02)), "schedule beta_end: '0.012', .*0.02"),
        (lambda c: replace(c, scale_factor=0.2), "latents scaled by 0.18215"),
        (lambda c: replace(c, unet=replace(c.unet, num_head_channels=32)), "unet.num_head_channels '64', .* '32'"),
        (lambda c: replace(c, text=replace(c.text, heads=8)), "text.heads '16', the config says '8'"),
        (lambda c: replace(c, text=replace(c.text, padding="end")), "text.padding 'zero', the config says 'end'"),
        (lambda c: replace(c, vae=replace(c.vae, num_res_blocks=1)), "vae.num_res_blocks '2', the config says '1'"),
    ],
)
def test_the_first_difference_is_said(change, told):
    ckpt = file("x.ckpt", words_of(V)).checkpoint
    check_words("x.ckpt", ckpt, V)
    with pytest.raises(UserError, match=f"x.ckpt .*{told}"):
        check_words("x.ckpt", ckpt, change(V))


def test_what_changes_no_answer_is_no_difference():
    unet = replace(V.unet, use_checkpoint=False, attention_resolutions=(1, 2, 4))
    text = replace(V.text, padding="zero")
    other = replace(V, unet=unet, text=text, image_size=512, sampling=SamplingConfig("ddim"))
    check_words("x.ckpt", file(meta=words_of(V)).checkpoint, other)
    another = replace(V, unet=replace(V.unet, num_head_channels=32), prediction_type="eps")
    check_words("x.ckpt", file(meta=words_of(V)).checkpoint, another, parts=(VAE, TEXT))  # its UNet is not wanted
    check_words("x.ckpt", file(meta=words_of(V), parts=(VAE,)).checkpoint, another)  # or is not there


@pytest.mark.parametrize(
    "meta",
    [
        {"scale_factor": "abc"},
        {"scale_factor": "nan"},
        {"scale_factor": "-1"},
        {"scale_factor": "0"},
        {"scale_factor": "1e999"},
        {"schedule": "["},
        {"schedule": "[]"},
        {"schedule": "[" * 9000},
        {"schedule": '{"beta_start": NaN}'},
        {"schedule": '{"beta_start": 1e999}'},
        {"schedule": '{"beta_start": [1]}'},
        {"schedule": '{"beta_start": ' + "1" * 5000 + "}"},
        {"schedule": "{" + " " * 100_000 + "}"},
        {"model_config": "a: &a [x]\nmodel: {prediction_type: *a}"},
        {"model_config": "model: " + "[" * 900},
        {"model_config": "model: {prediction_type: v, unet: {model_channels: 1000000000}}"},
        {"model_config": "model: {prediction_type: v, text: {layers: 1000000}}"},
        {"model_config": "x: 1"},
        {"model_config": "["},
        {"model_config": "model: {prediction_type: v, image_size: big}"},
    ],
    ids=lambda meta: str(meta)[:50],
)
def test_damaged_words_are_one_line(meta, tmp_path):
    with pytest.raises(UserError, match="x.ckpt") as error:
        choose(file(meta=meta), "configs/v2-inference.yaml")
        check_words("x.ckpt", file(meta=meta).checkpoint, EPS)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    if "model_config" not in meta:
        tensors = {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32)}
        checkpoint.formats.write(tmp_path / "x.ckpt", tensors, meta, "mindspore")
        with pytest.raises(UserError, match="x.ckpt says .* it is damaged"):
            checkpoint.load(tmp_path / "x.ckpt")


def test_sd2_prompts_are_padded_as_the_weights_were_trained(tmp_path, caplog):
    """Zero is Stability's; MindONE trains with the end token. What a config or a checkpoint says comes first."""
    caplog.set_level("INFO")
    theirs = file("sd-20.ckpt", by_mindone=True)
    assert choose(theirs, None, "2.0-v").text.padding == "end"
    assert [("sd-20.ckpt" in text and "'end'" in text) for text in caplog.messages] == [True]
    assert choose(file("sd_v2_768_v-e12e3a9b.ckpt", by_mindone=True)).text.padding == "zero"
    assert choose(file("sd-20.ckpt"), None, "2.0-v").text.padding == "zero"
    assert choose(file("sd-20.ckpt"), None, "1.5").text.padding == "end"
    save_model_config(replace(V, text=replace(V.text, padding="zero")), tmp_path / "zero.yaml")
    assert choose(theirs, str(tmp_path / "zero.yaml")).text.padding == "zero"
    ours = words_of(replace(V, text=replace(V.text, padding="end")))
    assert choose(file("fine.safetensors", ours)).text.padding == "end"


def test_the_key_of_a_config_is_of_what_decides_an_answer():
    same = [
        replace(V, image_size=512),
        replace(V, sampling=SamplingConfig("ddim")),
        replace(V, unet=replace(V.unet, use_checkpoint=not V.unet.use_checkpoint)),
    ]
    assert {config_key(config) for config in same} == {config_key(V)}
    other = [EPS, replace(V, schedule=replace(V.schedule, beta_end=0.02)), replace(V, text=replace(V.text, heads=8))]
    assert len({config_key(config) for config in (V, *other)}) == 4


def test_words_of_a_schedule_are_fit_to_print():
    damaged = replace(V, schedule=replace(V.schedule, name="scaled\n" * 10**5))
    with pytest.raises(UserError, match="was trained with schedule name") as error:
        check_words("x.ckpt", file(meta={"prediction_type": "v", "schedule": '{"name": "linear"}'}).checkpoint, damaged)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
