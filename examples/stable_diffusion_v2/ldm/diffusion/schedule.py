"""The noise schedule: the shares of image and noise at each of the T training steps.

z_t = alpha_t x0 + sigma_t eps with alpha_t^2 = alpha_bar_t = prod(1 - beta) up to t, and sigma_t^2 = 1 - alpha_bar_t
(DDPM, arXiv 2006.11239, eq. 4). Time t counts from 0, the least noise, to T - 1, the most; CLEAN is the time without
noise. Everything is float64 on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.diffusion.prediction import PREDICTIONS, Prediction, choose
from ldm.errors import UserError

CLEAN = -1  # alpha = 1, sigma = 0


def scaled_linear(start: float, end: float, steps: int) -> np.ndarray:
    """Square roots in equal steps: Stable Diffusion's schedule, with 0.00085 to 0.0120 in 1000 steps."""
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def linear(start: float, end: float, steps: int) -> np.ndarray:
    """Equal steps (DDPM, arXiv 2006.11239, section 4)."""
    return np.linspace(start, end, steps)


def squaredcos_cap_v2(start: float, end: float, steps: int) -> np.ndarray:
    """Squared cosine (arXiv 2102.09672, eq. 17), each beta at most 0.999; start and end are not used."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS = {"scaled_linear": scaled_linear, "linear": linear, "squaredcos_cap_v2": squaredcos_cap_v2}


def rescale_zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar): it ends at exactly 0 and begins as before (arXiv 2305.08891, alg. 1)."""
    alpha = np.sqrt(alpha_bar)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def per_sample(values) -> np.ndarray:
    """Numbers [B], or one number, as [B, 1, 1, 1], to be multiplied by latents [B, C, H, W]."""
    return np.reshape(values, (-1, 1, 1, 1))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A noise schedule.

    Its functions of time take integers or fractions in [CLEAN, T - 1], scalars or arrays, and return float64 of the
    same shape. Between whole steps alpha_bar is linear in t.

    Args:
        alpha_bar: [T], strictly falling, in [0, 1).
    """

    alpha_bar: np.ndarray

    def __post_init__(self):
        assert self.alpha_bar[0] < 1 and self.alpha_bar[-1] >= 0 and (np.diff(self.alpha_bar) < 0).all()

    def __len__(self) -> int:
        """The number of training steps T."""
        return len(self.alpha_bar)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last step is noise alone."""
        return bool(self.alpha_bar[-1] == 0)

    def _alpha_bar(self, t) -> np.ndarray:
        if np.min(t) < CLEAN or np.max(t) > len(self) - 1:
            raise ValueError(f"time {t} is outside [{CLEAN}, {len(self) - 1}]")
        return np.interp(t, np.arange(CLEAN, len(self)), np.concatenate([[1.0], self.alpha_bar]))

    def alpha(self, t) -> np.ndarray:
        """The image's share at time t."""
        return np.sqrt(self._alpha_bar(t))

    def sigma(self, t) -> np.ndarray:
        """The noise's share at time t."""
        return np.sqrt(1 - self._alpha_bar(t))

    def log_snr(self, t) -> np.ndarray:
        """log(alpha^2 / sigma^2) at time t: infinite at CLEAN, minus infinite at a last step without signal."""
        alpha_bar = self._alpha_bar(t)
        with np.errstate(divide="ignore"):
            return np.log(alpha_bar) - np.log1p(-alpha_bar)

    def time(self, log_snr) -> np.ndarray:
        """The time in [0, T - 1] at which the log-SNR is this; the nearer end for a value beyond the two."""
        alpha_bar = 1 / (1 + np.exp(-np.asarray(log_snr, np.float64)))
        return np.interp(alpha_bar, self.alpha_bar[::-1], np.arange(len(self))[::-1])

    def check(self, prediction: Prediction) -> None:
        """UserError where a network with this prediction type cannot be used at every step of this schedule."""
        if self.zero_terminal_snr and prediction.needs_signal:
            others = " or ".join(f"'{other.name}'" for other in PREDICTIONS.values() if not other.needs_signal)
            raise UserError(
                f"prediction_type '{prediction.name}' does not go with zero_terminal_snr: the last step is noise "
                f"alone, where it says nothing about the image; use {others}"
            )


def build_schedule(config) -> NoiseSchedule:
    """The schedule of a model's configuration.

    Args:
        config: ldm.config.model.ScheduleConfig, which checks that 1e-12 <= beta_start <= beta_end < 1.

    Raises:
        UserError: unknown name, or betas that leave nothing of the picture before the end.
    """
    betas = choose(BETAS, config.name, "noise schedule")
    alpha_bar = np.cumprod(1 - betas(config.beta_start, config.beta_end, config.timesteps))
    if not (alpha_bar[-1] > 0 and (np.diff(alpha_bar) < 0).all()):
        raise UserError(
            f"model.schedule: {config.timesteps} timesteps with betas from {config.beta_start} to {config.beta_end} "
            "leave nothing of the picture before the last of them: lower beta_end; usual are 1000 up to 0.012"
        )
    if config.zero_terminal_snr:
        alpha_bar = rescale_zero_terminal_snr(alpha_bar)
    return NoiseSchedule(alpha_bar)
