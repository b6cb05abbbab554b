"""What a training step is fed: latents, text features, noise and times of a batch, all keyed by the sample's ordinal.

The frozen autoencoder and text encoder give the same for the same picture and caption every time, so their outputs are
computed once and held where they fit into memory.
"""

from __future__ import annotations

import logging

import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from ldm.data.batches import Batch
from ldm.data.dataset import CaptionedImages
from ldm.data.images import crop, to_float
from ldm.models.stable_diffusion import StableDiffusion
from ldm.randomness import generator

CACHE_BYTES = 2 << 30  # for latents and for text features each

log = logging.getLogger(__name__)


def noise_and_times(
    seed: int, ordinals: np.ndarray, shape: tuple[int, ...], steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """eps float32 [B, *shape], unit Gaussian, and t int32 [B], uniform in [0, steps - 1]."""
    eps = np.stack([generator(seed, "noise", i).standard_normal(shape, np.float32) for i in ordinals])
    t = np.array([generator(seed, "timestep", i).integers(steps) for i in ordinals], np.int32)
    return eps, t


class Latents:
    """Latents of a batch's pictures, drawn from the autoencoder's Gaussian (not its mean alone, as SD was trained).

    Args:
        model: with the frozen autoencoder.
        dataset: the pictures.
        cache: hold the Gaussians of all pictures; only where no picture is changed at random, and where they fit.
    """

    def __init__(self, model: StableDiffusion, dataset: CaptionedImages, batch_size: int, cache: bool):
        self.model = model
        size = dataset.image_size
        self.shape = model.latent_shape(size, size)
        self.gaussians = None
        needed = 8 * len(dataset) * int(np.prod(self.shape))
        if cache and needed > CACHE_BYTES:
            log.info("latents are not cached: %.1f GiB for %d pictures", needed / 2**30, len(dataset))
        elif cache:
            self.gaussians = np.empty((2, len(dataset), *self.shape), np.float32)
            for start in tqdm(range(0, len(dataset), batch_size), "latents", delay=2, leave=False):
                rows = range(start, min(start + batch_size, len(dataset)))
                pictures = [crop(dataset[i][0], size) for i in rows]
                pictures += pictures[-1:] * (batch_size - len(rows))  # one batch size, one compiled graph
                for part, values in zip(self.gaussians, model.encode_images(to_float(pictures))):
                    part[rows.start : rows.stop] = values[: len(rows)]

    def __call__(self, batch: Batch, seed: int) -> np.ndarray:
        """float32 [B, C, h, w], scaled to unit variance."""
        if self.gaussians is None:
            mean, std = self.model.encode_images(batch.images)
        else:
            mean, std = self.gaussians[:, batch.indices]
        noise = [generator(seed, "latent", i).standard_normal(self.shape, np.float32) for i in batch.ordinals]
        return mean + std * np.stack(noise)


class TextFeatures:
    """Features of captions by the frozen text encoder, float32 [B, L, D], the ones used last held in memory."""

    def __init__(self, model: StableDiffusion, captions: list[str], batch_size: int, cache: bool):
        self.model = model
        self.known: dict[str, np.ndarray] = {}
        if not cache:
            return
        unique = list(dict.fromkeys([*captions, ""]))
        for start in tqdm(range(0, len(unique), batch_size), "text", delay=2, leave=False):
            texts = unique[start : start + batch_size]
            for text, features in zip(texts, model.encode_prompts(texts + [""] * (batch_size - len(texts)))):
                self.known[text] = features
            if len(self.known) * features.nbytes > CACHE_BYTES:
                log.info("text features are not cached: %d captions need more than 2 GiB", len(unique))
                self.known.clear()
                return

    def __call__(self, texts: list[str]) -> Tensor:
        if all(text in self.known for text in texts):
            return Tensor(np.stack([self.known[text] for text in texts]))
        return Tensor(self.model.encode_prompts(texts))
