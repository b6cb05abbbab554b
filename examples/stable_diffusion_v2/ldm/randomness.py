"""Host random generators keyed by what they are for, so a draw never depends on batch size, rank or restart."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments.

    Args:
        seed: the run's seed, >= 0.
        purpose: what is drawn ("noise", "timestep", "crop", ...); different purposes are independent.
        index: which draw it is, e.g. the global number of the training sample or of the image.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *index])))
