"""The endless stream of training batches, a function of the seed and the position alone.

Sample number `ordinal` (0, 1, 2, ... over the whole run and all ranks) lies in pass `ordinal // N` over the N pictures
and is that pass's permuted entry `ordinal % N`. Passes follow one another without a gap, so every picture comes exactly
once per pass whatever the batch size; a batch may span two passes. All randomness of a sample (crop, flip, dropped
caption, and in the training loop its noise and timestep) is keyed by the ordinal, hence independent of batch size,
number of ranks and restarts.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm.data.dataset import CaptionedImages
from ldm.data.images import crop, to_float
from ldm.errors import UserError
from ldm.randomness import generator

AHEAD = 2  # batches that are prepared while the current one is trained on


@dataclass(frozen=True)
class Augment:
    """What is changed at random: crop position, left-right flip (half of the time), captions emptied."""

    random_crop: bool = False
    flip: bool = False
    caption_dropout: float = 0.0

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout is a probability from 0 to 1, not {self.caption_dropout}")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: images float32 [B, 3, S, S] in [-1, 1], B captions, ordinals int64 [B].

    indices int64 [B] are the samples' places in the dataset. Without pictures images is None.
    """

    images: np.ndarray | None
    texts: list[str]
    ordinals: np.ndarray
    indices: np.ndarray


class Batches:
    """Iterate from `start_step` on, for ever; step s takes the ordinals from s * batch_size * ranks on.

    Args:
        dataset: the pictures; the same on all ranks.
        batch_size: samples per step and rank.
        seed: the run's seed, the same on all ranks.
        augment: random changes.
        start_step: the first step to give, as after a resume.
        rank, ranks: which share of every step is given.
        pictures: whether the pictures are wanted, or captions and places alone.
    """

    def __init__(
        self,
        dataset: CaptionedImages,
        batch_size: int,
        seed: int,
        augment: Augment = Augment(),
        start_step: int = 0,
        rank: int = 0,
        ranks: int = 1,
        pictures: bool = True,
    ):
        if batch_size < 1 or not 0 <= rank < ranks:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {ranks}")
        self.dataset, self.batch_size, self.seed, self.augment = dataset, batch_size, seed, augment
        self.start_step, self.rank, self.ranks, self.pictures = start_step, rank, ranks, pictures

    @property
    def steps_per_epoch(self) -> int:
        """Steps that count as one epoch: whole batches that N holds, at least one.

        The remainder is not dropped: it opens the next epoch, whose steps are as many.
        """
        return max(1, len(self.dataset) // (self.batch_size * self.ranks))

    def ordinals(self, step: int) -> range:
        first = (step * self.ranks + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Pictures are read in threads, `AHEAD` batches before they are wanted; their errors are raised here."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            step = self.start_step
            pending = deque(self._submit(pool, step + ahead) for ahead in range(AHEAD))
            while True:
                samples = [future.result() for future in pending.popleft()]
                pending.append(self._submit(pool, step + AHEAD))
                images, texts = zip(*samples)
                ordinals = np.array(self.ordinals(step), np.int64)
                images = to_float(images) if self.pictures else None
                yield Batch(images, list(texts), ordinals, np.array([self.index(i) for i in ordinals]))
                step += 1

    def index(self, ordinal: int) -> int:
        """The place in the dataset of one ordinal."""
        epoch, position = divmod(ordinal, len(self.dataset))
        return epoch_order(self.seed, len(self.dataset), epoch)[position]

    def sample(self, ordinal: int) -> tuple[np.ndarray | None, str]:
        """The picture, uint8 [S, S, 3], and the caption of one ordinal, with its random changes."""
        index = self.index(ordinal)
        picture, text = self.dataset[index] if self.pictures else (None, self.dataset.samples[index].text)
        if generator(self.seed, "caption dropout", ordinal).random() < self.augment.caption_dropout:
            text = ""
        if picture is None:
            return None, text
        rng = generator(self.seed, "crop", ordinal) if self.augment.random_crop else None
        picture = crop(picture, self.dataset.image_size, rng)
        if self.augment.flip and generator(self.seed, "flip", ordinal).random() < 0.5:
            picture = picture[:, ::-1]
        return picture, text

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[Future]:
        return [pool.submit(self.sample, ordinal) for ordinal in self.ordinals(step)]


@lru_cache(maxsize=4)
def epoch_order(seed: int, count: int, epoch: int) -> np.ndarray:
    """The order of one pass over `count` samples: int64 [count], a permutation. Not to be written to."""
    return generator(seed, "shuffle", epoch).permutation(count)
