"""What a drawing begins with, against diffusers' pipelines for it at the same random weights.

The UNets with 9 and 5 input channels, and the latents after five steps from a picture, of a masked picture, with a
depth map. diffusers reads the folder that we write.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_depth2img,
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
)
from mindspore import Tensor
from PIL import Image
from reference import narrow, relative_rms

from ldm import checkpoint
from ldm.config.model import SamplingConfig
from ldm.data.inputs import Inputs
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.pipeline import Pipeline, noise_of, sampler_of, settings_for
from ldm.randomness import generator
from ldm.weights import words_of

pytestmark = pytest.mark.parity
SIDE, PROMPTS, NEGATIVES = 128, ["a drawing of a fox", "two green birds, noto style"], ["", "red"]
SD1, SD2 = narrow("clip", 768, num_heads=4), narrow("openclip", 1024, num_head_channels=32)
KINDS = {"sd2": (SD2, 4), "sd1 mask": (SD1, 9), "sd2 mask": (SD2, 9), "sd2 depth": (SD2, 5)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(the kind, our pipeline, diffusers' components) of the same random weights."""
    config, channels = KINDS[request.param]
    config = replace(config, unet=replace(config.unet, in_channels=channels), sampling=SamplingConfig("ddim"))
    config = replace(config, sampling=replace(config.sampling, final_sigma="zero"))
    model = StableDiffusion(config)
    initialize(model, 0)
    tensors = model.tensors()
    for name, array in tensors.items():
        if array.ndim == 1 or not array.any():
            tensors[name] = array + generator(1, name).normal(0, 0.05, array.shape).astype(np.float32)
    model.load(tensors, "random", copy=True)
    folder = tmp_path_factory.mktemp("pair") / "pipeline"
    checkpoint.save(folder, tensors, words_of(config), "diffusers")
    absent = dict.fromkeys(("depth_estimator", "feature_extractor")) if config.joined == "depth" else {}
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    names = {"mask": "Inpaint", "depth": "Depth2Img", None: ""}
    assert type(theirs).__name__ == f"StableDiffusion{names[config.joined]}Pipeline"
    assert checkpoint.load(folder).tensors.keys() == tensors.keys()
    return request.param, Pipeline(config, model), theirs.components


def test_unet(pair):
    _, ours, theirs = pair
    unet, rng = theirs["unet"], np.random.default_rng(0)
    z = rng.standard_normal((4, unet.config.in_channels, 16, 16), np.float32)  # shapes as in the steps, one graph
    context = rng.standard_normal((4, 77, unet.config.cross_attention_dim), np.float32)
    t = np.array([3, 977, 0, 500], np.int32)
    with torch.no_grad():
        wanted = unet(*map(torch.from_numpy, (z, t, context))).sample.numpy()
    assert relative_rms(ours.model.unet(*map(Tensor, (z, t, context))).asnumpy(), wanted) <= 1e-4


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.BICUBIC).save(tmp_path / "init.png")
    hole = np.zeros((SIDE, SIDE), np.uint8)
    hole[32:96, 40:112] = 255  # whole latents, so that ours and theirs have the same mask
    Image.fromarray(hole).save(tmp_path / "mask.png")
    Image.fromarray(rng.integers(0, 65536, (16, 16)).astype(np.uint16)).save(tmp_path / "depth.png")
    return tmp_path


@pytest.fixture
def given_noise(monkeypatch):
    """Let diffusers' pipelines take this noise, and the mean of the autoencoder's Gaussian."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    modules = (
        pipeline_stable_diffusion_depth2img,
        pipeline_stable_diffusion_img2img,
        pipeline_stable_diffusion_inpaint,
    )

    def give(noise):
        for module in modules:
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise).float())

    return give


WAYS = {  # kind of model: (pipeline, the files, strengths)
    "sd2": [("Img2Img", ("init_image",), (0.4, 1.0)), ("Inpaint", ("init_image", "mask"), (0.8,))],
    "sd1 mask": [("Inpaint", ("init_image", "mask"), (1.0,))],
    "sd2 mask": [("Inpaint", ("init_image", "mask"), (1.0, 0.6))],
    "sd2 depth": [("Depth2Img", ("init_image", "depth_map"), (0.8,))],
}


def test_latents_after_five_steps(pair, files, given_noise):
    kind, ours, theirs = pair
    paths = {"init_image": files / "init.png", "mask": files / "mask.png", "depth_map": files / "depth.png"}
    picture, mask = Image.open(files / "init.png"), Image.open(files / "mask.png")
    for name, used, strengths in WAYS[kind]:
        for strength in strengths:
            pipe = getattr(diffusers, f"StableDiffusion{name}Pipeline")(**theirs_for(name, theirs))
            steps = int(np.ceil(5 / strength))
            settings = settings_for(config_of(kind), sampler_of(config_of(kind), "ddim", None, None, "zero"), 3)
            settings = replace(settings, steps=steps, guidance_scale=5.0, strength=strength, height=SIDE, width=SIDE)
            settings = replace(settings, inputs=Inputs(**{key: str(paths[key]) for key in used}))
            numbers, shape = [0, 1], ours.model.latent_shape(SIDE, SIDE)
            given_noise(noise_of(settings, "sampling noise", shape, numbers)(-1))
            more = {"mask_image": mask, "height": SIDE, "width": SIDE} if "mask" in used else {}
            if "depth_map" in used:
                more = {
                    "depth_map": torch.from_numpy(np.asarray(Image.open(paths["depth_map"])).astype(np.float32))[None]
                }
            words = {"image": [picture, picture], "strength": strength, "num_inference_steps": steps}
            pipe.set_progress_bar_config(disable=True)
            wanted = pipe(
                PROMPTS, negative_prompt=NEGATIVES, guidance_scale=5.0, output_type="latent", **words, **more
            ).images.numpy()
            got = ours.latents(PROMPTS, NEGATIVES, numbers, settings, ours.given(settings))
            error = relative_rms(got, wanted)
            print(f"{kind}, {name}, strength {strength}, {settings.runs} steps: {error:.1e}")
            assert settings.runs == 5 and error <= 1e-3


def config_of(kind):
    return KINDS[kind][0]


def theirs_for(name, components):
    """The components that this pipeline takes."""
    wanted = {key: value for key, value in components.items() if key not in ("image_encoder", "safety_checker")}
    if name == "Depth2Img":
        return wanted
    return {**wanted, "safety_checker": None, "requires_safety_checker": False}
