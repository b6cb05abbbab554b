"""Pictures from prompts, for drawing and for validation while training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Callable

import numpy as np

from ldm import checkpoint
from ldm.conditioning import AS_IT_IS, NEGATIVE_AESTHETIC_SCORE, Condition, Sizes, Wording
from ldm.config.model import ModelConfig
from ldm.diffusion.denoiser import Denoiser, Relay
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.samplers import Sampler, get_sampler
from ldm.diffusion.schedule import build_schedule
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.parts import UNET, VAE
from ldm.pictures import to_uint8
from ldm.randomness import generator
from ldm.runtime import give_back_memory

CACHED_PROMPTS = 256  # their features take 80 MB in SD 2.x


def check_config(config: ModelConfig, *sides: int) -> None:
    """Check a config, and a picture's sides in pixels, before any network is built.

    Raises:
        UserError: unknown prediction type or schedule, or two that do not go together; a side that is not divisible by
            the factors of autoencoder and UNet.
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
    """The sampler that is asked for, by default the model's; UserError as from `get_sampler`."""
    own = config.sampling
    schedule = build_schedule(config.schedule)
    return get_sampler(name or own.sampler, schedule, eta, spacing or own.spacing, final_sigma or own.final_sigma)


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn from prompts, the same for all of a run.

    `sizes` and `negative_sizes` are what SDXL is told with the prompts and with the negative prompts. None: the whole
    picture has the size that is drawn, and the negative side is told the same but the aesthetic score.
    """

    sampler: Sampler
    steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int
    sizes: Sizes | None = None
    negative_sizes: Sizes | None = None
    guidance_rescale: float = 0.0
    zeros_for_empty: bool = False  # an empty negative prompt is zeros, not its text features
    guidance_interval: tuple[float, float] | None = None  # noise levels sigma / alpha; see `Denoiser`
    prompt_weights: bool = False  # brackets in prompts are weights; see `ldm.text.emphasis`
    long_prompts: bool = False  # a prompt is seen as a whole, in pieces of the encoder's length
    refiner_start: float = 1.0  # the share of the time that is drawn before the refiner, where there is one

    def told(self) -> tuple[Sizes, Sizes]:
        """The sizes of the prompts' side and of the negative side."""
        side = self.height, self.width
        sizes = self.sizes or Sizes(side, (0, 0), side)
        return sizes, self.negative_sizes or sizes._replace(aesthetic_score=NEGATIVE_AESTHETIC_SCORE)


def settings_for(
    config: ModelConfig,
    sampler: Sampler,
    seed: int,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_rescale: float | None = None,
    zeros_for_empty: bool | None = None,
) -> Settings:
    """The settings that are asked for; None is the model's own."""

    def either(asked, own):
        return own if asked is None else asked

    own = config.sampling
    return Settings(
        sampler,
        either(steps, own.steps),
        either(guidance_scale, config.guidance_scale),
        either(height, config.image_size),
        either(width, config.image_size),
        seed,
        guidance_rescale=either(guidance_rescale, own.guidance_rescale or 0.0),
        zeros_for_empty=either(zeros_for_empty, own.zeros_for_empty_prompt),
    )


def normal_draws(seed: int, purpose: str, shape: tuple[int, ...], numbers: list[int]) -> Callable[[int], np.ndarray]:
    """A sampler's source of noise: step -> unit Gaussian, float64 [B, *shape]; step -1 is where the sampler starts. One
    number has the same noise in every batch."""

    def noise(step: int) -> np.ndarray:
        return np.stack([generator(seed, purpose, k, step + 1).standard_normal(shape) for k in numbers])

    return noise


class Pipeline:
    """Prompts to pictures with one model.

    Args:
        config: the model's.
        model: its networks.
        refiner: the pipeline of SDXL's refiner, which draws the last steps. Its noise schedule is this one's.

    Raises:
        UserError: unknown prediction type or schedule, or two that do not go together.
    """

    def __init__(self, config: ModelConfig, model: StableDiffusion, refiner: Pipeline | None = None):
        self.model, self.refiner = model, refiner
        self.schedule = build_schedule(config.schedule)
        self.prediction = get_prediction(config.prediction_type)
        self.schedule.check(self.prediction)
        self.conditions: dict[tuple[str, Wording], Condition] = {}  # of single prompts

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
        denoise = self.guided(prompts, negative_prompts, settings)
        times = settings.sampler.times(self.schedule, settings.steps)
        latents = settings.sampler(denoise, noise(-1), times, self.schedule, noise, progress)
        (self.refiner or self).model.give_back(UNET)
        images = self.model.decode(latents)
        self.model.give_back(VAE)
        if file := checkpoint.changed(self.model.views.values()):
            raise UserError(f"{file} was written to while pictures were drawn with it: draw them again")
        if not np.isfinite(images).all():
            raise UserError("the autoencoder returned NaN or infinity: check the checkpoint, or use --dtype float32")
        return to_uint8(images)

    def redraw(
        self, x0: np.ndarray, prompts: list[str], numbers: list[int], settings: Settings, skipped: int
    ) -> np.ndarray:
        """Put noise on the latents x0, and denoise them by the sampler's last steps (SDEdit, arXiv 2108.01073).

        Args:
            x0: [B, C, h, w], the latents of pictures.
            prompts, numbers: their captions, and the keys of their noise, as in `draw`.
            settings: the sampler, its steps, the guidance scale and the seed.
            skipped: how many of the sampler's first steps are left out.
        """
        times = settings.sampler.times(self.schedule, settings.steps)[skipped:]
        noise = normal_draws(settings.seed, "noise to redraw", x0.shape[1:], numbers)
        z = self.schedule.alpha(times[0]) * x0 + self.schedule.sigma(times[0]) * noise(-1)
        denoise = self.guided(prompts, [""] * len(prompts), settings)
        return settings.sampler(denoise, z, times, self.schedule, noise)

    def guided(self, prompts: list[str], negative_prompts: list[str], settings: Settings) -> Denoiser | Relay:
        """The denoiser of a batch of prompts, for a sampler, with the refiner's after it."""
        words = prompts, negative_prompts, settings.guidance_scale, settings.told(), settings.guidance_rescale
        further = settings.guidance_interval, self.wording(prompts, negative_prompts, settings)
        denoise = self.denoiser(*words, settings.zeros_for_empty, *further)
        if self.refiner is None:
            return denoise
        until = round(len(self.schedule) * (1 - settings.refiner_start))
        return Relay(denoise, self.refiner.denoiser(*words, False, *further), until, lambda: self.model.give_back(UNET))

    def wording(self, prompts: Sequence[str], negative_prompts: Sequence[str], settings: Settings) -> Wording:
        """How a batch is read: all of it, the negative prompts where they matter too, in the same number of pieces."""
        wording = Wording(weighted=settings.prompt_weights)
        if not settings.long_prompts:
            return wording
        guided = settings.guidance_scale != 1 and not self.model.guidance_channels
        tokenizer = self.model.tokenizers[0]
        texts = {*prompts, *(negative_prompts if guided else ())}
        longest = max(len(wording.read(tokenizer, text)[0]) for text in texts)
        return wording._replace(pieces=max(1, -(-longest // (tokenizer.context_length - 2))))

    def denoiser(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        told: tuple[Sizes | None, Sizes | None] = (None, None),
        guidance_rescale: float = 0.0,
        zeros_for_empty: bool = False,
        guidance_interval: tuple[float, float] | None = None,
        wording: Wording = AS_IT_IS,
    ) -> Denoiser:
        """This model's denoiser of a batch of prompts; `told` as from `Settings.told`, the rest as in `Settings`."""
        cond, uncond = self.told(prompts, told[0], wording=wording), None
        if self.model.guidance_channels:  # the network itself guides: it runs once, without the negative prompts
            cond = cond.with_guidance(np.full(len(prompts), guidance_scale), self.model.guidance_channels)
            guidance_scale = 1
        elif guidance_scale != 1:
            uncond = self.told(negative_prompts, told[1], zeros_for_empty, wording)
        guidance = guidance_scale, guidance_rescale, guidance_interval
        return Denoiser(self.model.unet, self.schedule, self.prediction, cond, uncond, *guidance)

    def told(
        self,
        prompts: list[str],
        sizes: Sizes | None,
        zeros_for_empty: bool = False,
        wording: Wording = AS_IT_IS,
    ) -> Condition:
        """The condition of a batch of prompts, and of the same sizes for all of them where the UNet is told sizes.

        Args:
            zeros_for_empty: an empty prompt is zeros, not its text features.
        """
        condition = self.condition(prompts, wording)
        if zeros_for_empty:
            condition = condition.where(np.array([bool(prompt) for prompt in prompts]))
        if not self.model.size_numbers:
            return condition
        return self.model.told_sizes(condition, np.array([sizes.numbers(self.model.size_numbers)] * len(prompts)))

    def encode_ahead(self, prompts: Sequence[str], wordings: Iterable[Wording] = repeat(AS_IT_IS)) -> None:
        """Encode all prompts of a run, at most CACHED_PROMPTS, and free the text encoder; those of the refiner too."""
        read = list(zip(prompts, wordings))
        for pipeline in filter(None, (self.refiner, self)):
            for prompt, wording in read:
                pipeline.condition([prompt], wording)
            pipeline.model.forget_text_encoder()
            pipeline.model.give_back(VAE)
        give_back_memory()

    def condition(self, prompts: list[str], wording: Wording = AS_IT_IS) -> Condition:
        """The condition of a batch of prompts, without sizes; those of the last CACHED_PROMPTS prompts are kept."""
        found = []
        for prompt in prompts:
            key = prompt, wording
            if key not in self.conditions:
                self.conditions[key] = self.model.conditioner([prompt], wording)
            found.append(self.conditions[key])
            if len(self.conditions) > CACHED_PROMPTS:
                del self.conditions[next(iter(self.conditions))]  # the oldest
        return Condition.join(found)
