"""SDXL, base and refiner, against diffusers at the same random weights.

FULL_SIZE=xl-vpred,xl,xl-refiner in the environment adds these at full size, one after the other.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import train_text_to_image
from PIL import Image

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")
peft = pytest.importorskip("peft", reason="PEFT is not installed: make parity")

from mindspore import Tensor
from reference import relative_rms
from tiny_sdxl import random_tensors, smaller_sdxl_config, tiny_refiner_config, tiny_sdxl_config

from ldm import checkpoint, runtime
from ldm.conditioning import Sizes
from ldm.config.model import load_model_config, save_model_config
from ldm.config.versions import VERSIONS
from ldm.model import StableDiffusion
from ldm.parts import TEXT, UNET
from ldm.pipeline import Pipeline, Settings, normal_draws, sampler_of
from ldm.weights import with_adapters, words_of

pytestmark = pytest.mark.parity
FULL_SIZE = {v: load_model_config(VERSIONS[v].config) for v in os.environ.get("FULL_SIZE", "").split(",") if "xl" in v}
# One prompt at a time: diffusers 0.42 mixes up the sizes of the two sides of guidance in a larger batch.
PROMPTS = ["a drawing of a fox, noto style"]
TEXTS = ["a drawing of a fox, noto style", "two green birds"]
SIZES, NEGATIVE = Sizes((90, 80), (3, 5), (64, 128)), Sizes((64, 64), (1, 0), (32, 32), 2.5)


def pair(config, place, seed=0):
    """(our pipeline, diffusers') of the same random weights, by a folder that we write."""
    tensors = random_tensors(config, seed)
    checkpoint.save(place, tensors, words_of(config), "diffusers")
    model = StableDiffusion(config)
    model.load(tensors, "random", copy=True)
    return Pipeline(config, model), diffusers.DiffusionPipeline.from_pretrained(place)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pair(tiny_sdxl_config(), tmp_path_factory.mktemp("base") / "pipeline")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    """With the base's schedule, as it must have."""
    config = replace(tiny_refiner_config(), schedule=tiny_sdxl_config().schedule, prediction_type="v")
    return pair(config, tmp_path_factory.mktemp("refiner") / "pipeline", seed=1)


@pytest.mark.parametrize("version", FULL_SIZE)
def test_the_published_models_at_full_size(version, tmp_path):
    """Networks, text encoders, and two guided steps."""
    config, place = FULL_SIZE[version], tmp_path / "pipeline"
    checkpoint.save(place, random_tensors(config, 0, "float16"), words_of(config), "diffusers")
    chosen = settings(config, 2, zeros_for_empty=config.sampling.zeros_for_empty_prompt)
    theirs = diffusers.DiffusionPipeline.from_pretrained(place, torch_dtype=torch.float32)
    wanted = [networks_of(theirs)]
    if config.text_2 is not None:
        wanted += [texts_of(theirs), steps_of(theirs, chosen)]
    del theirs  # there is no room for both
    gc.collect()
    model = StableDiffusion(config)
    model.load(checkpoint.load(place).tensors, str(place), as_stored=(UNET, TEXT))
    model.compile_blockwise()
    ours = Pipeline(config, model)
    compare_networks(ours, wanted[0])
    if config.text_2 is not None:
        compare_texts(ours, wanted[1])
        assert relative_rms(latents_of(ours, chosen, [""]), wanted[2]) <= 1e-3


def test_networks_of_the_base(base):
    compare_networks(base[0], networks_of(base[1]))


def test_networks_of_the_refiner(refiner):
    compare_networks(refiner[0], networks_of(refiner[1]))


class Networks(NamedTuple):
    """Inputs of UNet and autoencoder, and what diffusers' say of them."""

    z: np.ndarray
    t: np.ndarray
    context: np.ndarray
    vector: np.ndarray
    numbers: np.ndarray
    output: np.ndarray
    pixels: np.ndarray
    mean: np.ndarray
    decoded: np.ndarray


def networks_of(theirs) -> Networks:
    rng = np.random.default_rng(0)
    unet = theirs.unet.config
    z = rng.standard_normal((2, 4, 8, 16), np.float32)  # the shape of the guided steps, one graph
    context = rng.standard_normal((2, 77, unet.cross_attention_dim), np.float32)
    pooled = theirs.text_encoder_2.config.projection_dim
    vector = rng.standard_normal((2, pooled), np.float32)
    count = (unet.projection_class_embeddings_input_dim - pooled) // unet.addition_time_embed_dim
    numbers = rng.integers(0, 1024, (2, count)).astype(np.float32)
    t = np.array([3, 977], np.int32)
    told = {"text_embeds": torch.from_numpy(vector), "time_ids": torch.from_numpy(numbers)}
    with torch.no_grad():
        arrays = map(torch.from_numpy, (z, t, context))
        output = theirs.unet(*arrays, added_cond_kwargs=told).sample.numpy()
        pixels = rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
        mean = theirs.vae.encode(torch.from_numpy(pixels)).latent_dist.mean
        decoded = theirs.vae.decode(mean).sample.numpy()
    return Networks(z, t, context, vector, numbers, output, pixels, mean.numpy(), decoded)


def compare_networks(ours, wanted: Networks):
    condition = ours.condition(["", ""])._replace(context=wanted.context, vector=wanted.vector)
    condition = ours.model.told_sizes(condition, wanted.numbers)
    got = ours.model.unet(Tensor(wanted.z), Tensor(wanted.t), *condition.map(Tensor)).asnumpy()
    assert relative_rms(got, wanted.output) <= 1e-4
    mean, _ = ours.model.encode_images(wanted.pixels)
    assert relative_rms(mean, wanted.mean * 0.13025) <= 1e-4
    assert relative_rms(ours.model.vae(Tensor(wanted.mean)).asnumpy(), wanted.decoded) <= 1e-4


def test_text_encoders(base):
    """Each encoder's own padding, the layers before the last, the pooled text of the second."""
    compare_texts(base[0], texts_of(base[1]))


def texts_of(theirs):
    with torch.no_grad():
        context, _, pooled, _ = theirs.encode_prompt(TEXTS, do_classifier_free_guidance=False)
    return context.numpy(), pooled.numpy()


def compare_texts(ours, wanted):
    condition = ours.condition(TEXTS)
    assert relative_rms(condition.context, wanted[0]) <= 1e-4
    assert relative_rms(condition.vector, wanted[1]) <= 1e-4


def settings(config, steps, **more):
    """DDIM as diffusers has it: the last step goes to time 0."""
    return Settings(sampler_of(config, "ddim"), steps, 5.0, 64, 128, 0, SIZES, NEGATIVE, **more)


NOISE = normal_draws(0, "parity", (4, 8, 16), [0])


def latents_of(pipeline, chosen, negative):
    """Ours: the final latents from that noise."""
    denoise = pipeline.guided(PROMPTS, negative, chosen)
    times = chosen.sampler.times(pipeline.schedule, chosen.steps)
    return chosen.sampler(denoise, NOISE(-1), times, pipeline.schedule)


def called(chosen, **more):
    """The arguments of diffusers' pipelines for the same latents."""
    sizes = {"original_size": SIZES.original, "crops_coords_top_left": SIZES.crop, "target_size": SIZES.target}
    sizes |= {f"negative_{key}": value for key, value in zip(sizes, NEGATIVE[:3])}
    words = {"num_inference_steps": chosen.steps, "guidance_scale": 5.0, "output_type": "latent"}
    return {"latents": torch.from_numpy(NOISE(-1)).float(), "height": 64, "width": 128, **words, **sizes, **more}


@pytest.mark.parametrize(
    ("negative", "zeros", "rescale"), [(None, True, 0.7), ("", False, 0.0), ("red", True, 0.0)], ids=str
)
def test_five_guided_steps_with_zero_terminal_snr(base, negative, zeros, rescale):
    ours, theirs = base
    assert theirs.scheduler.config.rescale_betas_zero_snr and theirs.config.force_zeros_for_empty_prompt
    chosen = settings(tiny_sdxl_config(), 5, guidance_rescale=rescale, zeros_for_empty=zeros)
    assert relative_rms(latents_of(ours, chosen, [negative or ""]), steps_of(theirs, chosen, negative)) <= 1e-3


def steps_of(theirs, chosen, negative=None):
    """diffusers' latents after the steps of DDIM."""
    theirs.set_progress_bar_config(disable=True)
    negatives = None if negative is None else [negative]
    words = {"negative_prompt": negatives, "guidance_rescale": chosen.guidance_rescale, **called(chosen)}
    return theirs(PROMPTS, **words).images.numpy()


def test_the_refiner_goes_on_where_the_base_ends(base, refiner):
    """diffusers' two pipelines, the first one up to a share of the time, the second one from there."""
    ours, theirs = base
    chosen = settings(tiny_sdxl_config(), 4, zeros_for_empty=True, refiner_start=0.5)
    with_refiner = Pipeline(tiny_sdxl_config(), ours.model, refiner[0])
    got, words = latents_of(with_refiner, chosen, [""]), called(chosen)
    half = theirs(PROMPTS, denoising_end=0.5, **words).images
    for key in ("latents", "height", "width"):
        del words[key]
    refine = refiner[1]
    wanted = refine(PROMPTS, image=half, denoising_start=0.5, negative_prompt=[""], **words).images
    assert relative_rms(got, wanted.numpy()) <= 1e-3


def test_diffengines_snippet_draws_with_what_was_trained_here(tmp_path, monkeypatch):
    """Base by diffusers, adapters by PEFT from the folders of a run, the scheduler by from_config: the same picture."""
    config = smaller_sdxl_config()
    pair(config, tmp_path / "ours")[1].save_pretrained(tmp_path / "base")
    data = tmp_path / "data"
    data.mkdir()
    (data / "img_txt.csv").write_text("dir,text\n0.png,a red fox\n1.png,a house\n")
    for n, sides in enumerate(((75, 65), (70, 64))):
        pixels = np.random.default_rng(n).integers(256, size=(*sides, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{n}.png")
    words = ["--train_config", "configs/train/train_config_lora_sdxl_vpred.yaml", "--data_path", data]
    words += ["--output_path", tmp_path / "out", "--pretrained_model_path", tmp_path / "base", "--image_size", 32]
    words += ["--model_config", save(config, tmp_path / "tiny.yaml"), "--train_steps", 2]
    words += ["--start_learning_rate", 0.05, "--lora_ft_text_encoder", True, "--validation_epochs", 1]
    words += ["--validation_steps", 1]
    monkeypatch.setattr(sys, "argv", [train_text_to_image.__file__, *map(str, words)])
    runtime.run(train_text_to_image.main)
    run = tmp_path / "out/step2"

    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base")
    plain = draw(theirs)
    theirs.unet = peft.PeftModel.from_pretrained(theirs.unet, run / "unet", adapter_name="default")
    for name, folder in (("text_encoder", "text_encoder_one"), ("text_encoder_2", "text_encoder_two")):
        encoder = peft.PeftModel.from_pretrained(getattr(theirs, name), run / folder, adapter_name="default")
        setattr(theirs, name, encoder)
    wanted = draw(theirs)
    chosen = replace(settings(config, 4), zeros_for_empty=True, sizes=None, negative_sizes=None)
    chosen = replace(chosen, height=16, width=32)
    tensors, _ = with_adapters(checkpoint.load(tmp_path / "base").tensors, config, [str(run)], [1.0])
    model = StableDiffusion(config)
    model.load(tensors, "with adapters", copy=True)
    ours = Pipeline(config, model).draw(PROMPTS, [""], [0], chosen).astype(float)
    assert np.abs(ours - 255 * wanted).max() <= 0.51 + 255 * 1e-3 and relative_rms(plain, wanted) > 0.01


def draw(pipe) -> np.ndarray:
    """The snippet's call, from our noise: [1, H, W, 3] in [0, 1]."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.set_progress_bar_config(disable=True)
    noise = normal_draws(0, "sampling noise", (4, 8, 16), [0])(-1)
    words = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 32, "output_type": "np"}
    return pipe(PROMPTS, latents=torch.from_numpy(noise).float(), **words).images


def save(config, path):
    save_model_config(config, path)
    return path
