"""Training some timesteps more often than others. Unlike a weight on the loss (`weighting`), it spends samples on them.

The strategies and their options are those of diffusers' SDXL training script.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.prediction import choose
from ldm.errors import UserError

# (timesteps, portion, begin, end) -> the timesteps that come `multiplier` times as often
STRATEGIES = {
    "none": lambda timesteps, portion, begin, end: slice(0, 0),
    "earlier": lambda timesteps, portion, begin, end: slice(0, int(portion * timesteps)),
    "later": lambda timesteps, portion, begin, end: slice(timesteps - int(portion * timesteps), timesteps),
    "range": lambda timesteps, portion, begin, end: slice(begin, end),
}


def timestep_density(
    strategy: str,
    timesteps: int,
    multiplier: float = 1.0,
    portion: float = 0.25,
    begin: int = 0,
    end: int | None = None,
) -> np.ndarray:
    """The share of each timestep in training, float64 [T], which adds up to 1.

    Args:
        strategy: which timesteps come more often: "none", the "earlier" ones with little noise, the "later" ones with
            much, or a "range".
        timesteps: T.
        multiplier: how many times as often as the others they come.
        portion: with "earlier" and "later", their share of T.
        begin, end: with "range", the first timestep and the one after the last (None: T).

    Raises:
        UserError: an unknown strategy, or a number that makes no sense.
    """
    place = choose(STRATEGIES, strategy, "timestep bias strategy")
    if not (multiplier > 0 and np.isfinite(multiplier)):
        raise UserError(f"timestep_bias_multiplier is {multiplier}; give a number above 0, 1 is no bias")
    if not 0 <= portion <= 1:
        raise UserError(f"timestep_bias_portion is {portion}; give a share of the timesteps, 0 to 1")
    if not 0 <= begin < (timesteps if end is None else end) <= timesteps:
        told = f"timestep_bias_begin is {begin} and timestep_bias_end {end}"
        raise UserError(f"{told}; give 0 <= begin < end <= {timesteps}")
    weights = np.ones(timesteps)
    weights[place(timesteps, portion, begin, end)] *= multiplier
    return weights / weights.sum()


def timesteps_at(density: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """The timesteps, int32, at these quantiles in [0, 1) of a density. Uniform quantiles give draws from it."""
    return np.searchsorted(np.cumsum(density)[:-1], quantiles, side="right").astype(np.int32)
