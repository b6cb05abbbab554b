"""Pictures from prompts, for drawing and for validation while training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Callable, NamedTuple

import numpy as np

from ldm import checkpoint
from ldm.conditioning import AS_IT_IS, NEGATIVE_AESTHETIC_SCORE, Condition, Sizes, Wording
from ldm.config.model import NEEDS, ModelConfig
from ldm.data.images import to_float
from ldm.data.inputs import Inputs
from ldm.diffusion.denoiser import Blend, Denoiser, Relay
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.samplers import Sampler, get_sampler
from ldm.diffusion.schedule import NoiseSchedule, build_schedule
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.parts import UNET, VAE
from ldm.pictures import enlarged, pasted, to_uint8
from ldm.randomness import between, generator
from ldm.runtime import give_back_memory

LARGEST_SIDE = 1 << 14  # of a picture, in pixels
CACHED_PROMPTS = 256  # their features take 80 MB in SD 2.x


def check_config(config: ModelConfig, *sides: int) -> None:
    """Check a config, and a picture's sides in pixels, before any network is built.

    Raises:
        UserError: unknown prediction type or schedule, or two that do not go together; a side that is too large, or not
            divisible by the factors of autoencoder and UNet.
    """
    build_schedule(config.schedule).check(get_prediction(config.prediction_type))
    step = config.vae.factor * config.unet.factor
    for side in sides:
        if side > LARGEST_SIDE:
            raise UserError(f"image size {side} is too large: at most {LARGEST_SIDE}")
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
    """How pictures are drawn, the same for all of a batch.

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
    inputs: Inputs = Inputs()
    strength: float = 1.0  # the share of the steps that is made, the last ones, where there is a picture to start from
    variation: tuple[int, float] | None = None  # a second seed, and how far the noise goes to the second seed's
    again: Settings | None = None  # the larger picture that is drawn from the finished one
    enlarges: float = 1.0  # how many times larger it is than the finished one, in the settings of a larger picture

    @property
    def own_runs(self) -> int:
        """How many steps are made, without those of the larger picture."""
        return int(self.steps * self.strength + 1e-9)

    @property
    def runs(self) -> int:
        """How many steps are made."""
        return self.own_runs + (self.again.runs if self.again else 0)

    @property
    def sides(self) -> tuple[int, ...]:
        """All sides of pictures that are drawn, in pixels."""
        return self.height, self.width, *(self.again.sides if self.again else ())

    def times(self, schedule: NoiseSchedule) -> np.ndarray:
        """The times of the steps that are made; UserError as from `Sampler.times`."""
        return self.sampler.times(schedule, self.steps)[self.steps - self.own_runs :]

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


def noise_of(settings: Settings, purpose: str, shape: tuple[int, ...], numbers: list[int]) -> Callable:
    """`normal_draws` of the seed, or between those of two seeds where the settings say so."""
    own = normal_draws(settings.seed, purpose, shape, numbers)
    if not settings.variation:
        return own
    seed, share = settings.variation
    other = normal_draws(seed, purpose, shape, numbers)
    return lambda step: between(own(step), other(step), share)


class Given(NamedTuple):
    """What the picture files of `Inputs` are as latents; None where there is none.

    x0: [1, C, h, w], the picture to start from.
    hole: [1, 1, h, w], truth values: where the picture is painted anew.
    channels: float32 [1, N, h, w], joined to z.
    """

    x0: np.ndarray | None = None
    hole: np.ndarray | None = None
    channels: np.ndarray | None = None


class Watched:
    """A denoiser whose last estimate of a step is shown when the step is done.

    Args:
        denoise: denoise(x, t) -> (x0, eps).
        progress: wraps the times.
        watch: is called with x0.
    """

    def __init__(self, denoise: Callable, progress: Callable, watch: Callable[[np.ndarray], None]):
        self.denoise, self.progress, self.watch, self.x0 = denoise, progress, watch, None

    def __call__(self, x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        self.x0, eps = self.denoise(x, t)
        return self.x0, eps

    def steps(self, times: Iterable) -> Iterator:
        for t in self.progress(times):
            yield t
            self.watch(self.x0)


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
        self.model, self.refiner, self.joined = model, refiner, config.joined
        self.schedule = build_schedule(config.schedule)
        self.prediction = get_prediction(config.prediction_type)
        self.schedule.check(self.prediction)
        self.conditions: dict[tuple[str, Wording], Condition] = {}  # of single prompts
        self.last_given: tuple = (), Given()  # the last inputs and sides, and what `given` made of them

    def draw(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        numbers: list[int],
        settings: Settings,
        progress: Callable[[Iterable], Iterable] = iter,
        watch: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3]. Picture k of the run depends on the seed and on numbers[k], not on its batch.

        `watch` is called after every step, with the estimate of the clean latents, [B, C, h, w].
        """
        words, given, seen = (prompts, negative_prompts, numbers), self.given(settings), (progress, watch)
        images = self.decode(self.latents(*words, settings, given, *seen))
        if settings.inputs.mask:
            inputs, sides = settings.inputs, (settings.height, settings.width)
            images = pasted(images, inputs.picture(*sides), inputs.hole(*sides), self.model.factor)
        if settings.again:
            again = settings.again
            x0, _ = self.model.encode_images(to_float(enlarged(images, again.height, again.width)))
            images = self.decode(self.latents(*words, again, Given(x0), *seen, "noise of the larger picture"))
        return images

    def latents(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        numbers: list[int],
        settings: Settings,
        given: Given,
        progress: Callable[[Iterable], Iterable] = iter,
        watch: Callable[[np.ndarray], None] | None = None,
        purpose: str = "sampling noise",
    ) -> np.ndarray:
        """The latents of pictures, float64 [B, C, h, w]; `purpose` keys their noise."""
        shape = self.model.latent_shape(settings.height, settings.width)
        noise, times = noise_of(settings, purpose, shape, numbers), settings.times(self.schedule)
        denoise = self.guided(prompts, negative_prompts, settings, given.channels)
        start = self._start(given, settings.strength, times[0], noise(-1))
        if given.hole is not None and not self.joined:
            denoise = Blend(denoise, given.x0, given.hole, self.schedule)
        if watch:
            denoise = Watched(denoise, progress, watch)
            progress = denoise.steps
        latents = settings.sampler(denoise, start, times, self.schedule, noise, progress)
        (self.refiner or self).model.give_back(UNET)
        return latents

    def _start(self, given: Given, strength: float, t: float, eps: np.ndarray) -> np.ndarray:
        """The latents that the sampler begins with: noise alone where nothing is given, or all is painted anew."""
        if given.x0 is None:
            return eps
        noised = self.noised(given.x0, t, eps)
        if given.hole is None or strength < 1:
            return noised
        return eps if self.joined else np.where(given.hole, eps, noised)

    def noised(self, x0: np.ndarray, t: float, eps: np.ndarray) -> np.ndarray:
        """Latents x0 with the noise of time t."""
        return self.schedule.alpha(t) * x0 + self.schedule.sigma(t) * eps

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3]; UserError where they are none, or a file of weights has changed meanwhile."""
        images = self.model.decode(latents)
        self.model.give_back(VAE)
        if file := checkpoint.changed(self.model.views.values()):
            raise UserError(f"{file} was written to while pictures were drawn with it: draw them again")
        if not np.isfinite(images).all():
            raise UserError("the autoencoder returned NaN or infinity: check the checkpoint, or use --dtype float32")
        return to_uint8(images)

    def given(self, settings: Settings) -> Given:
        """What the settings' picture files are as latents; the last result is kept."""
        key = settings.inputs, settings.height, settings.width
        if self.last_given[0] != key:
            self.last_given = key, self._given(*key)
        return self.last_given[1]

    def _given(self, inputs: Inputs, height: int, width: int) -> Given:
        x0 = hole = channels = None
        factor = self.model.factor
        if inputs.init_image:
            picture = to_float([inputs.picture(height, width)])  # [1, 3, H, W]
            x0, _ = self.model.encode_images(picture)
        if inputs.mask:
            pixels = inputs.hole(height, width)
            cells = pixels.reshape(height // factor, factor, width // factor, factor)
            hole = cells.any((1, 3))[None, None]
        if self.joined == "mask":
            hole = cells[:, 0, :, 0][None, None]  # the nearest pixel, as the network was taught
            around, _ = self.model.encode_images(np.where(pixels, np.float32(0), picture))
            channels = np.concatenate((hole, around), 1, dtype=np.float32)
        elif self.joined == "depth":
            channels = inputs.depth(height // factor, width // factor)[None, None]
        return Given(x0, hole, channels)

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
        z = self.noised(x0, times[0], noise(-1))
        denoise = self.guided(prompts, [""] * len(prompts), settings)
        return settings.sampler(denoise, z, times, self.schedule, noise)

    def guided(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        settings: Settings,
        channels: np.ndarray | None = None,
    ) -> Denoiser | Relay:
        """The denoiser of a batch of prompts, for a sampler, with the refiner's after it; `channels`: of `Given`."""
        words = prompts, negative_prompts, settings.guidance_scale, settings.told()
        wording = self.wording(prompts, negative_prompts, settings)
        limits = settings.guidance_rescale, settings.guidance_interval
        denoise = self.denoiser(*words, settings.zeros_for_empty, wording, limits, channels)
        if self.refiner is None:
            return denoise
        until = round(len(self.schedule) * (1 - settings.refiner_start))
        second = self.refiner.denoiser(*words, False, wording, limits)
        return Relay(denoise, second, until, lambda: self.model.give_back(UNET))

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
        zeros_for_empty: bool = False,
        wording: Wording = AS_IT_IS,
        limits: tuple[float, tuple[float, float] | None] = (0.0, None),
        channels: np.ndarray | None = None,
    ) -> Denoiser:
        """This model's denoiser of a batch of prompts.

        Args:
            told: as from `Settings.told`.
            limits: guidance_rescale and guidance_interval, as in `Settings`.
            channels: [1, N, h, w], joined to z on both sides of guidance; see `Given`.
        """
        cond, uncond = self.told(prompts, told[0], wording=wording), None
        if self.model.guidance_channels:  # the network itself guides: it runs once, without the negative prompts
            cond = cond.with_guidance(np.full(len(prompts), guidance_scale), self.model.guidance_channels)
            guidance_scale = 1
        elif guidance_scale != 1:
            uncond = self.told(negative_prompts, told[1], zeros_for_empty, wording)
        if bool(self.joined) != (channels is not None):
            raise UserError(f"this model {NEEDS[self.joined]}: draw with it by text_to_image.py")
        if channels is not None:
            channels = np.repeat(channels, len(prompts), 0)
            cond, uncond = (each and each._replace(channels=channels) for each in (cond, uncond))
        return Denoiser(self.model.unet, self.schedule, self.prediction, cond, uncond, guidance_scale, *limits)

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
