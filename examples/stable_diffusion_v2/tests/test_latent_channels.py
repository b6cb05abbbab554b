"""Dead latent channels are found and cut without a change to what the autoencoder does."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.config.model import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.parts import VAE
from ldm.train.latent_channels import alive, keep_channels

KEPT = [0, 2, 3, 5]


def build(channels):
    config = ModelConfig(
        "v",
        64,
        unet=UNetConfig(in_channels=channels, out_channels=channels, model_channels=64, context_dim=8),
        vae=VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=channels, embed_dim=channels),
        text=TextConfig(vocab_size=600, width=8, layers=1, heads=1),
    )
    return StableDiffusion(replace(config, scale_factor=0.5), parts=(VAE,))


@pytest.fixture(scope="module")
def whole():
    """An autoencoder of 6 channels whose decoder passes over 1 and 4."""
    model = build(6)
    initialize(model.vae, 3)
    tensors = {name: array.copy() for name, array in model.tensors().items()}
    rng = np.random.default_rng(0)
    post = rng.standard_normal((6, 6, 1, 1)).astype(np.float32)
    post[:, [1, 4]] = 0
    tensors[VAE + "post_quant_conv.weight"] = post
    tensors[VAE + "post_quant_conv.bias"] = post[:, :, 0, 0] @ rng.standard_normal(6).astype(np.float32)
    tensors[VAE + "quant_conv.bias"] = rng.standard_normal(12).astype(np.float32)
    model.load(tensors, "whole")
    return model, tensors


def test_kept_channels_encode_and_decode_as_before(whole):
    model, tensors = whole
    small = build(len(KEPT))
    small.load(keep_channels(tensors, KEPT), "small")
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    for ours, theirs in zip(small.encode_images(images), model.encode_images(images)):
        np.testing.assert_allclose(ours, theirs[:, KEPT], rtol=1e-4, atol=1e-5)
    latents = rng.standard_normal((2, 6, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(small.decode(latents[:, KEPT]), model.decode(latents), rtol=1e-3, atol=1e-4)


def test_a_channel_is_alive_when_pictures_move_it():
    rng = np.random.default_rng(2)
    mean = rng.standard_normal((50, 3, 2, 2)) * np.array([1.0, 0.05, 0.3])[:, None, None] + 7
    std = np.broadcast_to(np.array([0.1, 1.0, 0.2])[:, None, None], mean.shape)
    assert alive(mean, std) == [0, 2]
