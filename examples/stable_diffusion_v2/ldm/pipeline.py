"""What training and sampling have in common: a model from its config and checkpoint, and pictures from prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Callable

import numpy as np
from mindspore import Tensor

from ldm import checkpoint
from ldm.config import ModelConfig, to_yaml
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.samplers import Sampler, get_sampler
from ldm.diffusion.schedule import build_schedule
from ldm.errors import UserError
from ldm.models.stable_diffusion import UNET, VAE, StableDiffusion
from ldm.pictures import to_uint8
from ldm.randomness import generator
from ldm.runtime import give_back_memory

CACHED_PROMPTS = 256  # their features take 80 MB in SD 2.x

log = logging.getLogger(__name__)


def read_checkpoint(
    path: str, config: ModelConfig, check_type: bool = True, widen: bool = True, raw: bool = False
) -> checkpoint.Checkpoint:
    """The checkpoint of a model config; without `check_type` its UNet is not wanted and may be of any type, and so may
    a file that has none.

    `widen` and `raw` are those of `checkpoint.load`.

    Raises:
        UserError: it cannot be read, or was trained with another prediction type, schedule or latent scale.
    """
    ckpt = checkpoint.load(path, widen, raw)
    scale = float(ckpt.meta.get("scale_factor", config.scale_factor))
    if abs(scale / config.scale_factor - 1) > 1e-4:
        raise UserError(f"{path} has latents scaled by {scale}, the config's scale_factor is {config.scale_factor}")
    said = ckpt.meta.get("prediction_type")
    if not check_type or not any(name.startswith(UNET) for name in ckpt.tensors):
        return ckpt
    if said is None:
        log.info("%s does not say its prediction type: '%s' is assumed, from the config", path, config.prediction_type)
    elif said != config.prediction_type:
        raise UserError(
            f"{path} was trained with prediction_type '{said}', the config says '{config.prediction_type}': "
            f'use a config with prediction_type: "{said}", or another checkpoint'
        )
    schedule = json.loads(ckpt.meta.get("schedule", "{}"))
    for key, value in asdict(config.schedule).items():
        if schedule.get(key, value) != value:
            raise UserError(f"{path} was trained with schedule {key}: {schedule[key]}, the config says {value}")
    return ckpt


def read_model(path: str, rest: str | None, config: ModelConfig, vae: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, of another one, if any, what it lacks, and of an autoencoder of its own, if any.

    All are of this model config.

    Raises:
        UserError: as `read_checkpoint`, whose prediction type and schedule matter where the UNet comes from.
    """
    tensors = read_checkpoint(path, config).tensors
    if rest:
        has_unet = any(name.startswith(UNET) for name in tensors)
        tensors = {**read_checkpoint(rest, config, check_type=not has_unet).tensors, **tensors}
    return checkpoint.with_vae(tensors, vae, config.scale_factor) if vae else tensors


def describe(config: ModelConfig) -> dict[str, str]:
    """What a checkpoint of this config says of itself; `read_checkpoint` and other tools look there."""
    return {
        "prediction_type": config.prediction_type,
        "schedule": json.dumps(asdict(config.schedule)),
        "resolution": f"{config.image_size}x{config.image_size}",
        "scale_factor": repr(config.scale_factor),
        "model_config": to_yaml(config),
    }


def check_config(config: ModelConfig, *sides: int) -> None:
    """What can be known of a config before any network is built.

    Raises:
        UserError: unknown prediction type or schedule, or two that do not go together; a side in pixels that does not
            divide into latents and their levels in the UNet.
    """
    build_schedule(config.schedule).check(get_prediction(config.prediction_type))
    step = config.vae.factor * config.unet.factor
    for side in sides:
        if side < step or side % step:
            near = max(step, round(side / step) * step)
            raise UserError(
                f"image size {side} is not divisible by {step} (the autoencoder's factor {config.vae.factor} times the "
                f"UNet's {config.unet.factor}); the nearest that is: {near}"
            )


def sampler_of(
    config: ModelConfig,
    name: str | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    final_sigma: str | None = None,
) -> Sampler:
    """The sampler that is asked for, or that suits the model; UserError as `get_sampler`."""
    own = config.sampling
    schedule = build_schedule(config.schedule)
    return get_sampler(name or own.sampler, schedule, eta, spacing or own.spacing, final_sigma or own.final_sigma)


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn from prompts, the same for all of a run."""

    sampler: Sampler
    steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int


def normal_draws(seed: int, purpose: str, shape: tuple[int, ...], numbers: list[int]) -> Callable[[int], np.ndarray]:
    """What a sampler draws its noise from: step -> float64 [B, *shape], unit Gaussian, the same for the same number in
    every batch; step -1 is where the sampler starts."""

    def noise(step: int) -> np.ndarray:
        return np.stack([generator(seed, purpose, k, step + 1).standard_normal(shape) for k in numbers])

    return noise


class Pipeline:
    """Prompts to pictures with one model.

    Raises:
        UserError: unknown prediction type or schedule, or two that do not go together.
    """

    def __init__(self, config: ModelConfig, model: StableDiffusion):
        self.model = model
        self.schedule = build_schedule(config.schedule)
        self.prediction = get_prediction(config.prediction_type)
        self.schedule.check(self.prediction)
        self.features: dict[str, np.ndarray] = {}

    def draw(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        numbers: list[int],
        settings: Settings,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3]. Picture k of the run depends on the seed and on numbers[k], not on its batch."""
        shape = self.model.latent_shape(settings.height, settings.width)
        noise = normal_draws(settings.seed, "sampling noise", shape, numbers)
        denoise = self.denoiser(prompts, negative_prompts, settings.guidance_scale)
        times = settings.sampler.times(self.schedule, settings.steps)
        latents = settings.sampler(denoise, noise(-1), times, self.schedule, noise, progress)
        self.model.rest(UNET)
        images = self.model.decode(latents)
        self.model.rest(VAE)
        if not np.isfinite(images).all():
            raise UserError("the autoencoder returned NaN or infinity: check the checkpoint, or use --dtype float32")
        return to_uint8(images)

    def redraw(
        self, x0: np.ndarray, prompts: list[str], numbers: list[int], settings: Settings, skipped: int
    ) -> np.ndarray:
        """Latents as the sampler leaves them when it begins at x0 under noise (SDEdit, arXiv 2108.01073).

        Args:
            x0: [B, C, h, w], the latents of pictures.
            prompts, numbers: a caption of each, and what keys its noise, as in `draw`.
            settings: the sampler, its steps, the guidance scale and the seed.
            skipped: how many of the sampler's steps are left out at the beginning.
        """
        times = settings.sampler.times(self.schedule, settings.steps)[skipped:]
        noise = normal_draws(settings.seed, "noise to redraw", x0.shape[1:], numbers)
        z = self.schedule.alpha(times[0]) * x0 + self.schedule.sigma(times[0]) * noise(-1)
        denoise = self.denoiser(prompts, [""] * len(prompts), settings.guidance_scale)
        return settings.sampler(denoise, z, times, self.schedule, noise)

    def denoiser(self, prompts: list[str], negative_prompts: list[str], guidance_scale: float) -> Denoiser:
        """What a sampler calls for this batch of prompts."""
        cond = Tensor(self.encode(prompts))
        uncond = None if guidance_scale == 1 else Tensor(self.encode(negative_prompts))
        return Denoiser(self.model.unet, self.schedule, self.prediction, cond, uncond, guidance_scale)

    def encode_ahead(self, prompts: Iterable[str]) -> None:
        """Encode all prompts of a run, at most CACHED_PROMPTS, and let go of the text encoder."""
        for prompt in prompts:
            self.encode([prompt])
        self.model.forget_text_encoder()
        self.model.rest(VAE)
        give_back_memory()

    def encode(self, prompts: list[str]) -> np.ndarray:
        """Features [B, L, D], float32; the last CACHED_PROMPTS are kept."""
        features = []
        for prompt in prompts:
            if prompt not in self.features:
                self.features[prompt] = self.model.encode_prompts([prompt])[0]
            features.append(self.features[prompt])
            if len(self.features) > CACHED_PROMPTS:
                del self.features[next(iter(self.features))]  # the oldest
        return np.stack(features)
