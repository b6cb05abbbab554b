"""Random generators on the host, keyed by their purpose: no draw depends on batch size, rank or restart."""

from __future__ import annotations

import logging
import secrets
import zlib
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)
GOLDEN = (5**0.5 - 1) / 2


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A generator that depends on its arguments alone.

    Args:
        seed: the run's seed, >= 0.
        purpose: what is drawn ("noise", "timestep", "crop", ...). Different purposes are independent.
        index: the number of the draw, for example of the training sample or of the picture in the whole run.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *index])))


def stratified(seed: int, purpose: str, index: np.ndarray) -> np.ndarray:
    """Stratified uniform numbers in [0, 1): float64, of the shape of `index`.

    Each number is uniform over seeds, and the numbers of consecutive indices cover the interval evenly. The numbers are
    an additive recurrence with the golden ratio. A batch of times made from them covers the noise levels, so its loss
    varies less (the aim of arXiv 2107.00630, appendix I.1). No number depends on the size of the batch.
    """
    return (generator(seed, purpose).random() + GOLDEN * np.asarray(index)) % 1


def between(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """Noise on the great circle from one to the other, for each sample of [B, ...]; unit Gaussian as they are.

    share: 0 is the one, 1 is the other.
    """
    flat = (each.reshape(len(each), -1) for each in (one, other))
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in flat)
    angle = np.arccos(np.clip((a * b).sum(1), -1, 1)).reshape(-1, *[1] * (one.ndim - 1))
    straight = np.sin(angle) < 1e-6
    parts = (np.sin(part * angle) / np.where(straight, 1, np.sin(angle)) for part in (1 - share, share))
    first, second = (np.where(straight, even, part) for even, part in zip((1 - share, share), parts))
    return first * one + second * other


def settled_seed(seed: int, broadcast: Callable[[str, int], int]) -> int:
    """The seed itself; for -1 a random one, the same for all ranks (`Ranks.broadcast`). A line tells it."""
    if seed != -1:
        return seed
    seed = broadcast("seed", secrets.randbelow(1 << 32))
    log.info("the seed is %d; --seed %d repeats this run", seed, seed)
    return seed
