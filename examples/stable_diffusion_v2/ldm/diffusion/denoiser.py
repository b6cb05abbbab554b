"""The denoiser: it hides the network, its schedule, its prediction type and the guidance from the samplers."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ldm.conditioning import Condition
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import NoiseSchedule, per_sample
from ldm.errors import UserError


class Denoiser:
    """denoise(x, t) -> (x0, eps): the network's estimate of the clean latents and of the noise in x.

    With classifier-free guidance (arXiv 2207.12598) the network runs once per step on the batch (without caption, with
    caption), and the guided output is uncond + guidance_scale (cond - uncond). Conversion to x0 and eps is linear, so
    this guides both.

    Args:
        network: Cell, network(x float32 [N, C, H, W], t float32 [N], *condition) -> [N, C, H, W]; x has the condition's
            channels too, if there are any.
        schedule: the noise schedule that the network was trained with.
        prediction: what the network predicts.
        cond: the prompts' condition, arrays.
        uncond: the condition of the negative or empty prompts; it is not used where guidance_scale is 1.
        guidance_scale: of all prompts, or of each, [B]. 1 is no guidance and half the work; 0 ignores the prompts.
        guidance_rescale: from 0 to 1, how far the guided output's deviation is brought back to that with caption alone
            (arXiv 2305.08891, section 3.4).
        guidance_interval: (low, high), the noise levels sigma / alpha with low < level <= high where it guides
            (arXiv 2404.07724, eq. 7). At others the network runs on the batch with caption alone. None: at all levels.

    Raises:
        UserError: the prediction type does not go with the schedule.
    """

    def __init__(
        self,
        network: nn.Cell,
        schedule: NoiseSchedule,
        prediction: Prediction,
        cond: Condition,
        uncond: Condition | None = None,
        guidance_scale: float | np.ndarray = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
    ):
        schedule.check(prediction)
        conditions = [cond] if np.all(np.equal(guidance_scale, 1)) else [uncond, cond]
        assert all(each.context.shape == cond.context.shape for each in conditions), "one negative prompt per prompt"
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.guidance_scale, self.guidance_rescale = per_sample(guidance_scale), guidance_rescale
        self.guidance_interval, self.batch = guidance_interval, len(cond.context)
        self.copies = len(conditions)
        self.condition = _ready(Condition.join(conditions))  # of copies * B
        self.alone = _ready(cond) if guidance_interval and self.copies > 1 else None  # of B

    def __call__(self, x: np.ndarray, t: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(x0, eps), float64 [B, C, H, W] each, for x [B, C, H, W] at time t, which may lie between two steps.

        Args:
            t: a time, or one for each sample, [B].

        Raises:
            UserError: the network returned NaN or infinity.
        """
        assert len(x) == self.batch, "as many latents as prompts"
        scale = self.scale_at(t)
        plain = self.alone is not None and np.all(scale == 1)
        copies, condition = (1, self.alone) if plain else (self.copies, self.condition)
        batch = np.concatenate([x] * copies).astype(np.float32)  # [copies * B, C, H, W]
        times = np.concatenate([np.broadcast_to(t, len(x))] * copies)
        beside, told = condition
        output = self.network(Tensor(beside(batch)), Tensor(times.astype(np.float32)), *told)
        output = output.astype(ms.float32).asnumpy()
        finite = np.isfinite(output).all((1, 2, 3))
        if not finite.all():
            at = times[~finite][0]
            raise UserError(
                f"the network returned NaN or infinity at t = {at}: check the checkpoint, or run in float32"
            )
        outputs = np.split(output.astype(np.float64), copies)  # the last one is with caption, the first without
        output = outputs[0] + scale * (outputs[-1] - outputs[0])  # [B, C, H, W]
        if self.guidance_rescale and copies > 1:
            alone, guided = (each.std((1, 2, 3), keepdims=True) for each in (outputs[-1], output))
            output *= 1 + self.guidance_rescale * (alone / np.maximum(guided, np.finfo(float).tiny) - 1)
        shares = (per_sample(share(t)) for share in (self.schedule.alpha, self.schedule.sigma))
        return self.prediction.to_x0_eps(output, x, *shares)

    def scale_at(self, t: float | np.ndarray) -> np.ndarray:
        """The guidance scale at time t, [B, 1, 1, 1] or [1, 1, 1, 1]: 1 outside the interval."""
        if self.guidance_interval is None:
            return self.guidance_scale
        low, high = self.guidance_interval
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        inside = (low * alpha < sigma) & (sigma <= high * alpha if np.isfinite(high) else True)
        return np.where(per_sample(inside), self.guidance_scale, 1.0)


def _ready(condition: Condition) -> tuple[Callable, tuple[Tensor, ...]]:
    """What joins the condition's channels to z, and the tensors that the network takes after z and t."""
    return condition.beside, condition.map(Tensor).given()


class Relay:
    """Two denoisers of one picture: the first one down to a time, the second one, SDXL's refiner, from there to the end
    (arXiv 2307.01952, section 2.5).

    Args:
        first, second: denoise(x, t) -> (x0, eps).
        until: the first one denoises at this time and before.
        handed: is called when the second one begins.
    """

    def __init__(self, first: Callable, second: Callable, until: float, handed: Callable[[], None]):
        self.first, self.second, self.until, self.handed = first, second, until, handed

    def __call__(self, x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        if t >= self.until:
            return self.first(x, t)
        if self.handed:
            self.handed()
            self.handed = None
        return self.second(x, t)


class Blend:
    """A denoiser that knows a part of the picture: it says so wherever the mask does not say otherwise.

    In the known part it answers as the exact denoiser of a known picture, x0 = known and the eps that x then holds. So
    every sampler leads that part to the known picture, and the network sees it with the noise of each time.

    Args:
        denoise: denoise(x, t) -> (x0, eps).
        known: [1 or B, C, H, W], clean latents.
        mask: [1, 1, H, W], 1 where the network decides, 0 where the picture is known.
        schedule: the noise schedule.
    """

    def __init__(self, denoise: Callable, known: np.ndarray, mask: np.ndarray, schedule: NoiseSchedule):
        self.denoise, self.known, self.mask, self.schedule = denoise, known, mask, schedule

    def __call__(self, x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        x0, eps = self.denoise(x, t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        known_eps = (x - alpha * self.known) / sigma
        return tuple(np.where(self.mask, guess, known) for guess, known in ((x0, self.known), (eps, known_eps)))
