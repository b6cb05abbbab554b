"""Training of models of SDXL's kind: what the networks are told, caches, and a run of every kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import train_text_to_image
from mindspore import nn
from PIL import Image
from test_scripts import call, fill_place, refusal, training
from tiny_sdxl import smaller_sdxl_config, tiny_refiner_config

from ldm import checkpoint
from ldm.checkpoint import lora
from ldm.conditioning import Sizes, embed_numbers
from ldm.config.model import ModelConfig, save_model_config
from ldm.config.options import read_options
from ldm.data.batches import Augment, Batches
from ldm.data.dataset import CaptionedImages
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.train import finetune
from ldm.train.cache import ArrayStore, text_key
from ldm.train.finetune import caches_latents, plan_of
from ldm.train.frozen import FrozenOutputs
from ldm.train.inputs import Inputs
from ldm.train.state import RESUME_NAME
from ldm.train.text_loss import TextLoss

CONFIG = smaller_sdxl_config()


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    fill_place(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def frozen_model():
    model = StableDiffusion(CONFIG, (finetune.VAE, finetune.TEXT))
    initialize(model, 0)
    return model


def weights(path):
    """By our names, whatever those in the file are."""
    return checkpoint.load(str(path)).tensors


def options(*words):
    return read_options(train_text_to_image.build_parser(), list(map(str, words)))


def make_data(folder, *sides):
    """Pictures of these (width, height), each with its number 80 times as caption, and one without a caption."""
    folder.mkdir()
    rows = [f"{n}.png,{' '.join([str(n)] * 80) if n else ''}" for n in range(len(sides))]
    (folder / "img_txt.csv").write_text("\n".join(["dir,text", *rows]))
    for n, (width, height) in enumerate(sides):
        pixels = np.random.default_rng(n).integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return CaptionedImages(folder, 32)


def inputs_of(model, data, caches, token_ids=False):
    flat = np.full(1000, 1 / 1000), np.ones(1000)
    return Inputs(model, data, 3, caches, token_ids, caches.pieces, True, *flat)


@pytest.mark.parametrize("pieces", [1, 2])
def test_inputs_are_the_same_with_and_without_caches(frozen_model, tmp_path, pieces):
    """Latents of mirrored pictures, text and pooled text; the sizes come from the data, zeros for empty captions."""
    data, augment = make_data(tmp_path / "data", (40, 32), (32, 64), (50, 50)), Augment(flip=True)
    kinds = [(False, False), (True, True)]
    caches = [FrozenOutputs(tmp_path, CONFIG, {}, 32, "float32", *kind, True, pieces) for kind in kinds]
    caches[1].fill(frozen_model, data, 2)
    assert len(caches[1].latents) == 6 and len(caches[1].features) == 3
    caches[1].leave_out_missing(data)
    streams = [iter(Batches(data, 4, 3, augment, pictures=pictures, cuts=True)) for pictures in (True, False)]
    inputs, mirrored = [inputs_of(frozen_model, data, cache) for cache in caches], []
    for plain, cached in [[next(stream) for stream in streams] for _ in range(4)]:
        mirrored += plain.mirrored
        assert cached.images is None and cached.mirrored == plain.mirrored and cached.cuts == plain.cuts
        encoded, found = (each(batch) for each, batch in zip(inputs, (plain, cached)))
        assert len(encoded) == len(found) == 6
        for one, other in zip(encoded, found):
            np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=0, atol=1e-5)
        context, vector = (field.asnumpy() for field in found[4:])
        assert context.shape[1] == 77 * pieces
        assert [bool(row.any()) for row in context] == [bool(text) for text in plain.texts]
        numbers = np.array([Sizes(*cut).numbers(6) for cut in plain.cuts])
        np.testing.assert_array_equal(vector[:, 32:], embed_numbers(numbers, 8))
        assert [bool(row.any()) for row in vector[:, :32]] == [bool(text) for text in plain.texts]
    assert {*mirrored} == {False, True}


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_text_loss_gives_the_network_what_inputs_would(frozen_model, tmp_path, pieces):
    class Echo(nn.Cell):
        def construct(self, latents, eps, t, weight, context, vector):
            return context, vector

    data = make_data(tmp_path / "data", (40, 32), (32, 64), (50, 50))
    none = FrozenOutputs(tmp_path, CONFIG, {}, 32, "float32", False, False, pieces=pieces)
    batch = next(iter(Batches(data, 3, 3, cuts=True)))
    wanted = inputs_of(frozen_model, data, none)(batch)
    ids = inputs_of(frozen_model, data, none, token_ids=True)(batch)
    assert ids[4].shape == (3 * pieces, 2, 77) and sorted(ids[5].asnumpy()) == [0, 1, 1]
    for one, other in zip(TextLoss(frozen_model.text_encoder, Echo(), True)(*ids), wanted[4:]):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=0, atol=1e-5)


def test_the_cache_of_a_model_without_sizes_is_where_it_was(tmp_path):
    """Its folders and its rows are those of earlier versions."""
    caches = FrozenOutputs(tmp_path, ModelConfig("v"), {}, 64, "float32", True, True)
    folders = caches.features.folder.name, caches.latents.folder.name
    assert folders == ("text-3c0a44d7da998434", "latents-c7a134d909b5dc33")
    rows = np.arange(77 * 1024, dtype=np.float32).reshape(1, 77, 1024)
    ArrayStore(caches.features.folder, (77, 1024)).append([text_key("a")], rows)
    caches.features.refresh()
    condition = caches.condition(["a"])
    assert np.array_equal(condition.context, rows) and condition.vector is None


def test_latents_are_cached_where_no_crop_can_move(tmp_path):
    square, other = make_data(tmp_path / "a", (40, 40), (64, 64)), make_data(tmp_path / "b", (40, 40), (40, 41))
    for words, of_squares, of_others in (
        ([], True, True),
        (["--flip", True], True, True),
        (["--random_crop", True], True, False),
        (["--random_crop", True, "--cache_latents", False], False, False),
    ):
        args = options(*words)
        assert (caches_latents(args, square), caches_latents(args, other)) == (of_squares, of_others)


def test_only_layers_that_are_read_are_trained():
    first, second = (StableDiffusion(CONFIG, (finetune.TEXT,)).text_encoder.first for _ in range(2))
    used = {param.name for param in first.used_parameters()}
    unused = {param.name for param in second.get_parameters()} - used
    assert unused and all("encoder.layers.1." in name or "final_layer_norm" in name for name in unused)
    assert any("encoder.layers.0." in name for name in used) and any("token_embedding" in name for name in used)
    both = StableDiffusion(CONFIG, (finetune.TEXT,)).text_encoder
    assert len(both.used_parameters()) == len(used) + len(list(both.second.get_parameters()))


def test_validation_by_epochs():
    args = options("--validation_prompts", "a", "a", "--validation_epochs", 2)
    plan = plan_of(args, 5)
    assert [step for step in range(1, plan.total + 1) if plan.validates(step)] == [10, 20, 30, 40, 50]
    assert plan_of(options("--validation_prompts", "a"), 5).validate_every == 500


def test_a_refiner_is_not_trained(xl, tmp_path, monkeypatch, capsys):
    save_model_config(tiny_refiner_config(), tmp_path / "refiner.yaml")
    words = training(xl, tmp_path / "out", "--model_config", tmp_path / "refiner.yaml")
    assert "refiner" in refusal(monkeypatch, capsys, train_text_to_image, words)


def test_a_student_that_is_told_the_guidance_scale_is_not_trained(xl, tmp_path, monkeypatch, capsys):
    words = training(xl, tmp_path / "out", "--set", "model.unet.time_cond_proj_dim=8")
    said = refusal(monkeypatch, capsys, train_text_to_image, words)
    assert "range of guidance scales" in said and "distilled from" in said and not (tmp_path / "out").exists()


def test_unet_and_both_text_encoders_are_trained(xl, tmp_path, monkeypatch):
    """One command; all that is used moves, the rest stays. The sizes and the pooled text reach the UNet."""
    output = tmp_path / "out"
    words = ["--train_text_encoder", True, "--ckpt_format", "diffusers", "--train_steps", 2, "--use_ema", False]
    draw = ["--validation_prompts", "a cat", "a cat", "--validation_epochs", 1, "--validation_steps", 2]
    changes = ["--random_crop", True, "--flip", True, "--weight_decay", 0.01]
    call(monkeypatch, train_text_to_image, training(xl, output, *words, *draw, *changes))
    before, after = weights(xl / "base.safetensors"), weights(output / "ckpt/rank_0/sd-1")
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    unused = (".text_model.encoder.layers.1.", ".text_model.final_layer_norm.")
    assert all(name.startswith("first_stage_model.") or any(part in name for part in unused) for name in same)
    assert not any("label_emb" in name or "embedders.1." in name for name in same)
    assert sorted(path.name for path in (output / "validation").iterdir()) == ["000000.png", "000002.png"]
    grid = np.asarray(Image.open(output / "validation/000000.png"))
    assert grid.shape == (40, 76, 3) and not np.array_equal(grid[4:36, 4:36], grid[4:36, 40:72])  # each has its noise


def test_a_run_of_adapters_in_parts_is_that_in_one_bit_for_bit(xl, tmp_path, monkeypatch):
    """In the UNet and both text encoders. PEFT's folders are where DiffEngine has them, and old ones are removed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["--use_lora", True, "--lora_ft_text_encoder", True, "--lora_dropout", 0.3, "--lora_format", "peft"]
    words += ["--step_mode", True, "--ckpt_save_interval", 3, "--scheduler", "constant", "--flip", True]
    for output, more in (
        (whole, ["--train_steps", 5]),
        (parts, ["--train_steps", 3]),
        (parts, ["--train_steps", 5, "--resume", True, "--ckpt_max_keep", 1]),
    ):
        call(monkeypatch, train_text_to_image, training(xl, output, *words, *more))
    assert sorted(path.name for path in whole.glob("step*")) == ["step3", "step5"]
    assert [path.name for path in parts.glob("step*")] == ["step5"]
    folders = ["text_encoder_one", "text_encoder_two", "unet"]
    assert sorted(path.name for path in (whole / "step5").iterdir()) == folders
    trained = {name.split(".")[0] for name, pair in lora.load(whole / "step5").pairs.items() if pair.up.any()}
    assert trained == {"unet", "text_encoder", "text_encoder_2"}
    first, second = (checkpoint.formats.read(out / "ckpt/rank_0" / RESUME_NAME)[0] for out in (whole, parts))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_the_seeds_job_is_one_command(xl, tmp_path, monkeypatch):
    """DiffEngine's settings on a tiny model: folders as it writes them, and four pictures of one prompt per epoch.

    The prompts are encoded ahead: the text encoders need no memory while the UNet is trained.
    """
    output, forgotten, forget = tmp_path / "out", [], StableDiffusion.forget_text_encoder
    monkeypatch.setattr(StableDiffusion, "forget_text_encoder", lambda self: forgotten.append(1) or forget(self))
    words = ["--train_config", "configs/train/train_config_lora_sdxl_vpred.yaml", "--data_path", xl / "data"]
    words += ["--pretrained_model_path", xl / "base.safetensors", "--output_path", output]
    tiny = ["--model_config", xl / "model.yaml", "--image_size", 32, "--train_batch_size", 6]
    tiny += ["--epochs", 2, "--validation_steps", 1]
    call(monkeypatch, train_text_to_image, [*map(str, (*words, *tiny))])
    assert forgotten and sorted(path.name for path in output.glob("step*")) == ["step2", "step4"]
    assert [path.name for path in (output / "step4").iterdir()] == ["unet"]
    config = json.loads((output / "step4/unet/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 8, "LORA")
    pairs = lora.load(output / "step4").pairs
    ends = {".".join(name.split(".")[-2:]) for name in pairs}
    assert ends == {f"attn{n}.to_{x}" for n in (1, 2) for x in "qkv"} | {"to_out.0"}
    pictures = [np.asarray(Image.open(output / f"validation/{step:06}.png")) for step in (0, 2, 4)]
    assert all(picture.shape == (40, 148, 3) for picture in pictures)
