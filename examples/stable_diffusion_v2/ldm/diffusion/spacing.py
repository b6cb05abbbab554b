"""The times at which a sampler asks the network: n of [0, T - 1], strictly falling, for every n from 1 to T.

Stable Diffusion's own DDIM samples were made with `leading`. It begins well below T - 1, where latents still have
signal, though sampling begins with pure noise. The others begin at T - 1. Some place the times themselves, others the
noise level, whose times are fractions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ldm.diffusion.prediction import choose
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError


def leading(n: int, steps: int) -> np.ndarray:
    """Multiples of T // n, plus Stable Diffusion's offset 1 where there is room for it."""
    stride = steps // n
    return np.arange(n)[::-1] * stride + min(1, steps - 1 - (n - 1) * stride)


def trailing(n: int, steps: int) -> np.ndarray:
    """From T - 1 down in strides of T / n, rounded (arXiv 2305.08891, section 3.3)."""
    # Where T / n is rounded down, the range ends one element late.
    return np.round(np.arange(steps, 0, -steps / n)[:n]) - 1


def linspace(n: int, steps: int) -> np.ndarray:
    """From T - 1 to 0 in equal strides, rounded; one step is at T - 1."""
    return np.round(np.linspace(0 if n > 1 else steps - 1, steps - 1, n))[::-1]


def uniform(n: int, steps: int) -> np.ndarray:
    """From T - 1 down in n equal strides that end at 0; the 0 itself is left out. Times are fractions.

    The time steps of DPM-Solver (arXiv 2206.00927, section 3.4 and appendix D.4).
    """
    return np.linspace(steps - 1, 0, n + 1)[:-1] if n < steps else np.arange(steps)[::-1]


def lcm(n: int, steps: int) -> np.ndarray:
    """n of the 50 `trailing` times at which latent consistency models were distilled (arXiv 2310.04378, section 4.3).

    They are evenly chosen from the first one on. More than 50 steps are plain `trailing` times.
    """
    taught = trailing(min(max(n, 50), steps), steps)
    return taught[np.floor(np.arange(n) * (len(taught) / n) + 1e-9).astype(int)]


# Spacings of the noise level: (n, log-SNR of the first time, of the time 0) -> n log-SNRs. Times are fractions.


def karras(n: int, first: float, last: float) -> np.ndarray:
    """sigma / alpha to the power 1/7 in equal steps, both ends included (EDM, arXiv 2206.00364, eq. 5)."""
    return -14 * np.log(np.linspace(np.exp(-first / 14), np.exp(-last / 14), n))


def exponential(n: int, first: float, last: float) -> np.ndarray:
    """log(sigma / alpha) in equal steps, both ends included."""
    return np.linspace(first, last, n)


def log_snr(n: int, first: float, last: float) -> np.ndarray:
    """n equal steps of log-SNR that end at time 0; the 0 itself is left out (arXiv 2206.00927, section 3.4).

    They are those of `exponential` with one more time.
    """
    return np.linspace(first, last, n + 1)[:-1]


TIMES = {"leading": leading, "trailing": trailing, "linspace": linspace, "uniform": uniform, "lcm": lcm}
LEVELS = {"karras": karras, "exponential": exponential, "log_snr": log_snr}
SPACINGS = {**TIMES, **LEVELS}


def times_of_levels(place: Callable, n: int, schedule: NoiseSchedule) -> np.ndarray:
    """The times of a spacing of LEVELS. Where the last step has no signal, it is in the place of the one before it."""
    steps = len(schedule)
    first = steps - 2 if schedule.zero_terminal_snr else steps - 1
    times = schedule.time(place(n, schedule.log_snr(first), schedule.log_snr(0)))
    times[0] = steps - 1
    return times


def sampling_times(spacing: str, n: int, schedule: NoiseSchedule) -> np.ndarray:
    """Exactly n times, float64 [n], strictly falling, in [0, T - 1].

    Raises:
        UserError: unknown spacing, n outside 1 to T, or a spacing that misses the last step where that step has no
            signal.
    """
    place, steps = choose(SPACINGS, spacing, "timestep spacing"), len(schedule)
    if not 1 <= n <= steps:
        raise UserError(f"{n} sampling steps are not possible: choose 1 to {steps}")
    times = times_of_levels(place, n, schedule) if spacing in LEVELS else place(n, steps).astype(np.float64)
    if schedule.zero_terminal_snr and times[0] != steps - 1:
        raise UserError(
            f"zero_terminal_snr does not go with spacing '{spacing}', which misses the last step, the only one "
            "without signal: set spacing to 'trailing'"
        )
    return times
