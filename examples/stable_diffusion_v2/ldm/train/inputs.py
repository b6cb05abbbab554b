"""What a training step is fed: latents, text, noise and times of a batch, all keyed by the sample's ordinal.

The frozen autoencoder and text encoder give the same for the same picture and caption every time, so their outputs can
be computed once and held, where they fit into memory.
"""

from __future__ import annotations

import logging

import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from ldm.data.batches import Batch, Batches
from ldm.data.dataset import CaptionedImages
from ldm.data.images import crop, to_float
from ldm.models.stable_diffusion import StableDiffusion
from ldm.randomness import generator

CACHE_BYTES = 2 << 30  # for latents and for text features each

log = logging.getLogger(__name__)


class Inputs:
    """Batches to the arguments of the loss.

    Args:
        model: whose autoencoder is frozen.
        data: the pictures of `batches`.
        batches: for their seed, size and random changes.
        token_ids: give token ids int32 [B, L], for a text encoder that is trained, not features float32 [B, L, D].
        timesteps: T of the noise schedule.
    """

    def __init__(
        self, model: StableDiffusion, data: CaptionedImages, batches: Batches, token_ids: bool, timesteps: int
    ):
        self.model, self.data, self.batches = model, data, batches
        self.token_ids, self.timesteps = token_ids, timesteps
        self.shape = model.latent_shape(data.image_size, data.image_size)
        self.gaussians: np.ndarray | None = None  # [2, N, C, h, w], mean and standard deviation of all latents
        self.features: dict[str, np.ndarray] = {}  # caption -> [L, D]

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(latents float32 [B, C, h, w] of unit variance, text, eps like the latents, t int32 [B]).

        Latents are drawn from the autoencoder's Gaussian, as SD was trained, not set to its mean.
        """
        if self.gaussians is None:
            mean, std = self.model.encode_images(batch.images)
        else:
            mean, std = self.gaussians[:, batch.indices]
        latents = mean + std * self._noise("latent", batch.ordinals)
        t = [generator(self.batches.seed, "timestep", i).integers(self.timesteps) for i in batch.ordinals]
        eps = self._noise("noise", batch.ordinals)
        return Tensor(latents), Tensor(self._text(batch.texts)), Tensor(eps), Tensor(np.array(t, np.int32))

    def cache(self, latents: bool, text: bool) -> None:
        """Compute once what never changes: latents unless pictures are changed at random, features unless trained."""
        augment = self.batches.augment
        if latents and not (augment.random_crop or augment.flip):
            self._cache_latents()
        if text and not self.token_ids:
            self._cache_features()

    def _noise(self, purpose: str, ordinals: np.ndarray) -> np.ndarray:
        seed = self.batches.seed
        return np.stack([generator(seed, purpose, i).standard_normal(self.shape, np.float32) for i in ordinals])

    def _text(self, texts: list[str]) -> np.ndarray:
        if self.token_ids:
            return self.model.tokenizer.encode(texts)
        if all(text in self.features for text in texts):
            return np.stack([self.features[text] for text in texts])
        return self.model.encode_prompts(texts)

    def _cache_latents(self) -> None:
        count, size = len(self.data), self.batches.batch_size
        needed = 8 * count * int(np.prod(self.shape))
        if needed > CACHE_BYTES:
            log.info("latents of %d pictures are not cached: %.1f GiB", count, needed / 2**30)
            return
        self.gaussians = np.empty((2, count, *self.shape), np.float32)
        for start in tqdm(range(0, count, size), "latents", delay=2, leave=False):
            rows = range(start, min(start + size, count))
            pictures = [crop(self.data[i][0], self.data.image_size) for i in rows]
            pictures += pictures[-1:] * (size - len(rows))  # one batch size, one compiled graph
            for part, values in zip(self.gaussians, self.model.encode_images(to_float(pictures))):
                part[rows.start : rows.stop] = values[: len(rows)]

    def _cache_features(self) -> None:
        size, unique = self.batches.batch_size, list(dict.fromkeys(["", *(s.text for s in self.data.samples)]))
        for start in tqdm(range(0, len(unique), size), "text", delay=2, leave=False):
            texts = unique[start : start + size]
            for text, features in zip(texts, self.model.encode_prompts(texts + [""] * (size - len(texts)))):
                self.features[text] = features
            needed = len(unique) * features.nbytes
            if needed > CACHE_BYTES:
                log.info("features of %d captions are not cached: %.1f GiB", len(unique), needed / 2**30)
                self.features.clear()
                return
