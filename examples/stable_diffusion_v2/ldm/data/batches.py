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
from typing import NamedTuple

import numpy as np

from ldm.data.dataset import CaptionedImages
from ldm.data.images import crop_place, to_float
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


class Cut(NamedTuple):
    """Where a sample's picture comes from, as SDXL is told it: heights before widths, in pixels.

    original: of the file, upright.
    crop: (top, left) in the scaled picture; of a mirrored one as it is seen there, after mirroring.
    target: of the sample's picture.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class Drawn(NamedTuple):
    """A sample with its random changes: picture uint8 [S, S, 3] or None, caption, whether mirrored, cut or None."""

    picture: np.ndarray | None
    text: str
    mirrored: bool
    cut: Cut | None


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    Args:
        images: float32 [B, 3, S, S] in [-1, 1]; None where only captions are asked for.
        texts: B captions.
        ordinals: int64 [B], the samples' numbers in the whole run.
        indices: int64 [B], the samples' places in the dataset.
        mirrored: B truth values.
        cuts: B cuts; None where they are not asked for.
    """

    images: np.ndarray | None
    texts: list[str]
    ordinals: np.ndarray
    indices: np.ndarray
    mirrored: list[bool]
    cuts: list[Cut] | None = None


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
        pictures: whether batches have pictures. Without pictures, no crop may move.
        cuts: whether batches have the cuts of the pictures.
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
        cuts: bool = False,
    ):
        if batch_size < 1 or not 0 <= rank < ranks:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {ranks}")
        self.dataset, self.batch_size, self.seed, self.augment = dataset, batch_size, seed, augment
        self.start_step, self.rank, self.ranks = start_step, rank, ranks
        self.pictures, self.cuts = pictures, cuts

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
                yield self._batch(samples, np.array(self.ordinals(step), np.int64))
                step += 1

    def _batch(self, samples: list[Drawn], ordinals: np.ndarray) -> Batch:
        pictures, texts, mirrored, cuts = map(list, zip(*samples))
        images, indices = to_float(pictures) if self.pictures else None, np.array([self.index(i) for i in ordinals])
        return Batch(images, texts, ordinals, indices, mirrored, cuts if self.cuts else None)

    def index(self, ordinal: int) -> int:
        """The place of an ordinal's sample in the dataset."""
        epoch, position = divmod(ordinal, len(self.dataset))
        return epoch_order(self.seed, len(self.dataset), epoch)[position]

    def sample(self, ordinal: int) -> Drawn:
        """The sample of an ordinal, with its random changes."""
        index, data = self.index(ordinal), self.dataset
        picture, sample = data.read_at(index) if self.pictures else (None, data.samples[index])
        dropped = generator(self.seed, "caption dropout", ordinal).random() < self.augment.caption_dropout
        mirrored = self.augment.flip and generator(self.seed, "flip", ordinal).random() < 0.5
        text, measures = "" if dropped else sample.text, data.measures(sample.path) if self.cuts else None
        if picture is None and measures is None:
            return Drawn(None, text, mirrored, None)
        height, width = measures.scaled if picture is None else picture.shape[:2]
        rng = generator(self.seed, "crop", ordinal) if self.augment.random_crop else None
        side, (top, left) = data.image_size, crop_place((height, width), data.image_size, rng)
        if picture is not None:
            picture = picture[top : top + side, left : left + side]
            picture = picture[:, ::-1] if mirrored else picture
        seen_left = width - left - side if mirrored else left
        cut = Cut(measures.original, (top, seen_left), (side, side)) if measures else None
        return Drawn(picture, text, mirrored, cut)

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[Future]:
        return [pool.submit(self.sample, ordinal) for ordinal in self.ordinals(step)]


@lru_cache(maxsize=4)
def epoch_order(seed: int, count: int, epoch: int) -> np.ndarray:
    """The order of one pass over `count` samples: a permutation, int64 [count]. Callers must not write to it."""
    return generator(seed, "shuffle", epoch).permutation(count)
