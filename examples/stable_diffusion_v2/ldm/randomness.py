"""Host random generators keyed by what they are for, so a draw never depends on batch size, rank or restart."""

from __future__ import annotations

import logging
import secrets
import zlib
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments.

    Args:
        seed: the run's seed, >= 0.
        purpose: what is drawn ("noise", "timestep", "crop", ...); different purposes are independent.
        index: which draw it is, e.g. the global number of the training sample or of the image.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *index])))


GOLDEN = (5**0.5 - 1) / 2


def spread(seed: int, purpose: str, index: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 like `index`, each uniform over seeds, and any run of consecutive ones evenly spread.

    Additive recurrence with the golden ratio: a batch of times from it covers the noise levels, so that its loss varies
    less (the aim of arXiv 2107.00630, appendix I.1), and still no number depends on the size of the batch.
    """
    return (generator(seed, purpose).random() + GOLDEN * np.asarray(index)) % 1


def settled_seed(seed: int, broadcast: Callable[[str, int], int]) -> int:
    """The seed itself; for -1 a random one, the same for all ranks (`Ranks.broadcast`). A line tells it."""
    if seed != -1:
        return seed
    seed = broadcast("seed", secrets.randbelow(1 << 32))
    log.info("the seed is %d; --seed %d repeats this run", seed, seed)
    return seed
