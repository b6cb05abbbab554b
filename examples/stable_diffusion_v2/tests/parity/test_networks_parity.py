"""Our networks against diffusers and transformers at the same random weights, in the variants of SD 1.x and 2.x."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

from mindspore import Tensor
from reference import CONFIGS, THEIR_TYPES, reference, relative_rms, states

from ldm.checkpoint.names import from_diffusers
from ldm.diffusion.samplers import get_sampler
from ldm.model import StableDiffusion
from ldm.pipeline import Pipeline

pytestmark = pytest.mark.parity


def side(config) -> int:
    """Of the latents that the networks are compared on: 16, of full-size models 32."""
    return min(config.image_size // config.vae.factor, 32)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """(our model, its config, diffusers' UNet, diffusers' VAE, transformers' text encoder)."""
    config = CONFIGS[request.param]
    networks = reference(config)
    model = StableDiffusion(config)
    model.load(from_diffusers(*states(networks), config.text.variant), "the reference")
    return (model, config, *networks)


def test_unet(pair):
    model, config, unet, _, _ = pair
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 4, side(config), side(config)), np.float32)
    context = rng.standard_normal((2, 77, config.unet.context_dim), np.float32)
    t = np.array([3, 977], np.int32)
    with torch.no_grad():
        wanted = unet(torch.from_numpy(z), torch.from_numpy(t), torch.from_numpy(context)).sample.numpy()
    got = model.unet(Tensor(z), Tensor(t), Tensor(context)).asnumpy()
    assert relative_rms(got, wanted) <= 1e-4


def test_vae(pair):
    model, config, _, vae, _ = pair
    pixels = 4 * side(config)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, pixels, pixels)).astype(np.float32)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(images)).latent_dist
        decoded = vae.decode(posterior.mean).sample.numpy()
    mean, std = model.encode_images(images)
    assert relative_rms(mean, posterior.mean.numpy() * config.scale_factor) <= 1e-4
    assert relative_rms(std, posterior.std.numpy() * config.scale_factor) <= 1e-4
    assert relative_rms(model.vae(Tensor(posterior.mean.numpy())).asnumpy(), decoded) <= 1e-4


def test_text_encoder(pair):
    model, config, _, _, text_model = pair
    ids = model.conditioner.ids(["a drawing of a red apple", "", "word " * 100])
    with torch.no_grad():
        wanted = text_model(torch.from_numpy(ids.astype(np.int64))).last_hidden_state.numpy()
    assert relative_rms(model.text_encoder(Tensor(ids))[0].asnumpy(), wanted) <= 1e-4


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp"])
def test_steps_with_guidance(pair, name, monkeypatch):
    model, config, unet, _, text_model = pair
    pipeline = Pipeline(config, model)
    steps = 10 if config.image_size == 128 else 5
    sampler = get_sampler(name, pipeline.schedule, spacing="leading")
    times = sampler.times(pipeline.schedule, steps).astype(int)
    monkeypatch.setattr("ldm.diffusion.samplers.LONGEST_LINE", np.inf)  # as in their DPM-Solver
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    options["prediction_type"] = THEIR_TYPES[config.prediction_type]
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == times.tolist()
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**options, lower_order_final=False)
        scheduler.set_timesteps(timesteps=times.tolist())

    prompts = ["a drawing of a fox", "two green birds, noto style"]
    start = np.random.default_rng(2).standard_normal((2, 4, side(config), side(config)), np.float32)
    with torch.no_grad():
        ids = torch.from_numpy(model.conditioner.ids(["", ""] + prompts).astype(np.int64))
        context = text_model(ids).last_hidden_state
        x = torch.from_numpy(start)
        for t in scheduler.timesteps:
            uncond, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample

    denoise = pipeline.denoiser(prompts, ["", ""], 7.5)
    got = sampler(denoise, start, times, pipeline.schedule)
    assert relative_rms(got, x.numpy()) <= 1e-3
