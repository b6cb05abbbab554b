"""Drawing with SDXL: what it is told beside the prompt, its refiner, and weights that stay in their file."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import text_to_image
from kept_networks import keep_networks
from mindspore import nn
from PIL import Image
from tiny_sdxl import random_tensors, smaller_sdxl_config, tiny_refiner_config

from ldm import checkpoint, runtime
from ldm.conditioning import Condition, Sizes, embed_numbers
from ldm.diffusion.denoiser import Denoiser, Relay
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.model import StableDiffusion
from ldm.networks import blockwise
from ldm.parts import TEXT, UNET
from ldm.pictures import read_facts
from ldm.pipeline import Pipeline, Settings, sampler_of
from ldm.weights import words_of

CONFIG, REFINER = smaller_sdxl_config(), tiny_refiner_config()
SMALLER_REFINER = replace(  # for the base's latents, with one level and one transformer
    REFINER,
    schedule=CONFIG.schedule,
    prediction_type="v",
    unet=replace(
        REFINER.unet,
        num_res_blocks=1,
        channel_mult=(1,),
        attention_resolutions=(1,),
        transformer_depth=1,
        context_dim=32,
        adm_in_channels=32 + 5 * 8,
        size_channels=8,
    ),
    vae=CONFIG.vae,
    text=CONFIG.text_2,
)
DEEP_REFINER = replace(SMALLER_REFINER, unet=replace(SMALLER_REFINER.unet, channel_mult=(1, 1, 1, 1)))


def pipeline(config) -> Pipeline:
    model = StableDiffusion(config)
    model.load(random_tensors(config), "random")
    return Pipeline(config, model)


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return pipeline(CONFIG)


SETTINGS = Settings(sampler_of(CONFIG, "ddim"), 2, 5.0, 32, 32, 0)


def draw(pipe: Pipeline, negative: str = "", **changes) -> np.ndarray:
    return pipe.draw(["a fox"], [negative], [0], replace(SETTINGS, **changes)).astype(int)


def test_numbers_are_embedded_as_times_are():
    """Cosines first, then sines; each number has its own channels."""
    numbers = np.array([[1024.0, 3.0], [7.0, 0.0]])
    got = embed_numbers(numbers, 6).reshape(2, 2, 6)
    frequencies = np.array([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)])
    for n, k in np.ndindex(numbers.shape):
        angles = numbers[n, k] * frequencies
        np.testing.assert_allclose(got[n, k], [*np.cos(angles), *np.sin(angles)], atol=1e-6)


def test_the_order_of_the_sizes_is_that_of_the_papers_code():
    sizes = Sizes((1, 2), (3, 4), (5, 6), 7.5)
    assert sizes.numbers(6) == (1, 2, 3, 4, 5, 6) and sizes.numbers(5) == (1, 2, 3, 4, 7.5)


@pytest.mark.parametrize("field", ["original", "crop", "target"])
def test_each_size_changes_the_picture(base, field):
    own = Sizes((32, 32), (0, 0), (32, 32))
    plain = draw(base)
    assert (draw(base, sizes=own) == plain).all()  # what is told where nobody says anything
    assert (draw(base, sizes=own._replace(**{field: (90, 40)})) != plain).any()
    assert (draw(base, negative_sizes=own._replace(**{field: (90, 40)})) != plain).any()


def test_zeros_stand_for_an_empty_negative_prompt_alone(base):
    assert (draw(base, zeros_for_empty=True) != draw(base)).any()
    assert (draw(base, "red", zeros_for_empty=True) == draw(base, "red")).all()
    sizes = Sizes((32, 32), (0, 0), (32, 32))
    condition = base.told(["", "red"], sizes, True)
    assert not condition.context[0].any() and condition.context[1].any()
    pooled = CONFIG.text_2.projection
    assert not condition.vector[0, :pooled].any() and condition.vector[0, pooled:].any()  # the sizes stay
    assert (condition.vector[:, pooled:] == base.told(["", "red"], sizes).vector[:, pooled:]).all()


class Two(nn.Cell):
    """Another output with and without caption: the context is an offset."""

    def construct(self, x, t, context):
        return x * (1 + context[:, :, :1, None]) + context[:, :, :1, None]


def test_rescaled_guidance_has_the_deviation_of_the_captions_output():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1, 4, 4))
    cond, uncond = (Condition(np.full((2, 1, 1), value, np.float32)) for value in (0.5, -0.3))
    schedule, prediction = build_schedule(CONFIG.schedule), get_prediction("eps")
    schedule = build_schedule(replace(CONFIG.schedule, zero_terminal_snr=False))

    def eps(scale, rescale=0.0):
        return Denoiser(Two(), schedule, prediction, cond, uncond, scale, rescale)(x, 500)[1]

    plain, alone = eps(7.0), eps(1.0)
    np.testing.assert_allclose(eps(7.0, 1.0).std((1, 2, 3)), alone.std((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(eps(7.0, 0.3), 0.3 * eps(7.0, 1.0) + 0.7 * plain, rtol=1e-5)
    assert (eps(1.0, 0.7) == alone).all() and plain.std() > 2 * alone.std()


def test_the_refiner_draws_from_its_time_on():
    seen = []
    relay = Relay(
        lambda x, t: seen.append("base"), lambda x, t: seen.append("refiner"), 200, lambda: seen.append("handed")
    )
    for t in (999, 200, 199, 0):
        relay(None, t)
    assert seen == ["base", "base", "handed", "refiner", "refiner"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_weights_are_lent_from_their_file_layer_by_layer(tmp_path, dtype):
    """The picture is that of the widened weights, and no layer's own parameter is filled."""
    config = replace(CONFIG, unet=replace(CONFIG.unet, transformer_depth=(1, 2)))
    tensors = random_tensors(config)
    if dtype == "bfloat16":
        tensors = {
            n: (a.view(np.uint32) >> 16).astype("<u2").view(checkpoint.arrays.BFLOAT16) for n, a in tensors.items()
        }
    else:
        tensors = {name: array.astype(np.float16) for name, array in tensors.items()}
    wide = {name: checkpoint.widened(array).astype(np.float32) for name, array in tensors.items()}
    pictures = []
    for given, as_stored in ((tensors, True), (wide, False)):
        model = StableDiffusion(config)
        model.load(given, "random", as_stored=(UNET, TEXT) if as_stored else ())
        lent = blockwise.lent_parameters(model.unet, model.text_encoder)
        empty = [p for p in model.get_parameters() if id(p) in lent and not p.asnumpy().any()]
        assert bool(empty) == as_stored
        model.compile_blockwise()
        pictures.append(draw(Pipeline(config, model)))
    assert (pictures[0] == pictures[1]).all()


# ---- the script ----


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("sdxl")
    for name, config in (("base", CONFIG), ("refiner", SMALLER_REFINER), ("deep", DEEP_REFINER)):
        checkpoint.save(place / f"{name}.safetensors", random_tensors(config), words_of(config), "safetensors")
    return place


def call(monkeypatch, place, out, *more) -> dict:
    """The facts of the one picture that the command draws."""
    words = ["--ckpt_path", place / "base.safetensors", "--output_path", out, "--n_iter", 1, "--n_samples", 1]
    words += ["--H", 64, "--W", 128, "--sampling_steps", 4, "--prompt", "a fox", "--skip_grid", *more]
    keep_networks(monkeypatch)
    monkeypatch.setattr(sys, "argv", [text_to_image.__file__, *map(str, words)])
    runtime.run(text_to_image.main)
    return read_facts(out / "samples/00000.png")


def test_a_command_draws_with_base_and_refiner(monkeypatch, files, tmp_path):
    plain = call(monkeypatch, files, tmp_path / "a")
    assert plain["sizes"] == [[64, 128], [0, 0], [64, 128], 6.0] and plain["refiner"] is None
    assert plain["zeros_for_empty_prompt"] is True  # the model's own
    words = ["--original_size", 90, 80, "--negative_crop", 3, 4, "--refiner", files / "refiner.safetensors"]
    refined = call(monkeypatch, files, tmp_path / "b", *words, "--refiner_start", 0.5)
    assert refined["sizes"][0] == [90, 80] and refined["negative_sizes"][:2] == [[90, 80], [3, 4]]
    assert refined["refiner"] == ["refiner.safetensors", 0.5] and len(refined["refiner_sha256"]) == 64
    pictures = [np.asarray(Image.open(tmp_path / name / "samples/00000.png")) for name in "ab"]
    assert pictures[0].shape == (64, 128, 3) and (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--crop", -1, 0], "--crop must be two numbers of pixels"),
        (["--original_size", 0, 5], "--original_size must be two numbers of pixels"),
        (["--guidance_rescale", 1.5], "--guidance_rescale must be between 0 and 1"),
        (["--refiner_start", -0.1], "--refiner_start must be between 0 and 1"),
        (["--refiner", "BASE"], "is no refiner of SDXL"),
        (["--refiner", "DEEP", "--H", 72], "image size 72 is not divisible by 16"),
        (
            ["--ckpt_path", "models/tiny-vpred.safetensors", "--H", 64, "--crop", 1, 1],
            "--crop is for Stable Diffusion XL",
        ),
    ],
)
def test_what_sdxl_cannot_be_told(monkeypatch, capsys, files, tmp_path, more, words):
    names = {"BASE": files / "base.safetensors", "DEEP": files / "deep.safetensors"}
    more = [names.get(word, word) for word in more]
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, files, tmp_path / "out", *more)
    said = str(caught.value.code) + capsys.readouterr().err
    assert words in said and not list(tmp_path.glob("out/samples/*"))
