"""The times at which a sampler asks the network: n of [0, T - 1], strictly falling, for every n from 1 to T.

Stable Diffusion's own DDIM samples were made with `leading`. It begins well below T - 1, where latents still have
signal, though sampling begins with pure noise. The others begin at T - 1.
"""

from __future__ import annotations

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


SPACINGS = {"leading": leading, "trailing": trailing, "linspace": linspace, "uniform": uniform}


def sampling_times(spacing: str, n: int, schedule: NoiseSchedule) -> np.ndarray:
    """Exactly n times, float64 [n], strictly falling, in [0, T - 1].

    Raises:
        UserError: unknown spacing, n outside 1 to T, or a spacing that misses the last step where that step has no
            signal.
    """
    place, steps = choose(SPACINGS, spacing, "timestep spacing"), len(schedule)
    if not 1 <= n <= steps:
        raise UserError(f"{n} sampling steps are not possible: choose 1 to {steps}")
    times = place(n, steps).astype(np.float64)
    if schedule.zero_terminal_snr and times[0] != steps - 1:
        raise UserError(
            f"zero_terminal_snr does not go with spacing '{spacing}', which misses the last step, the only one "
            "without signal: set spacing to 'trailing'"
        )
    return times
