"""The endless stream of training batches, a function of the seed and the position alone.

The ordinal of a sample is its number (0, 1, 2, ...) over the whole run and all ranks. It lies in pass `ordinal // N`
over the N pictures, and is entry `ordinal % N` of this pass's permutation. Passes follow one another without a gap, and
a batch may span two passes. So every picture comes exactly once per pass, whatever the batch size.

The ordinal is the key of all randomness of a sample: of its crop, flip and dropped caption, and of its noise and
timestep in the training loop. The stream therefore depends on neither batch size, number of ranks nor restarts.
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

AHEAD = 2  # batches that are prepared during the training step of the current batch


@dataclass(frozen=True)
class Augment:
    """The random changes of a sample.

    Args:
        random_crop: the square is cut from a random place, not from the middle.
        flip: half of the pictures are flipped left to right.
        caption_dropout: share of the captions that are emptied.

    Raises:
        UserError: caption_dropout is no probability.
    """

    random_crop: bool = False
    flip: bool = False
    caption_dropout: float = 0.0

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout is a probability from 0 to 1, not {self.caption_dropout}")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    Args:
        images: float32 [B, 3, S, S] in [-1, 1]; None where only captions are asked for.
        texts: B captions.
        ordinals: int64 [B], the samples' numbers in the whole run.
        indices: int64 [B], the samples' places in the dataset.
    """

    images: np.ndarray | None
    texts: list[str]
    ordinals: np.ndarray
    indices: np.ndarray


class Batches:
    """The batches from `start_step` on, without end. Step s takes batch_size * ranks ordinals from s times as many on.

    Args:
        dataset: the captioned pictures, the same on all ranks.
        batch_size: samples per step and rank.
        seed: the run's seed, the same on all ranks.
        augment: random changes.
        start_step: the first step of the iteration, above 0 after a resume.
        rank: the rank whose share of every step is given.
        ranks: the number of ranks.
        pictures: whether batches have pictures; otherwise they have captions, ordinals and indices alone.
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
        """Steps that count as one epoch: the number of whole batches among N samples, at least 1.

        The samples behind the last whole batch are not dropped: the next epoch, of as many steps, begins with them.
        """
        return max(1, len(self.dataset) // (self.batch_size * self.ranks))

    def ordinals(self, step: int) -> range:
        """The ordinals of this rank's samples in a step."""
        first = (step * self.ranks + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Threads read the pictures of the next `AHEAD` batches. An error of a thread is raised with its batch."""
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
        """The place of an ordinal's sample in the dataset."""
        epoch, position = divmod(ordinal, len(self.dataset))
        return epoch_order(self.seed, len(self.dataset), epoch)[position]

    def sample(self, ordinal: int) -> tuple[np.ndarray | None, str]:
        """The picture, uint8 [S, S, 3] or None, and the caption of an ordinal, with their random changes."""
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
    """The order of one pass over `count` samples: a permutation, int64 [count]. Callers must not write to it."""
    return generator(seed, "shuffle", epoch).permutation(count)
