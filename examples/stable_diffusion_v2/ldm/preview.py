"""Latents as pictures without the autoencoder: each value of a pixel is a linear function of the latents there."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.model import StableDiffusion
from ldm.pictures import to_uint8
from ldm.randomness import generator

CELLS, FIELDS = 32, 8  # the sides of the latents that the map is fitted to, and of the noise that they are made of


class Preview:
    """The map of one autoencoder, fitted by least squares to what it makes of soft random latents."""

    def __init__(self, model: StableDiffusion):
        noise = generator(0, "latents for the preview").standard_normal((model.channels, FIELDS, FIELDS), np.float32)
        soft = [np.asarray(Image.fromarray(each).resize((CELLS, CELLS), Image.BICUBIC)) for each in noise]
        latents = np.stack(soft) / np.std(soft)  # [C, h, w]
        picture = np.clip(model.decode(latents[None]), -1, 1)  # [1, 3, H, W]
        cells = picture.reshape(3, CELLS, model.factor, CELLS, model.factor).mean((2, 4))  # [3, h, w]
        self.weights, *_ = np.linalg.lstsq(_with_ones(latents), cells.reshape(3, -1).T, rcond=None)  # [C + 1, 3]

    def __call__(self, x0: np.ndarray) -> np.ndarray:
        """Clean latents [B, C, h, w] as small pictures, uint8 [B, h, w, 3]."""
        b, _, h, w = x0.shape
        colours = np.stack([_with_ones(each) @ self.weights for each in x0])  # [B, h w, 3]
        return to_uint8(colours.transpose(0, 2, 1).reshape(b, 3, h, w))


def _with_ones(latents: np.ndarray) -> np.ndarray:
    """[C, h, w] as [h w, C + 1], with a column of ones."""
    flat = latents.reshape(len(latents), -1).T
    return np.concatenate((flat, np.ones((len(flat), 1))), 1)
