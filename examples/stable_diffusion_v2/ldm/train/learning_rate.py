"""The learning rate of each step, a plain function of the step's number: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldm.errors import UserError


def _constant(done: float) -> float:
    return 1.0


def _linear(done: float) -> float:
    return 1 - done


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _polynomial(done: float) -> float:
    return (1 - done) ** 0.9


# How far the rate still is from its end, by the share of the decay that is done: 1 at 0, and 0 at 1 but for constant.
SCHEDULES = {
    "constant": _constant,
    "cosine_decay": _cosine,
    "linear_decay": _linear,
    "polynomial_decay": _polynomial,
    "cosine": _cosine,
    "linear": _linear,
    "polynomial": _polynomial,
}


@dataclass(frozen=True)
class LearningRate:
    """A schedule: warm-up, decay, and the end value from then on.

    Args:
        name: one of SCHEDULES.
        start: reached at the last step of the warm-up, and the rate of the first step after it.
        end: the rate of the last of the ``decay_steps`` and of all steps after them; "constant" ignores it.
        warmup_steps: the rate rises in equal parts from ``start / warmup_steps`` to ``start``.
        decay_steps: how many steps the decay takes; 0 for all that are left after the warm-up.
        total_steps: of the run.

    Raises:
        UserError: an unknown name or a number out of range.
    """

    name: str
    start: float
    end: float
    warmup_steps: int
    decay_steps: int
    total_steps: int

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise UserError(f"unknown scheduler '{self.name}': choose one of {', '.join(SCHEDULES)}")
        if not (0 <= self.start < math.inf and 0 <= self.end < math.inf):
            raise UserError(f"the learning rate goes from {self.start} to {self.end}; both must be 0 or more")
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise UserError(f"warmup_steps {self.warmup_steps}, decay_steps {self.decay_steps}: both must be 0 or more")

    def __call__(self, step: int) -> float:
        """The rate of step number ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.start * (step + 1) / self.warmup_steps
        decay_steps = self.decay_steps or self.total_steps - self.warmup_steps
        done = min((step - self.warmup_steps) / max(decay_steps - 1, 1), 1.0)
        return self.end + (self.start - self.end) * SCHEDULES[self.name](done)
