"""Our networks against diffusers and transformers at the same random weights, in the variants of SD 1.x and 2.x."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

from mindspore import Tensor  # noqa: E402

from ldm.checkpoint.names import from_diffusers  # noqa: E402
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig  # noqa: E402
from ldm.diffusion.samplers import get_sampler  # noqa: E402
from ldm.models.stable_diffusion import StableDiffusion  # noqa: E402
from ldm.pipeline import Pipeline  # noqa: E402

pytestmark = pytest.mark.parity

VARIANTS = {
    "sd1": {"variant": "clip", "num_heads": 4, "use_linear_in_transformer": False},
    "sd2": {"variant": "openclip", "num_head_channels": 32, "use_linear_in_transformer": True},
}


def our_config(variant: str, num_heads=None, num_head_channels=None, use_linear_in_transformer=True) -> ModelConfig:
    return ModelConfig(
        prediction_type="v",
        image_size=128,
        unet=UNetConfig(
            model_channels=64,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_linear_in_transformer=use_linear_in_transformer,
            context_dim=96,
        ),
        vae=VAEConfig(ch=32),
        text=TextConfig(variant=variant, vocab_size=2048, width=96, layers=3, heads=4),
    )


def reference(config: ModelConfig) -> tuple:
    """The same networks by diffusers and transformers, every weight random: norms and biases too."""
    torch.manual_seed(0)
    unet, vae, text = config.unet, config.vae, config.text
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attending = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    heads = unet.num_heads or [width // unet.num_head_channels for width in widths]
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=attending,
        up_block_types=[name.replace("Down", "Up") for name in reversed(attending)],
        cross_attention_dim=unet.context_dim,
        attention_head_dim=heads,
        use_linear_projection=unet.use_linear_in_transformer,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[vae.ch * mult for mult in vae.ch_mult],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    text_model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            hidden_act="quick_gelu" if text.variant == "clip" else "gelu",
            bos_token_id=text.vocab_size - 2,
            eos_token_id=text.vocab_size - 1,
        )
    )
    networks = unet.eval(), vae.eval(), text_model.eval()
    for network in networks:
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return networks


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """(our model, its config, diffusers' UNet, diffusers' VAE, transformers' text encoder)."""
    config = our_config(**VARIANTS[request.param])
    networks = reference(config)
    states = [{name: tensor.numpy() for name, tensor in network.state_dict().items()} for network in networks]
    model = StableDiffusion(config)
    model.load(from_diffusers(*states, config.text.variant), "the reference")
    return (model, config, *networks)


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


def test_unet(pair):
    model, config, unet, _, _ = pair
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 4, 16, 16), np.float32)
    context = rng.standard_normal((2, 77, config.unet.context_dim), np.float32)
    t = np.array([3, 977], np.int32)
    with torch.no_grad():
        wanted = unet(torch.from_numpy(z), torch.from_numpy(t), torch.from_numpy(context)).sample.numpy()
    got = model.unet(Tensor(z), Tensor(t), Tensor(context)).asnumpy()
    assert relative_rms(got, wanted) <= 1e-4


def test_vae(pair):
    model, config, _, vae, _ = pair
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(images)).latent_dist
        decoded = vae.decode(posterior.mean).sample.numpy()
    mean, std = model.encode_images(images)
    assert relative_rms(mean, posterior.mean.numpy() * config.scale_factor) <= 1e-4
    assert relative_rms(std, posterior.std.numpy() * config.scale_factor) <= 1e-4
    assert relative_rms(model.vae(Tensor(posterior.mean.numpy())).asnumpy(), decoded) <= 1e-4


def test_text_encoder(pair):
    model, config, _, _, text_model = pair
    ids = model.tokenizer.encode(["a drawing of a red apple", "", "word " * 100])
    with torch.no_grad():
        wanted = text_model(torch.from_numpy(ids.astype(np.int64))).last_hidden_state.numpy()
    assert relative_rms(model.text_encoder(Tensor(ids)).asnumpy(), wanted) <= 1e-4


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp"])
def test_ten_steps_with_guidance(pair, name):
    model, config, unet, _, text_model = pair
    pipeline = Pipeline(config, model)
    times = pipeline.schedule.timesteps(10)
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    options["prediction_type"] = "v_prediction"
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps.tolist() == times.tolist()
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**options)
        scheduler.set_timesteps(timesteps=times.tolist())

    prompts = ["a drawing of a fox", "two green birds, noto style"]
    start = np.random.default_rng(2).standard_normal((2, 4, 16, 16), np.float32)
    with torch.no_grad():
        ids = torch.from_numpy(model.tokenizer.encode(["", ""] + prompts).astype(np.int64))
        context = text_model(ids).last_hidden_state
        x = torch.from_numpy(start)
        for t in scheduler.timesteps:
            uncond, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample

    denoise = pipeline.denoiser(prompts, ["", ""], 7.5)
    got = get_sampler(name)(denoise, start, times, pipeline.schedule)
    assert relative_rms(got, x.numpy()) <= 1e-3
