"""The inputs of a training step: latents, noise, times and conditions of a batch, keyed by the samples' ordinals."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ldm.conditioning import Condition
from ldm.data.batches import Batch
from ldm.data.dataset import CaptionedImages
from ldm.diffusion.timestep_bias import timesteps_at
from ldm.model import StableDiffusion
from ldm.randomness import generator, stratified
from ldm.train.cache import file_key, text_key
from ldm.train.frozen import FrozenOutputs, require_finite


class Inputs:
    """Batches to the arguments of the loss.

    Args:
        model: encodes what is not cached.
        data: the pictures of the batches.
        seed: of the run.
        frozen: the caches, full.
        token_ids: give token ids int32 [B, L], for a trained text encoder, instead of features float32 [B, L, D].
        density: how often each timestep comes, float64 [T]; see `timestep_density`.
        weight: of the squared error at each timestep, [T]; see `loss_weight`.
    """

    def __init__(
        self,
        model: StableDiffusion,
        data: CaptionedImages,
        seed: int,
        frozen: FrozenOutputs,
        token_ids: bool,
        density: np.ndarray,
        weight: np.ndarray,
    ):
        self.model, self.data, self.seed, self.frozen = model, data, seed, frozen
        self.token_ids, self.density, self.weight = token_ids, density, weight.astype(np.float32)
        self.shape = model.latent_shape(data.image_size, data.image_size)

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """(latents float32 [B, C, h, w] of unit variance, eps like the latents, t int32 [B], weight float32 [B], and
        the condition's fields or the token ids).

        Latents are drawn from the autoencoder's Gaussian, as in SD's own training; they are not its mean.
        """
        if self.frozen.latents is None:
            mean, std = self.model.encode_images(batch.images)
            require_finite(mean + std, "the autoencoder", [self.data.samples[i].path for i in batch.indices])
        else:
            rows = self.frozen.latents.take(file_key(self.data.samples[i].path) for i in batch.indices)
            mean, std = rows[:, 0], rows[:, 1]
        latents = mean + std * self._noise("latent", batch.ordinals)
        t = timesteps_at(self.density, stratified(self.seed, "timestep", batch.ordinals))
        eps = self._noise("noise", batch.ordinals)
        return tuple(map(Tensor, (latents, eps, t, self.weight[t], *self._condition(batch.texts))))

    def _noise(self, purpose: str, ordinals: np.ndarray) -> np.ndarray:
        return np.stack([generator(self.seed, purpose, i).standard_normal(self.shape, np.float32) for i in ordinals])

    def _condition(self, texts: list[str]) -> tuple[np.ndarray, ...]:
        if self.token_ids:
            return (self.model.conditioner.ids(texts),)
        if self.frozen.features is not None:
            return Condition(self.frozen.features.take(map(text_key, texts))).given()
        condition = self.model.conditioner(texts)
        require_finite(condition.context, "the text encoder", texts)
        return condition.given()
