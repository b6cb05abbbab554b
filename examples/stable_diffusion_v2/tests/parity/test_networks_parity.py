"""Our networks against diffusers and transformers at the same random weights, in the variants of SD 1.x and 2.x."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

from mindspore import Tensor
from reference import CONFIGS, THEIR_TYPES, reference, relative_rms, states

from ldm.checkpoint import diffusers_config
from ldm.checkpoint.names import from_diffusers
from ldm.conditioning import embed_guidance
from ldm.config.model import ModelConfig, TextConfig, UNetConfig, to_dict
from ldm.diffusion.samplers import get_sampler
from ldm.model import StableDiffusion
from ldm.networks.layers import fill
from ldm.networks.unet import UNet
from ldm.parts import UNET
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
    z = rng.standard_normal((4, 4, side(config), side(config)), np.float32)  # shapes as in the guided steps, one graph
    context = rng.standard_normal((4, 77, config.unet.context_dim), np.float32)
    t = np.array([3, 977, 0, 500], np.int32)
    with torch.no_grad():
        wanted = unet(torch.from_numpy(z), torch.from_numpy(t), torch.from_numpy(context)).sample.numpy()
    got = model.unet(Tensor(z), Tensor(t), Tensor(context)).asnumpy()
    assert relative_rms(got, wanted) <= 1e-4


def test_unet_that_is_told_the_guidance_scale():
    """diffusers' network by our JSON file, at diffusers' own embedding of the scale."""
    unet = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))
    unet = replace(unet, context_dim=64, num_head_channels=16, time_cond_proj_dim=256)
    config = ModelConfig("v", unet=unet, text=TextConfig(width=64))
    torch.manual_seed(0)
    table = json.loads(diffusers_config.files(to_dict(config)["model"])[diffusers_config.UNET])
    theirs = diffusers.UNet2DConditionModel.from_config(table).eval()
    ours = UNet(unet)
    ours.set_train(False)
    tensors = from_diffusers({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, {}, {}, "openclip")
    parameters = {UNET + parameter.name: parameter for parameter in ours.get_parameters()}
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        fill(parameter, tensors[name], copy=True)

    rng = np.random.default_rng(0)
    z, context = rng.standard_normal((2, 4, 8, 8), np.float32), rng.standard_normal((2, 7, 64), np.float32)
    t, scales = np.array([3, 977], np.int32), np.array([1.5, 14.25])
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    told = embed(None, torch.from_numpy(scales).float() - 1, embedding_dim=256)
    np.testing.assert_allclose(embed_guidance(scales, 256), told.numpy(), atol=13250 * 2**-23)
    with torch.no_grad():
        arrays = [torch.from_numpy(array) for array in (z, t, context)]
        wanted, plain = (theirs(*arrays, timestep_cond=each).sample.numpy() for each in (told, None))
    got = ours(*map(Tensor, (z, t, context, embed_guidance(scales, 256)))).asnumpy()
    assert relative_rms(got, wanted) <= 1e-4 < relative_rms(plain, wanted)


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
