"""What an adapter is, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldm.checkpoint.arrays import Strings

FORMS = ("peft", "diffusers", "kohya", "mindone")


class Pair(NamedTuple):
    """One layer's adapter: it adds alpha / rank * up @ down to the layer's weight.

    Fields:
        down: A, [r, in], of a convolution [r, in, k, k].
        up: B, [out, r], of a convolution [out, r, 1, 1].
        alpha: finite.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes: [out, in] or [out, in, k, k]."""
        return (len(self.up), *self.down.shape[1:])

    def product(self) -> np.ndarray:
        """What it adds to the weight, float64, of `shape`."""
        down, up = self.down.astype(np.float64), self.up.astype(np.float64)
        return (self.scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))).reshape(self.shape)


@dataclass(frozen=True)
class Adapter:
    """The pairs by module, what the file says of itself (as in `checkpoint.Checkpoint`), and its form (of FORMS).

    `origin` is the file's name in messages.
    """

    pairs: dict[str, Pair]
    meta: Strings
    form: str
    origin: str = "the LoRA"
