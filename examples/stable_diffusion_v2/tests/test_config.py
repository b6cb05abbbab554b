"""Model files and options: read strictly, written exactly, MindONE's accepted, mistakes answered with one line."""

import argparse
import dataclasses
import logging
import os
import re
import runpy
import shlex
import tracemalloc
from pathlib import Path

import pytest
import text_to_image
import train_autoencoder
import train_distillation
import train_text_to_image
import yaml

from ldm import checkpoint, runtime
from ldm.config.mindone import IGNORED_TRAIN_OPTIONS, is_placeholder
from ldm.config.model import (
    ModelConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    changed,
    from_dict,
    from_yaml,
    load_model_config,
    save_model_config,
    to_dict,
    to_yaml,
)
from ldm.config.moved import answer, translated
from ldm.config.options import Parser, read_options, seed, steps_or_share, str2bool
from ldm.config.versions import existing
from ldm.config.yaml_file import read_yaml, save_yaml
from ldm.data.captions import read_captions
from ldm.errors import UserError
from ldm.parallel.ranks import Ranks
from ldm.randomness import settled_seed
from ldm.train.state import resume_path

FIXTURES = Path(__file__).parent / "data" / "config"
CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = sorted(CONFIGS.glob("*.yaml"))
TRAIN_FILES = sorted((CONFIGS / "train").glob("*.yaml"))


def message(function, *args):
    """The user's error, which must be one line."""
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def edited(name, old, new):
    """A fixture's text with one change."""
    text = (FIXTURES / name).read_text()
    assert old in text
    return text.replace(old, new)


# --- our model files


def test_the_short_form_gets_the_defaults_of_sd2():
    cfg = from_yaml('model:\n  prediction_type: "v"\n  image_size: 768\n', "x")
    assert cfg == ModelConfig("v", image_size=768)
    assert (cfg.unet.num_heads, cfg.unet.num_head_channels) == (None, 64)
    assert (cfg.vae.factor, cfg.unet.factor) == (8, 8)


def test_training_and_sampling_of_sd2_differ_in_prediction_and_size_only():
    eps, v = (load_model_config(CONFIGS / f"{name}.yaml") for name in ("v2-inference", "v2-vpred-inference"))
    assert (eps.prediction_type, v.prediction_type, eps.image_size, v.image_size) == ("eps", "v", 512, 768)
    assert dataclasses.replace(eps, prediction_type="v", image_size=768) == v


def test_tiny_model():
    cfg = load_model_config("configs/tiny-vpred.yaml")
    assert cfg.prediction_type == "v"
    assert cfg.image_size // cfg.vae.factor == 16


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_round_trip(path, tmp_path):
    cfg = load_model_config(path)
    copy = tmp_path / "model_config.yaml"
    save_model_config(cfg, copy)
    assert load_model_config(copy) == cfg
    assert from_dict(to_dict(cfg), "x") == from_yaml(to_yaml(cfg), "x") == cfg
    assert copy.read_text() == to_yaml(cfg) == to_yaml(load_model_config(copy))
    assert list(tmp_path.iterdir()) == [copy]  # no temporary file is left


def test_round_trip_of_odd_values(tmp_path):
    cfg = ModelConfig("1e5", scale_factor=1e-07 / 3)  # a word that looks like a number
    save_model_config(cfg, tmp_path / "x.yaml")
    assert load_model_config(tmp_path / "x.yaml") == cfg


def test_saving_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "missing" / "x.yaml"
    assert "cannot write" in message(save_model_config, ModelConfig("v"), path)
    path = tmp_path / ("x" * 250)  # no room in its name for that of the temporary file
    path.write_text("old")
    assert "File name too long; the previous file is intact" in message(save_model_config, ModelConfig("v"), path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("predicton_type: v", ["model.predicton_type", "model.prediction_type"]),
        ("unet: {chanel_mult: [1]}", ["model.unet.chanel_mult", "'model.unet.channel_mult'"]),
        ("beta_start: 0.1", ["model.beta_start", "'model.schedule.beta_start'"]),  # the right key elsewhere
        ("1: 2", ["model.1"]),
        ("unet: {model_channels: wide}", ["model.unet.model_channels", "whole number", "'wide'"]),
        ("unet: {model_channels: 320.0}", ["model.unet.model_channels", "whole number"]),
        ("unet: {model_channels: true}", ["model.unet.model_channels", "whole number"]),
        ("unet: {use_checkpoint: 1}", ["model.unet.use_checkpoint", "true or false"]),
        ("unet: {channel_mult: 4}", ["model.unet.channel_mult", "list of whole numbers"]),
        ("unet: {channel_mult: []}", ["model.unet.channel_mult", "empty"]),
        ("unet: 3", ["model.unet", "section"]),
        ("scale_factor: .nan", ["model.scale_factor", "number"]),
        ("scale_factor: 0", ["model.scale_factor", "positive"]),
        ("schedule: {name: [linear]}", ["model.schedule.name", "word"]),
        ("schedule: {beta_start: 0.5}", ["model.schedule", "beta_start"]),
        ("schedule: {beta_start: 1e-20}", ["model.schedule.beta_start", "1e-20", "1e-12"]),
        ("schedule: {timesteps: 1}", ["model.schedule.timesteps", "at least 2"]),
        ("image_size: 500", ["model.image_size", "500", "64"]),
        ("unet: {num_heads: 8, num_head_channels: 64}", ["num_heads", "num_head_channels", "not both"]),
        ("unet: {model_channels: 100}", ["model.unet.model_channels", "32"]),
        ("unet: {num_heads: 7}", ["num_heads 7", "320"]),
        ("unet: {num_head_channels: 96}", ["num_head_channels 96", "320"]),
        ("unet: {attention_resolutions: [32, 16, 8]}", ["attention_resolutions", "[16, 32]", "[1, 2, 4, 8]"]),
        ("unet: {out_channels: 8}", ["model.unet.out_channels", "embed_dim"]),
        ("vae: {ch: 100}", ["model.vae.ch", "32"]),
        ("vae: {double_z: false}", ["model.vae.double_z"]),
        ("text: {variant: t5}", ["model.text.variant", "openclip, clip", "t5"]),
        ("text: {heads: 3}", ["heads 3", "1024"]),
        ("text: {width: 768, heads: 12}", ["768", "model.unet.context_dim 1024"]),
    ],
)
def test_a_wrong_model_file_is_named_with_the_key(body, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"model:\n  {body}\n" + ("" if "predic" in body else "  prediction_type: v\n"))
    text = message(load_model_config, path)
    assert text.startswith(str(path))
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["model"]),
        ("model:", ["model"]),
        ("3", ["keys and values"]),
        ("- model", ["keys and values"]),
        ("model: {}", ["model.prediction_type", "missing"]),
        ("model: {prediction_type: v}\nmodels: {}", ["models"]),
        ("epochs: 3\nmodel_config: x.yaml", ["epochs, model_config", "--train_config"]),
        ('"a\\nb": 1', ["a\\nb"]),
        ("model:\n  prediction_type: v\n  unet: [1, 2\n", ["line 4"]),
        ("model:\n  prediction_type: v\n  prediction_type: eps\n", ["line 3", "prediction_type", "twice"]),
        ("model:\n  prediction_type: 2020-99-99\n", ["line 2", "2020-99-99", "timestamp"]),
        ("model: \x00", ["mine.yaml"]),
        ("model: !!bool abc", ["line 1", "'abc'", "bool"]),
        ("model: !!int ''", ["line 1", "int"]),
        ("model: " + "[" * 900, ["line 1", "more than 64 sections in one another"]),
        ("model: " + "[" * 60 + "]" * 60, ["section with keys of its own"]),
        ("model: 1" + ":1" * 100_000, ["line 1", "cannot be read"]),
        ("model: &a [*a]", ["line 1", "'a'", "part of"]),
        ("? [model]\n: 1", ["line 1", "key"]),
        ("model: {prediction_type: " + "v" * 2_000_000 + "}", ["more than 1,000,000 characters"]),
        ("? " + "x" * 500_000 + "\n: 1", ["unknown key"]),
        ("model:\n  ? " + "x" * 500_000 + "\n  : 1", ["unknown key", "nearest"]),
        ("model: {prediction_type: v, unet: {model_channels: [" + "1," * 9000 + "]}}", ["whole number"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_model_file(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    said = message(load_model_config, path)
    assert [word for word in [str(path), *words] if word not in said] == []


def bomb(begin, more):
    """Nine aliases of nine aliases of ...: a text of 500 characters that stands for a billion words."""
    levels = [f"{a}: {more.format(a, ', '.join([f'*{b}'] * 9))}" for a, b in zip("bcdefghij", "abcdefghi")]
    return "\n".join([begin, *levels, "model: {prediction_type: *j}"])


@pytest.mark.parametrize("text", [bomb("a: &a [lol]", "&{} [{}]"), bomb("a: &a {k: 1}", "&{} {{<<: [{}]}}")])
def test_aliases_of_aliases_take_no_memory(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    tracemalloc.start()
    said = message(load_model_config, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "its aliases stand for more than 1,000,000" in said and "line 7" in said and peak < 4 << 20


def test_a_few_aliases_are_as_good_as_what_they_stand_for(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  prediction_type: v\n  unet: {channel_mult: &a [1, 2, 4, 4]}\n  vae: {ch_mult: *a}\n")
    assert load_model_config(path) == ModelConfig("v")
    path.write_text("model: {prediction_type: v, text: &t {width: 768, heads: 12}, unet: {<<: {context_dim: 768}}}")
    assert load_model_config(path).unet.context_dim == 768


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("&a v", "the anchor 'a'"),
        ("*a", "the anchor 'a'"),
        ("!!str v", "the tag"),
        ("v, scale_factor: .nan", "no finite number"),
        ("v, scale_factor: -.inf", "no finite number"),
        ("v, scale_factor: 1e999", "no finite number"),
        ("2020-01-01", "neither a word nor a number"),
        ("v}" + " " * 100_000, "more than 100,000 characters"),
        ("[" * 900, "more than 64 sections"),
        ("v, image_size: 1" + "0" * 5000, "cannot be read"),
    ],
    ids=lambda value: value[:30],
)
def test_text_that_a_checkpoint_carries_is_plain(body, told):
    said = message(from_yaml, f"model: {{prediction_type: {body}}}", "x.ckpt: its model_config")
    assert said.startswith("x.ckpt: its model_config") and told in said and len(said) < 300


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("unet: {model_channels: 20000}", "model.unet.model_channels must be at most 16,384, got 20000"),
        ("unet: {model_channels: 3200}", "model.unet has 27.3 billion weights"),
        ("unet: {transformer_depth: 1000000}", "model.unet.transformer_depth must be at most"),
        ("unet: {transformer_depth: 1000}", "model.unet has 8,008 layers"),
        ("unet: {num_res_blocks: 9999}", "model.unet has 79,992 layers"),
        ("unet: {channel_mult: [" + "1, " * 9999 + "]}", "model.unet.channel_mult has more than 12 numbers"),
        ("unet: {in_channels: 1" + "0" * 30 + "}", "model.unet.in_channels must be at most"),
        ("vae: {ch: 1000000000}", "model.vae.ch must be at most"),
        ("vae: {ch: 16384}", "model.vae has 715.1 billion weights"),
        ("vae: {num_res_blocks: 9999}", "model.vae has 39,996 layers"),
        ("text: {layers: 1000000}", "model.text.layers must be at most"),
        ("text: {layers: 9999}", "model.text has 9,999 layers"),
        ("text: {mlp_ratio: 9999}", "model.text has 482.4 billion weights"),
        ("text: {vocab_size: 1000000000}", "model.text.vocab_size must be at most 1,048,576"),
        ("schedule: {timesteps: 1000000000}", "model.schedule.timesteps must be at most 1,000,000"),
        ("image_size: 1" + "0" * 20, "model.image_size must be at most"),
        ("scale_factor: 1" + "0" * 90, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_absurd_sizes_are_refused(body, told):
    text = f"model: {{prediction_type: v, {body}}}"
    if told:
        assert message(from_yaml, text, "x").startswith(f"x: {told}")
    else:
        from_yaml(text, "x")


def test_double_z_of_older_files_is_left_out():
    assert from_yaml("model: {prediction_type: v, vae: {double_z: true}}", "x") == ModelConfig("v")
    assert "double_z" not in to_yaml(ModelConfig("v"))
    carried = checkpoint.load(CONFIGS.parent / "models/tiny-vpred.safetensors").meta["model_config"]
    assert "double_z: true" in carried
    sampling = load_model_config("configs/tiny-vpred.yaml").sampling
    assert dataclasses.replace(from_yaml(carried, "x"), sampling=sampling) == load_model_config(
        "configs/tiny-vpred.yaml"
    )
    text = edited("mindone_v2.yaml", "double_z: true", "double_z: false")
    assert "ddconfig.double_z: 'False' is not supported here" in message(from_yaml, text, "x")


def test_heads_are_given_in_one_way_of_two():
    for text, heads in (("num_heads: 8", (8, None)), ("num_heads: 8, num_head_channels: null", (8, None))):
        unet = from_yaml(f"model: {{prediction_type: v, unet: {{{text}}}}}", "x").unet
        assert (unet.num_heads, unet.num_head_channels) == heads
    for text in ("num_head_channels: null", "num_heads: null", "num_heads: null, num_head_channels: null"):
        assert from_yaml(f"model: {{prediction_type: v, unet: {{{text}}}}}", "x") == ModelConfig("v")
    assert "give num_heads or num_head_channels" in message(UNetConfig, 4, 4, 320, 2, (1,), (1,), None, None)


# --- interpolation


def test_interpolations_in_a_model_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SCHEDULE", "linear")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model:\n  prediction_type: v\n  text: {width: 768, heads: 12}\n  unet: {context_dim: '${model.text.width}'}\n"
        "  schedule: {name: '${oc.env:SCHEDULE}'}\n  vae: {ch_mult: '${model.unet.channel_mult}'}\n"
    )
    assert "'model.vae.ch_mult': Interpolation key" in message(load_model_config, path)  # only what the file says
    path.write_text(path.read_text().replace("context_dim", "channel_mult: [1, 2, 4, 4], context_dim"))
    cfg = load_model_config(path)
    assert (cfg.unet.context_dim, cfg.schedule.name, cfg.vae.ch_mult) == (768, "linear", (1, 2, 4, 4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${nowhere}", ["'model.prediction_type'", "key 'nowhere' not found", "${oc.env:NAME}"]),
        ("${oc.env:NO_SUCH_VARIABLE}", ["'NO_SUCH_VARIABLE' not found"]),
        ("${model.prediction_type}", ["Recursive interpolation"]),
        ("${model}", ["Interpolation to parent"]),
        ("${nowhere:1}", ["Unsupported interpolation type nowhere"]),
        ("costs ${5", ["mismatched input", "a plain ${"]),
        ("${model.image_size}", ["model.prediction_type must be a word, got '64'"]),
    ],
)
def test_interpolations_without_a_value(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{image_size: 64, prediction_type: '{text}'}}")
    said = message(load_model_config, path)
    assert [word for word in [str(path), *words] if word not in said] == []


def test_interpolations_of_interpolations_take_no_memory(tmp_path):
    path = tmp_path / "mine.yaml"
    levels = [f"{a}: '{f'${{{b}}}' * 9}'" for a, b in zip("bcdefghij", "abcdefghi")]
    tracemalloc.start()
    for first in ("a: lol", "a: 1", "a: " + "x" * 90_000):
        path.write_text("\n".join([first, *levels, "model: {prediction_type: '${j}'}"]))
        assert "a file with interpolations may have at most 20 ${...} and 10,000" in message(load_model_config, path)
    path.write_text("a: " + "x" * 20_000 + "\nmodel: {prediction_type: '${a}'}")
    assert "at most 20" in message(load_model_config, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("word", ["${model.image_size}", "${oc.env:HOME}", "\\\\${x}", "a ${"])
def test_a_checkpoint_carries_no_interpolation(word):
    said = message(from_yaml, f'model: {{image_size: 64, prediction_type: "{word}"}}', "x.ckpt: its model_config")
    assert said.startswith("x.ckpt: its model_config") and "interpolation" in said and "does not belong there" in said


def test_interpolations_in_a_train_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "data_path: ${oc.env:HOME}/${optim}\noptim: sgd\nvalidation_prompts: ['\\${cat}', '$5 {x}']\nepochs: ${n}"
    assert "'epochs': Interpolation key 'n' not found" in message(options, tmp_path, text)
    args = options(tmp_path, text.replace("${n}", "${train_batch_size}\ntrain_batch_size: 3"))
    assert (args.data_path, args.epochs) == (f"{tmp_path}/sgd", 3)
    assert args.validation_prompts == ["${cat}", "$5 {x}"]


@pytest.mark.parametrize("text", ["${cat}", "\\${a}", "\\\\${", "a\\ ${b} \\", "$ {c}", "${oc.env:HOME}\n${", "\\"])
def test_saved_options_are_read_back_as_they_are(text, tmp_path):
    data = {"prompts": [text, "other"], "section": {"key": text}, "number": 3}
    save_yaml(data, tmp_path / "args.yaml")
    assert read_yaml(tmp_path / "args.yaml") == data


# --- --set


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["model.unet.use_checkpoint=true"], {"unet": {"use_checkpoint": True}}),
        (["model.sampling.steps=12", "model.prediction_type=epsilon"], {"sampling": {"steps": 12}, "": "eps"}),
        (["model.sampling.steps=12", "model.sampling.steps=9"], {"sampling": {"steps": 9}}),
        (
            ["model.unet.context_dim=512", "model.text.width=512"],
            {"unet": {"context_dim": 512}, "text": {"width": 512}},
        ),
        (["model.unet.channel_mult=[1, 2, 2, 2]"], {"unet": {"channel_mult": (1, 2, 2, 2)}}),
        (["model.schedule={timesteps: 100}"], {"schedule": {"timesteps": 100}}),
        (["model.schedule.beta_start=1e-4"], {"schedule": {"beta_start": 1e-4}}),
        (
            ["model.unet.num_heads=8", "model.unet.num_head_channels="],
            {"unet": {"num_heads": 8, "num_head_channels": None}},
        ),
        (
            ["model.text.width=512", "model.unet.context_dim=${model.text.width}"],
            {"unet": {"context_dim": 512}, "text": {"width": 512}},
        ),
    ],
)
def test_a_command_changes_a_config(changes, wanted):
    cfg = ModelConfig("v", image_size=768)
    prediction_type, sections = wanted.pop("", "v"), {}
    for name, fields in wanted.items():
        sections[name] = dataclasses.replace(getattr(cfg, name), **fields)
    assert changed(cfg, changes) == dataclasses.replace(cfg, prediction_type=prediction_type, **sections)
    assert changed(cfg, []) is cfg


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.unet.use_chekpoint=true", ["'model.unet.use_chekpoint'", "'model.unet.use_checkpoint'"]),
        ("unet.use_checkpoint=true", ["'model.unet.use_checkpoint'"]),
        ("steps=3", ["'model.sampling.steps'"]),
        ("model.schedule.spacing=trailing", ["'model.sampling.spacing'"]),
        ("model.target=x", ["unknown key 'model.target'"]),
        ("model.unet.use_checkpoint", ["KEY=VALUE"]),
        ("model.unet.use_checkpoint=maybe", ["model.unet.use_checkpoint must be true or false, got 'maybe'"]),
        ("model.sampling.steps=1.5", ["model.sampling.steps must be a whole number"]),
        ("model.sampling.steps=", ["model.sampling.steps must be a whole number"]),
        ("model.unet=3", ["model.unet must be a section"]),
        ("model.unet={depth: 3}", ["unknown key 'model.unet.depth'"]),
        ("model.unet.channel_mult=[1, 2", ["model.unet.channel_mult, line 1"]),
        ("model.unet.model_channels=100", ["must be a multiple of 32"]),
        ("model.unet.time_cond_proj_dim=7", ["time_cond_proj_dim must be even", "256 is usual"]),
        ("model.unet.time_cond_proj_dim=2", ["time_cond_proj_dim must be even and at least 4, got 2"]),
        ("model.text.width=512", ["context_dim 1024 must be equal"]),
        ("model.unet.num_heads=8", ["num_heads or num_head_channels, not both"]),
        ("model.unet.context_dim=${model.text.widht}", ["'model.text.widht' not found"]),
        ("model.sampling.sampler=&a [*a]", ["part of"]),
        ("=3", ["unknown key ''"]),
    ],
)
def test_a_wrong_change_is_told_in_one_line(change, words):
    said = message(changed, ModelConfig("v"), [change])
    assert [word for word in ["--set: ", *words] if word not in said] == []


def test_changes_are_given_by_the_file_and_by_the_command(tmp_path):
    (tmp_path / "run.yaml").write_text("data_path: d\nset: [model.sampling.steps=3, model.image_size=64]\n")
    for script in (train_text_to_image, train_autoencoder, train_distillation):
        words = ["--train_config", str(tmp_path / "run.yaml"), "--set", "a=1", "b=2", "--set", "c=3"]
        args = read_options(script.build_parser(), words)
        assert args.set == ["model.sampling.steps=3", "model.image_size=64", "a=1", "b=2", "c=3"]
        assert read_options(script.build_parser(), ["--data_path", "d"]).set == []


def test_files_that_cannot_be_read(tmp_path):
    assert "there is no file configs/v3.yaml" in message(load_model_config, "configs/v3.yaml")
    (tmp_path / "weights.yaml").write_bytes(b"\x80\x81\xff")
    assert "not a text file" in message(load_model_config, tmp_path / "weights.yaml")
    assert "no file" in message(load_model_config, tmp_path)


def test_widths_at_levels_without_attention_need_no_heads():
    assert UNetConfig(model_channels=96, channel_mult=(1, 2, 4), attention_resolutions=(2,), num_head_channels=64)
    assert "width 96" in message(UNetConfig, 4, 4, 96, 2, (1,), (1, 2, 4), None, 64)
    assert "width 96" in message(UNetConfig, 4, 4, 32, 2, (2,), (1, 2, 3), None, 64)  # the middle block has some


def test_numbers_without_a_point():
    cfg = from_yaml("model: {prediction_type: v, schedule: {beta_start: 1e-4, beta_end: 2E-2}, scale_factor: 1}", "x")
    assert (cfg.schedule.beta_start, cfg.schedule.beta_end) == (1e-4, 2e-2)
    assert isinstance(cfg.scale_factor, float)


def test_paths_are_seen_from_here_first_then_from_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model_config("configs/v2-inference.yaml").prediction_type == "eps"
    os.mkdir("configs")
    save_model_config(ModelConfig("x0"), "configs/v2-inference.yaml")
    assert load_model_config("configs/v2-inference.yaml").prediction_type == "x0"


# --- MindONE's model files


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mindone_v2", "v2-inference"),
        ("mindone_v2_vpred_train", "v2-vpred-inference"),
        ("mindone_v1", "v1-inference"),
        ("compvis_v1", "v1-inference"),
        ("stability_v2_v", "v2-vpred-inference"),
    ],
)
def test_mindone_files_give_our_models(theirs, ours, caplog):
    imported = load_model_config(FIXTURES / f"{theirs}.yaml")
    assert "tokenizer" not in caplog.text
    assert imported.image_size == 512  # 64 latents in each of its files, also for the model of 768 pixels
    cfg = load_model_config(CONFIGS / f"{ours}.yaml")
    recomputes = cfg.unet.use_checkpoint if theirs != "stability_v2_v" else False
    unet = dataclasses.replace(cfg.unet, use_checkpoint=recomputes)
    text = dataclasses.replace(cfg.text, padding="end" if theirs.startswith("mindone_v2") else None)
    assert dataclasses.replace(imported, image_size=cfg.image_size) == dataclasses.replace(cfg, unet=unet, text=text)


@pytest.mark.parametrize(
    ("target", "channels", "ours"),
    [
        ("LatentInpaintDiffusion", 9, "v2-inpaint-inference"),
        ("LatentDepthDiffusion", 5, "v2-depth-inference"),
        ("LatentDepth2ImageDiffusion", 5, "v2-depth-inference"),
    ],
)
def test_mindone_files_of_models_that_are_told_pictures(target, channels, ours):
    text = edited("mindone_v2.yaml", "ddpm.LatentDiffusion", f"ddpm.{target}")
    text = text.replace("crossattn", "hybrid\n    finetune_keys: null").replace(
        "in_channels: 4", f"in_channels: {channels}"
    )
    own = load_model_config(CONFIGS / f"{ours}.yaml")
    assert from_yaml(text, "x") == dataclasses.replace(own, text=dataclasses.replace(own.text, padding="end"))


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("mindone_v1.yaml", "legacy: False", "legacy: False, fa_max_head_dim: 256", []),
        ("mindone_v1.yaml", "ddpm.LatentDiffusion", "ddpm.LatentDiffusionDreamBooth", ["DreamBooth"]),
        ("mindone_v1.yaml", "    timesteps: 1000", "    timesteps: 1000\n    prior_loss_weight: 1.0", []),
        ("mindone_v1.yaml", '"BpeTokenizer"', '"CLIPTokenizer", version: "1.5"', []),
        (
            "mindone_v1.yaml",
            "encoders.modules.FrozenCLIPEmbedder",
            "textual_inversion.text_encoder.FrozenCLIPEmbedder_CLIPTokenizer",
            [],
        ),
    ],
)
def test_mindone_files_for_other_ways_of_training_hold_the_same_models(name, old, new, said, caplog):
    caplog.set_level(logging.INFO)
    assert from_yaml(edited(name, old, new), "x") == load_model_config(FIXTURES / name)
    assert len(caplog.messages) == len(said) and all(word in caplog.text for word in said)


def test_stability_text_encoder_ends_where_its_file_says():
    name = "stability_v2_v.yaml"
    for new, layers in (('layer: "last"', 24), ("max_length: 77", 24)):
        assert from_yaml(edited(name, 'layer: "penultimate"', new), "x").text == TextConfig(layers=layers)
    assert "'middle'" in message(from_yaml, edited(name, '"penultimate"', "middle"), "x")
    assert "'penultimate'" in message(from_yaml, edited("mindone_v1.yaml", "heads: 12", "layer: penultimate"), "x")


def test_a_file_that_says_the_prediction_type_alone(caplog):
    caplog.set_level(logging.INFO)
    cfg = from_yaml('model:\n  params:\n    parameterization: "v"\n', "x")
    assert cfg == ModelConfig("v", image_size=768)
    assert "the rest is taken from Stable Diffusion 2.x" in caplog.text
    assert from_yaml("model: {params: {parameterization: eps}}", "x") == ModelConfig("eps")
    assert "model.params" in message(from_yaml, "model: {params: {}}", "x")
    assert "model.params" in message(from_yaml, "model: {params: 3}", "x")


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ("v", ["v", "V", "v_prediction", "v-prediction", "v_pred", "velocity", " Velocity"]),
        ("eps", ["eps", "epsilon", "noise"]),
        ("x0", ["x0", "sample"]),
    ],
)
def test_prediction_types_in_other_words(ours, words):
    for word in words:
        assert from_dict({"model": {"prediction_type": word}}, "x").prediction_type == ours
        assert from_yaml(edited("mindone_v2.yaml", '"noise"', f'"{word}"'), "x").prediction_type == ours
    assert from_dict({"model": {"prediction_type": "velo"}}, "x").prediction_type == "velo"  # refused by its owner


@pytest.mark.parametrize(
    ("ours", "old", "new"),
    [
        ("v", '"noise"', '"v"'),
        ("v", '"noise"', '"velocity"'),
        ("eps", '  prediction_type: "noise"\n', ""),
        ("x0", '"noise"', '"x0"'),
        ("v", '"noise"\n  params:', '"v"\n  params:\n    parameterization: velocity'),
        ("eps", '"noise"\n  params:', '"noise"\n  params:\n    parameterization: eps'),
    ],
)
def test_mindone_prediction_types(ours, old, new):
    assert from_yaml(edited("mindone_v2.yaml", old, new), "x").prediction_type == ours


@pytest.mark.parametrize("types", [("v", "eps"), ("noise", "velocity"), ("eps", "x0")])
def test_mindone_switches_that_contradict_each_other(types):
    change = '"{}"\n  params:\n    parameterization: {}'.format(*types)
    text = message(from_yaml, edited("mindone_v2.yaml", '"noise"\n  params:', change), "x")
    assert "model.prediction_type" in text and "model.params.parameterization" in text and "contradict" in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("log_every_t", "log_every_tea", ["model.params.log_every_tea", "model.params.log_every_t'"]),
        ("ch: 128", "chan: 128", ["ddconfig.chan"]),
        ("conditioning_key: crossattn", "conditioning_key: concat", ["conditioning_key", "concat", "not supported"]),
        ("cond_stage_trainable: false", "cond_stage_trainable: true", ["cond_stage_trainable", "not supported"]),
        ("ddpm.LatentDiffusion", "cldm.ControlLDM", ["ControlLDM", "not supported"]),
        ("openaimodel.UNetModel", "tuneavideo.UNetModel3D", ["UNetModel3D", "not supported"]),
        ("modules.FrozenCLIPEmbedder", "modules.CNCLIPEmbedder", ["CNCLIPEmbedder", "not supported"]),
        ('"BpeTokenizer"', '"WordpieceTokenizer"', ["WordpieceTokenizer", "not supported"]),
        ("attn_resolutions: []", "attn_resolutions: [32]", ["attn_resolutions", "not supported"]),
        ("timesteps: 1000", "beta_schedule: sqrt", ["beta_schedule", "sqrt", "sqrt_linear"]),
        ("timesteps: 1000", "beta_schedule: [linear]", ["beta_schedule", "not supported"]),
        ("    image_size: 64", "    image_size: big", ["model.params.image_size"]),
        ("model_channels: 320", "model_channels: many", ["model.unet.model_channels", "'many'"]),
        ("unet_config", "unet", ["model.params.unet", "model.params.unet_config"]),
        ('"noise"', "[v]", ["model.prediction_type", "word"]),
    ],
)
def test_mindone_files_are_read_as_strictly(old, new, words):
    text = message(from_yaml, edited("mindone_v2.yaml", old, new), "their.yaml")
    assert [word for word in ["their.yaml", *words] if word not in text] == []


@pytest.mark.parametrize("section", ["params", "unet_config", "first_stage_config", "cond_stage_config"])
def test_mindone_file_without_a_section(section):
    data = yaml.safe_load((FIXTURES / "mindone_v1.yaml").read_text())
    (data["model"] if section == "params" else data["model"]["params"]).pop(section)
    assert section in message(from_dict, data, "x")


def test_mindone_text_encoder_that_says_nothing_of_its_size(caplog):
    sd2, sd1 = (load_model_config(CONFIGS / f"{name}.yaml") for name in ("v2-inference", "v1-inference"))
    sd2 = dataclasses.replace(sd2, text=dataclasses.replace(sd2.text, padding="end"))
    for name, model in (("mindone_v2.yaml", sd2), ("mindone_v1.yaml", sd1)):
        head, target, _ = (FIXTURES / name).read_text().partition("FrozenCLIPEmbedder")
        assert from_yaml(f"{head}{target}\n      params: {{use_fp16: True}}", "x") == model
    assert [message.count("names no tokenizer") for message in caplog.messages] == [1]  # as SD 1.x in Chinese does


def test_mindone_schedules_heads_and_recompute():
    cfg = from_yaml(edited("mindone_v1.yaml", "timesteps: 1000", "beta_schedule: sqrt_linear"), "x")
    assert (cfg.schedule.name, cfg.schedule.timesteps) == ("linear", 1000)
    text = edited("mindone_v1.yaml", "num_heads: 8", "num_heads: 8, num_head_channels: -1")
    text = text.replace("use_checkpoint: True", "use_recompute: True")
    assert from_yaml(text, "x") == load_model_config(CONFIGS / "v1-inference.yaml")
    assert not from_yaml(text.replace("use_recompute: True", "use_recompute: False"), "x").unet.use_checkpoint


def test_a_unet_that_wants_something_unknown_beside_latents_is_refused():
    text = edited("mindone_v2.yaml", "in_channels: 4,", "in_channels: 8,")  # InstructPix2Pix'
    assert "model.unet.in_channels" in message(from_yaml, text, "x")


def test_dropout_in_a_mindone_file_is_warned_of(caplog):
    load_model_config(FIXTURES / "mindone_v2_vpred_train.yaml")
    assert ["dropout of 0.1" in text for text in caplog.messages] == [True]


def test_mindone_names_of_training_files_lead_to_ours(caplog):
    assert load_model_config("configs/v2-vpred-train.yaml") == load_model_config("configs/v2-vpred-inference.yaml")
    assert len(caplog.messages) == 1 and "configs/v2-vpred-inference.yaml" in caplog.text
    assert "v3-train.yaml" in message(load_model_config, "configs/v3-train.yaml")


def test_a_written_import_is_ours(tmp_path):
    cfg = load_model_config(FIXTURES / "mindone_v1.yaml")
    save_model_config(cfg, tmp_path / "x.yaml")
    assert "target" not in (tmp_path / "x.yaml").read_text()
    assert load_model_config(tmp_path / "x.yaml") == cfg


# --- options


def parser():
    """One option of each sort that the scripts have."""
    result = Parser("Trains.")
    result.add_argument("--train_config", default="")
    result.add_argument("--data_path", required=True)
    result.add_argument("--model_config", default="configs/v2-vpred-inference.yaml")
    result.add_argument("--mode", type=int, default=0, choices=(0, 1))
    result.add_argument("--epochs", type=int, default=10)
    result.add_argument("--ckpt_save_interval", type=int, default=1)
    result.add_argument("--train_batch_size", type=int, default=1)
    result.add_argument("--image_size", type=int, default=512)
    result.add_argument("--image_filter_size", type=int, default=256)
    result.add_argument("--warmup_steps", type=int, default=1000)
    result.add_argument("--decay_steps", type=int, default=0)
    result.add_argument("--start_learning_rate", type=float, default=1e-5)
    result.add_argument("--end_learning_rate", type=float, default=1e-7)
    result.add_argument("--weight_decay", type=float, default=0.01)
    result.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999])
    result.add_argument("--optim", default="adamw", choices=("adamw", "sgd"))
    result.add_argument("--scheduler", default="cosine_decay")
    result.add_argument("--use_ema", type=str2bool, default=False)
    result.add_argument("--clip_grad", type=str2bool, default=False)
    result.add_argument("--use_parallel", type=str2bool, default=False)
    result.add_argument("--validation_prompts", nargs="*", default=[])
    result.add_argument("--ddim", action="store_true")
    result.add_argument("--enable_flash_attention", type=str2bool)
    result.ignore(IGNORED_TRAIN_OPTIONS)
    return result


def options(tmp_path, text, *argv):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return read_options(parser(), ["--train_config", str(path), *argv])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('data_path: "a\\0b"', "'data_path': 'a\\x00b' holds a NUL"),
        ("data_path: [" + "x, " * 9000 + "]", "'data_path': expected one value"),
        ("use_parallel: " + "x" * 500_000, "'use_parallel': expected True or False"),
        ("data_path: " + "[" * 900, "line 1: more than 64 sections"),
        ("use_parallel: !!bool abc", "line 1: 'abc' cannot be read"),
    ],
    ids=lambda value: value[:30],
)
def test_odd_values_of_options_are_told_in_a_short_line(text, told, tmp_path):
    said = message(options, tmp_path, text)
    assert told in said and len(said) < 400


def test_a_name_that_no_file_can_have_is_one_that_is_not_there(tmp_path):
    for name in ("a" * 300, str(tmp_path / ("a" * 300))):
        assert "there is no file" in message(load_model_config, name)
        assert "does not exist" in message(existing, name)
        assert "does not exist" in message(resume_path, name, tmp_path)
        assert "does not exist" in message(read_captions, name)
        assert "File name too long" in message(checkpoint.load, name)
    assert is_placeholder("/path/to/" + "a" * 300)


def complaint(capsys, *argv):
    """What a wrong command prints: one line; the exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        read_options(parser(), list(argv))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_default_then_file_then_command(tmp_path):
    args = options(tmp_path, "data_path: d\nepochs: 5\nimage_size: 768\n", "--image_size", "64")
    assert (args.train_batch_size, args.epochs, args.image_size, args.data_path) == (1, 5, 64, "d")
    again = read_options(parser(), ["--data_path", "e"])
    assert (again.epochs, again.data_path, again.train_config) == (10, "e", "")


def test_values_get_the_types_of_the_command_line(tmp_path):
    text = """
        data_path: d
        start_learning_rate: 1e-4
        end_learning_rate: 0
        weight_decay: "1e-2"
        betas: [0.9, 98e-2]
        use_ema: yes
        clip_grad: "True"
        use_parallel: 0
        ddim: true
        scheduler: 7
        epochs:
        validation_prompts: ["a fox: red", 3]
        """
    args = options(tmp_path, text)
    assert (args.start_learning_rate, args.end_learning_rate, args.weight_decay) == (1e-4, 0.0, 1e-2)
    assert isinstance(args.end_learning_rate, float)
    assert args.betas == [0.9, 0.98]
    assert (args.use_ema, args.clip_grad, args.use_parallel, args.ddim) == (True, True, False, True)
    assert (args.scheduler, args.epochs) == ("7", 10)
    assert args.validation_prompts == ["a fox: red", "3"]
    assert options(tmp_path, "data_path: d\nvalidation_prompts: a fox").validation_prompts == ["a fox"]


def test_an_option_required_on_the_command_line_may_stand_in_the_file(tmp_path, capsys):
    assert "--data_path" in complaint(capsys)
    assert options(tmp_path, "data_path: d").data_path == "d"


@pytest.mark.parametrize("path", TRAIN_FILES, ids=lambda path: path.stem)
def test_our_train_files_fit_their_script(path):
    words = {"vae": train_autoencoder, "distill": train_distillation}
    script = next((script for word, script in words.items() if word in path.stem), train_text_to_image)
    args = read_options(script.build_parser(), ["--train_config", str(path), "--data_path", "d"])
    model = load_model_config(args.model_config)
    assert args.image_size in (None, 32 if "lowres" in path.stem else model.image_size)
    assert (model.prediction_type == "v") == ("vpred" in path.stem or "tiny" in path.stem)
    if "vanilla" in path.stem:
        assert args.betas == [0.9, 0.98] and args.start_learning_rate == 1e-5 and args.end_learning_rate == 1e-7


def test_a_train_file_of_mindone(tmp_path, caplog):
    text = """
        mode: 0
        use_parallel: False
        num_workers: 1
        data_path: "/path/to/data"
        train_batch_size: 1
        image_size: 768
        image_filter_size: 256
        model_config: "configs/v2-vpred-train.yaml"
        epochs: 20
        use_ema: True
        clip_grad: False
        enable_flash_attention: True
        scheduler: "cosine_decay"
        start_learning_rate: 1e-5
        betas: [0.9, 0.98]
        """
    args = options(tmp_path, text, "--data_path", "d")
    assert args.use_ema and load_model_config(args.model_config).prediction_type == "v"
    assert args.enable_flash_attention and ["num_workers" in text for text in caplog.messages] == [True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train_batchsize: 3", ["'train_batchsize'", "'train_batch_size'"]),
        ("help: 1", ["'help'"]),
        ("epochs: many", ["'epochs'", "int", "'many'"]),
        ("epochs: 1.5", ["'epochs'", "int"]),
        ("epochs: true", ["'epochs'", "int"]),
        ("epochs: [1, 2]", ["'epochs'", "one value"]),
        ("epochs: {a: 1}", ["'epochs'", "one value"]),
        ("weight_decay: ten", ["'weight_decay'", "float"]),
        ("use_ema: maybe", ["'use_ema'", "True or False", "maybe"]),
        ("ddim: 3", ["'ddim'", "true or false"]),
        ("betas: [0.9]", ["'betas'", "2 values"]),
        ("betas: 0.9", ["'betas'", "2 values"]),
        ("betas: [0.9, x]", ["'betas'", "float", "'x'"]),
        ("optim: adam", ["'optim'", "adamw, sgd"]),
        ("mode: 2", ["'mode'", "0, 1"]),
        ("epochs: 1\nepochs: 2", ["line 2", "twice"]),
        ("- epochs", ["keys and values"]),
    ],
)
def test_a_wrong_train_file(text, words, tmp_path):
    said = message(options, tmp_path, text)
    assert [word for word in ["run.yaml", *words] if word not in said] == []


def test_a_train_file_that_is_not_there():
    assert "configs/train/x.yaml" in message(read_options, parser(), ["--train_config", "configs/train/x.yaml"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], ["--epoch;", "--epochs"]),  # no abbreviations
        (["--train_batchsize=3"], ["--train_batchsize;", "--train_batch_size"]),
        (["--epochs", "x"], ["--epochs", "'x'"]),
        (["--optim", "adam"], ["--optim", "'adamw', 'sgd'"]),
        (["--use_ema", "maybe"], ["--use_ema", "True or False"]),
        (["a", "fox"], ["'a'"]),
        (["--train_config"], ["--train_config"]),
    ],
)
def test_a_wrong_command(argv, words, capsys):
    text = complaint(capsys, "--data_path", "d", *argv)
    assert [word for word in words if word not in text.replace("adamw, sgd", "'adamw', 'sgd'")] == []


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--learning_rate", "--start_learning_rate"),
        ("--lr", "--start_learning_rate"),
        ("--resolution", "--image_size"),
        ("--batch-size=4", "--train_batch_size"),
        ("--num_train_epochs", "--epochs"),
        ("--num_worker", "--mode"),  # what has no effect is no advice
    ],
)
def test_options_in_the_words_of_other_programs(wrong, meant, capsys):
    assert f"nearest known option is {meant}" in complaint(capsys, "--data_path", "d", wrong, "1")


def test_the_words_of_other_programs_in_a_file(tmp_path):
    assert "'start_learning_rate'" in message(options, tmp_path, "data_path: d\nlearning_rate: 1e-5")


def test_a_model_file_is_no_train_file(tmp_path):
    said = message(options, tmp_path, "model:\n  prediction_type: v\n")
    assert "describes a model" in said and "--model_config" in said


def test_a_yes_or_no_option_alone_is_yes():
    assert read_options(parser(), ["--data_path", "d", "--use_ema"]).use_ema is True
    assert read_options(parser(), ["--use_ema", "--data_path", "d"]).use_ema is True
    assert read_options(parser(), ["--data_path", "d", "--use_ema", "False"]).use_ema is False
    assert read_options(parser(), ["--data_path", "d"]).use_ema is False


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = options(tmp_path, 'data_path: "~/pictures"\nmodel_config: $HOME/model.yaml\nvalidation_prompts: ["~ $HOME"]')
    assert (args.data_path, args.model_config) == (f"{tmp_path}/pictures", f"{tmp_path}/model.yaml")
    assert args.validation_prompts == ["~ $HOME"]  # a text, no path
    assert read_options(parser(), ["--data_path=~/x"]).data_path == f"{tmp_path}/x"
    (tmp_path / "run.yaml").write_text("epochs: 4")
    assert read_options(parser(), ["--data_path", "d", "--train_config=~/run.yaml"]).epochs == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    assert read_options(parser(), ["--data_path", "$HOME"]).data_path == "$HOME"  # there is one of that name


def test_a_placeholder_counts_as_not_given(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    assert options(tmp_path, "data_path: d\nmodel_config: /path/to/model").model_config == parser().get_default(
        "model_config"
    )
    assert "model_config says /path/to/model" in caplog.text
    with pytest.raises(SystemExit):
        options(tmp_path, "data_path: /path/to/data")
    assert "required: --data_path" in capsys.readouterr().err


def test_mindone_random_crop_is_told_apart(tmp_path, caplog):
    def said(text, *argv):
        caplog.clear()
        (tmp_path / "run.yaml").write_text("random_crop: True\n" + text)
        words = ["--train_config", str(tmp_path / "run.yaml"), *argv]
        read_options(train_text_to_image.build_parser(), words)
        return "--flip True" in caplog.text

    assert said("num_workers: 1") and said("model_config: configs/v2-train.yaml")
    assert not said("epochs: 1") and not said("num_workers: 1", "--flip")
    assert not said("num_workers: 1", "--random_crop", "False")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("instance_data_dir: d", ["--instance_data_dir", "not available", "DreamBooth", "--data_path"]),
        ("placeholder_token: <cat-toy>", ["--placeholder_token", "textual inversion"]),
        ("scale_lr: True", ["--scale_lr", "start_learning_rate"]),
    ],
)
def test_what_is_not_here_is_told_by_name(text, words, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    said = message(read_options, train_text_to_image.build_parser(), ["--train_config", str(tmp_path / "run.yaml")])
    assert [word for word in words if word not in said] == []


def test_what_is_not_here_may_be_switched_off(tmp_path):
    (tmp_path / "run.yaml").write_text("with_prior_preservation: False\nscale_lr: no\nscale_window: 1000.0")
    words = ["--train_config", str(tmp_path / "run.yaml"), "--resume"]
    args = read_options(train_text_to_image.build_parser(), words)
    assert args.resume == "True"
    assert not hasattr(args, "with_prior_preservation") and args.scale_window == 1000
    assert isinstance(args.scale_window, int)


def test_flags_that_are_not_here_are_told_with_their_own_reason():
    said = message(read_options, text_to_image.build_parser(), ["--ti_ckpt_path", "x.ckpt"])
    assert "--ti_ckpt_path is not available here" in said and "textual inversion" in said
    assert not hasattr(read_options(text_to_image.build_parser(), []), "ti_ckpt_path")


def test_mindone_has_two_words_for_one_optimizer(tmp_path):
    (tmp_path / "run.yaml").write_text("optim: momentum")
    for words in (["--optim", "momentum"], ["--train_config", str(tmp_path / "run.yaml")]):
        assert read_options(train_text_to_image.build_parser(), words).optim == "sgd"


def test_settings_of_an_npu_are_options(caplog, capsys):
    words = ["--jit_level", "O1", "--precision_mode", "must_keep_origin_dtype", "--enable_flash_attention", "False"]
    for script in (text_to_image, train_text_to_image):
        settings = runtime.ascend_settings(read_options(script.build_parser(), words))
        assert settings == ("O1", "must_keep_origin_dtype", False, True)
        assert runtime.ascend_settings(read_options(script.build_parser(), [])) == runtime.AscendSettings()
        with pytest.raises(SystemExit):
            read_options(script.build_parser(), ["--jit_level", "O3"])
        assert "O0" in capsys.readouterr().err
    assert not caplog.messages


def test_a_chinese_model_is_refused_however_it_comes(capsys):
    for script in (text_to_image, train_text_to_image):
        with pytest.raises(SystemExit):
            read_options(script.build_parser(), ["--version", "1.5-wukong"])
        assert "Chinese" in capsys.readouterr().err
    assert "Chinese" in message(existing, "models/wukong-huahua-ms.ckpt")


def test_a_published_checkpoint_that_is_missing_is_told_where_to_get(tmp_path):
    said = message(existing, f"{tmp_path}/sd_v2_768_v-e12e3a9b.ckpt")
    assert "https://" in said and "--version 2.0-v --download" in said and str(tmp_path) in said
    (tmp_path / "mine.ckpt").touch()
    assert existing(str(tmp_path / "mine.ckpt")) == str(tmp_path / "mine.ckpt")
    assert "does not exist" in message(existing, str(tmp_path / "other.ckpt"))


@pytest.mark.parametrize(("text", "value"), [("0.05", 0.05), ("100", 100), ("1e3", 1000), ("0", 0), ("1.0", 1)])
def test_steps_or_a_share_of_them(text, value):
    assert steps_or_share(text) == value and type(steps_or_share(text)) is type(value)


@pytest.mark.parametrize("text", ["1.5", "-0.5", "nan", "inf", "many", ""])
def test_what_is_neither_steps_nor_a_share(text):
    with pytest.raises(argparse.ArgumentTypeError, match="share"):
        steps_or_share(text)


def test_a_seed_is_drawn(caplog):
    caplog.set_level(logging.INFO)
    drawn = [argparse.Namespace(seed=seed(word)) for word in ("-1", "-1", "7")]
    for args in drawn:
        args.seed = settled_seed(args.seed, Ranks().broadcast)
    assert drawn[2].seed == 7 and drawn[0].seed != drawn[1].seed and min(drawn[0].seed, drawn[1].seed) >= 0
    assert [str(args.seed) in text for args, text in zip(drawn, caplog.messages)] == [True, True]
    with pytest.raises(argparse.ArgumentTypeError, match="-1"):
        seed("-2")


def test_a_moved_script_gives_our_command(capsys, monkeypatch):
    names = {"--source": "", "--target": "", "--model": None, "--gen": "--image_path"}
    words = ["--target", "b", "--gen=x y", "--model", "sdv2", "--source", "a", "--quiet"]
    assert translated(words, names) == ["a", "b", "--image_path", "x y", "--quiet"]
    monkeypatch.setattr("sys.argv", ["old.py", *words])
    with pytest.raises(SystemExit) as caught:
        answer("new.py", names, "a note")
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: this is new.py here: python new.py a b --image_path 'x y' --quiet (a note)\n"
    )


@pytest.mark.parametrize(
    ("script", "words", "ours"),
    [
        ("inpaint.py", ["--image", "a.png", "--mask", "b.png", "--num_samples", "2", "--aug", "resize"], "2.0-inpaint"),
        ("depth_to_image.py", ["--depth_map", "a.png", "--sample_steps", "9", "--ms_mode", "1"], "2.0-depth"),
    ],
)
def test_mindones_scripts_that_begin_with_pictures(script, words, ours, capsys, monkeypatch):
    """The command that they tell is one that text_to_image.py reads."""
    monkeypatch.setattr("sys.argv", [script, *words])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    told = shlex.split(re.search(r"python text_to_image.py (.*?) \(", capsys.readouterr().err)[1])
    args = read_options(text_to_image.build_parser(), told)
    assert args.version == ours and (args.init_image or args.depth_map) == "a.png"
    assert (args.n_iter, args.n_samples) == ((1, 2) if script == "inpaint.py" else (1, 4))


def test_options_without_effect_are_accepted_once_said_and_gone(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    args = options(tmp_path, "data_path: d\nnum_workers: 4\nprofile:", "--num_workers=8", "--dataset_sink_mode", "True")
    assert [sum(name in text for text in caplog.messages) for name in ("num_workers", "dataset_sink_mode")] == [1, 1]
    assert len(caplog.messages) == 2
    assert not hasattr(args, "num_workers") and not hasattr(args, "profile")


def test_an_option_is_either_ignored_or_there():
    with pytest.raises(Exception, match="epochs"):
        parser().ignore({"epochs": "it is there"})


def test_help_lists_options_and_defaults_but_not_the_ignored(capsys):
    with pytest.raises(SystemExit) as caught:
        read_options(parser(), ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--train_batch_size" in out and "num_workers" not in out


def test_help_says_every_default_once(capsys):
    options = Parser()
    options.add_argument("--steps", type=int, default=20, help="how often")
    options.add_argument("--scale", type=float, default=0.0, help="how much (default: the version's)")
    options.add_argument("--config", help="a file")
    options.add_argument("--flag", action="store_true", help="a flag")
    with pytest.raises(SystemExit):
        options.parse_args(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "how often (default: 20)" in out and "a file --flag a flag" in out
    assert out.count("default:") == 2


@pytest.mark.parametrize("word", ["True", "true", " YES", "on", "t", "y", "1"])
def test_words_for_true(word):
    assert str2bool(word) is True


@pytest.mark.parametrize("word", ["False", "false", "No", "off ", "f", "n", "0"])
def test_words_for_false(word):
    assert str2bool(word) is False


def test_configs_cannot_be_changed():
    for section in (ModelConfig("v"), UNetConfig(), VAEConfig(), TextConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            section.width = 1
        assert hash(section) == hash(dataclasses.replace(section))
