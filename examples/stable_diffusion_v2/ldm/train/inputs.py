"""The inputs of a training step: latents, noise, times and conditions of a batch, keyed by the samples' ordinals."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from ldm.conditioning import Condition, Sizes, Wording, embed_numbers
from ldm.data.batches import Batch
from ldm.data.dataset import CaptionedImages
from ldm.diffusion.timestep_bias import timesteps_at
from ldm.model import StableDiffusion
from ldm.randomness import generator, stratified
from ldm.train.cache import picture_key
from ldm.train.frozen import FrozenOutputs, require_finite


class Inputs:
    """Batches to the arguments of the loss.

    Args:
        model: encodes what is not cached.
        data: the pictures of the batches.
        seed: of the run.
        frozen: the caches, full.
        token_ids: give token ids and sizes, for a `TextLoss` of trained text encoders, in the place of a condition.
        pieces: of each text; see `Wording`.
        zeros_for_empty: zeros stand for the text of an empty caption, as they do where the model is drawn with.
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
        pieces: int,
        zeros_for_empty: bool,
        density: np.ndarray,
        weight: np.ndarray,
    ):
        self.model, self.data, self.seed, self.frozen = model, data, seed, frozen
        self.token_ids, self.pieces, self.zeros_for_empty = token_ids, pieces, zeros_for_empty
        self.density, self.weight = density, weight.astype(np.float32)
        self.shape = model.latent_shape(data.image_size, data.image_size)

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """(latents float32 [B, C, h, w] of unit variance, eps like the latents, t int32 [B], weight float32 [B], and
        the condition's fields, or the further arguments of a `TextLoss`)."""
        t = timesteps_at(self.density, stratified(self.seed, "timestep", batch.ordinals))
        further = self._for_text_loss(batch) if self.token_ids else self.condition(batch).given()
        return tuple(map(Tensor, (self.latents(batch), self.eps(batch), t, self.weight[t], *further)))

    def latents(self, batch: Batch) -> np.ndarray:
        """Scaled latents of the pictures, float32 [B, C, h, w].

        They are drawn from the autoencoder's Gaussian, as in SD's own training; they are not its mean.
        """
        if self.frozen.latents is None:
            mean, std = self.model.encode_images(batch.images)
            require_finite(mean + std, "the autoencoder", [self.data.samples[i].path for i in batch.indices])
        else:
            views = zip(batch.indices, batch.mirrored)
            rows = self.frozen.latents.take(picture_key(self.data.samples[i].path, way) for i, way in views)
            mean, std = rows[:, 0], rows[:, 1]
        return mean + std * self._noise("latent", batch.ordinals)

    def eps(self, batch: Batch) -> np.ndarray:
        """Unit Gaussian noise, float32 like the latents."""
        return self._noise("noise", batch.ordinals)

    def _noise(self, purpose: str, ordinals: np.ndarray) -> np.ndarray:
        return np.stack([generator(self.seed, purpose, i).standard_normal(self.shape, np.float32) for i in ordinals])

    def condition(self, batch: Batch, texts: list[str] | None = None) -> Condition:
        """The condition of the captions, or of other texts with the batch's sizes."""
        texts = batch.texts if texts is None else texts
        condition, kept = self._text(texts), self._kept(texts)
        condition = condition if kept.all() else condition.where(kept)
        return self.model.told_sizes(condition, self._numbers(batch))

    def _for_text_loss(self, batch: Batch) -> tuple[np.ndarray, ...]:
        model, numbers = self.model, self._numbers(batch)
        sizes = () if numbers is None else (embed_numbers(numbers, model.size_channels),)
        ids = model.conditioner.ids(batch.texts, self.pieces)
        return (ids, self._kept(batch.texts).astype(np.float32), *sizes)

    def _kept(self, texts: list[str]) -> np.ndarray:
        """Whether each text stands for itself, not for zeros."""
        return np.array([bool(text) or not self.zeros_for_empty for text in texts])

    def _numbers(self, batch: Batch) -> np.ndarray | None:
        count = self.model.size_numbers
        return np.array([Sizes(*cut).numbers(count) for cut in batch.cuts]) if count else None

    def _text(self, texts: list[str]) -> Condition:
        """The condition of the captions, without sizes."""
        if self.frozen.features is not None:
            return self.frozen.condition(texts)
        condition = self.model.conditioner(texts, Wording(self.pieces))
        for field in condition.given():
            require_finite(field, "the text encoder", texts)
        return condition
