"""Latent channels that an autoencoder does not use, and their removal.

With a KL weight, some channels become unit Gaussian noise. They say nothing of the picture, and the decoder ignores
them. A diffusion model would have to learn this noise too: with 3 of 12 channels dead, it made 40 % of the tiny model's
loss.
"""

from __future__ import annotations

import numpy as np

from ldm.parts import VAE

ALIVE = 0.05  # share of a channel's variance that must come from the picture; in practice it is below 0.02 or above 0.9


def alive(mean: np.ndarray, std: np.ndarray) -> list[int]:
    """The numbers of the used channels, from mean and standard deviation of the latents' Gaussians [N, C, h, w]."""
    signal, noise = mean.var((0, 2, 3)), (std**2).mean((0, 2, 3))
    return np.flatnonzero(signal > ALIVE * (signal + noise)).tolist()


def keep_channels(tensors: dict[str, np.ndarray], kept: list[int]) -> dict[str, np.ndarray]:
    """The tensors of the autoencoder with these latent channels only.

    The two 1x1 convolutions at the latents are multiplied into their neighbours, so that z_channels equals embed_dim,
    as diffusers wants it. The products are exact. The part of post_quant_conv's bias that no latent can express goes
    into the next convolution's bias; only the padded border lacks it.
    """
    array = {name: tensors[VAE + name].astype(np.float64) for name in _NAMES}
    channels = len(array["quant_conv.bias"]) // 2
    rows, n = kept + [channels + i for i in kept], len(kept)
    quant, post = array["quant_conv.weight"][rows, :, 0, 0], array["post_quant_conv.weight"][:, kept, 0, 0]
    offset = np.linalg.lstsq(post, array["post_quant_conv.bias"], rcond=None)[0]
    rest = array["post_quant_conv.bias"] - post @ offset
    new = {
        "encoder.conv_out.weight": np.einsum("oc,cihw->oihw", quant, array["encoder.conv_out.weight"]),
        "encoder.conv_out.bias": quant @ array["encoder.conv_out.bias"] + array["quant_conv.bias"][rows],
        "quant_conv.weight": np.eye(2 * n)[:, :, None, None],
        "quant_conv.bias": np.zeros(2 * n),
        "post_quant_conv.weight": np.eye(n)[:, :, None, None],
        "post_quant_conv.bias": offset,
        "decoder.conv_in.weight": np.einsum("ochw,ci->oihw", array["decoder.conv_in.weight"], post),
        "decoder.conv_in.bias": array["decoder.conv_in.bias"]
        + np.einsum("ochw,c->o", array["decoder.conv_in.weight"], rest),
    }
    return {**tensors, **{VAE + name: value.astype(np.float32) for name, value in new.items()}}


_NAMES = [
    f"{layer}.{kind}"
    for layer in ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in")
    for kind in ("weight", "bias")
]
