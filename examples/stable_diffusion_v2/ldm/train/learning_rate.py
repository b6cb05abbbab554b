"""The learning rate of each step, a plain function of the step's number: nothing to save, nothing to restore."""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.yaml_file import read_yaml
from ldm.errors import UserError
from ldm.files import escaped

log = logging.getLogger(__name__)
MULTI_STEP = "multi_step_decay"  # falls at its milestones and is constant between them


def _constant(done: float) -> float:
    return 1.0


def _linear(done: float) -> float:
    return 1 - done


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _polynomial(done: float) -> float:
    return (1 - done) ** 0.9


# Options that may change when a run is resumed; the rest of the run then learns differently.
_PLAN = ("scheduler", "start_learning_rate", "end_learning_rate", "warmup_steps", "decay_steps", "milestones")
_PLAN += ("decay_rate", "epochs", "train_steps", "steps")

# Distance of the rate from its end value, by the share of the decay that is done: 1 at the start, 0 at the end, and
# always 1 for the constant ones.
SCHEDULES = {
    "constant": _constant,
    "cosine_decay": _cosine,
    "linear_decay": _linear,
    "polynomial_decay": _polynomial,
    "cosine": _cosine,
    "linear": _linear,
    "polynomial": _polynomial,
    MULTI_STEP: _constant,
}


@dataclass(frozen=True)
class LearningRate:
    """A schedule: warm-up, decay, and the end value from then on.

    Args:
        name: one of SCHEDULES.
        start: the rate of the last step of the warm-up and of the first step after it.
        end: the rate of the last of the ``decay_steps`` and of all steps after them; "constant" and "multi_step_decay"
            ignore it.
        warmup_steps: the rate rises in equal parts from ``start / warmup_steps`` to ``start``. A number below 1 is a
            share of the run's steps, at least one step.
        decay_steps: how many steps the decay takes; 0 for all steps after the warm-up.
        total_steps: of the run.
        milestones: of "multi_step_decay": steps after the warm-up at which the rate is multiplied by decay_rate.
        decay_rate: of "multi_step_decay".

    Raises:
        UserError: an unknown name or a number out of range.
    """

    name: str
    start: float
    end: float
    warmup_steps: int | float
    decay_steps: int
    total_steps: int
    milestones: tuple[int, ...] = ()
    decay_rate: float = 0.9

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise UserError(f"unknown scheduler '{self.name}': choose one of {', '.join(SCHEDULES)}")
        if not (0 <= self.start < math.inf and 0 <= self.end < math.inf):
            raise UserError(f"the learning rate goes from {self.start} to {self.end}; both must be 0 or more")
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise UserError(f"warmup_steps {self.warmup_steps}, decay_steps {self.decay_steps}: both must be 0 or more")
        if self.name == MULTI_STEP:
            self._check_milestones()
        if 0 < self.warmup_steps < 1:
            object.__setattr__(self, "warmup_steps", max(1, round(self.warmup_steps * self.total_steps)))

    def _check_milestones(self) -> None:
        if not self.milestones or min(self.milestones) < 1 or list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(
                f"the scheduler {MULTI_STEP} needs rising milestones, e.g. --milestones 200 400 800, "
                f"not {list(self.milestones)}"
            )
        if not 0 < self.decay_rate < math.inf:
            raise UserError(f"decay_rate is {self.decay_rate}; it must be above 0, and below 1 for a rate that falls")

    def __call__(self, step: int) -> float:
        """The rate of step number ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.start * (step + 1) / self.warmup_steps
        step -= self.warmup_steps
        if self.name == MULTI_STEP:
            return self.start * self.decay_rate ** bisect.bisect_right(self.milestones, step)
        decay_steps = self.decay_steps or self.total_steps - self.warmup_steps
        done = min(step / max(decay_steps - 1, 1), 1.0)
        return self.end + (self.start - self.end) * SCHEDULES[self.name](done)

    def warn(self) -> None:
        """Warn of a run that ends before its warm-up, or whose rate is 0 in every step."""
        highest = max((self(step) for step in range(self.total_steps)), default=0.0)
        if not highest:
            log.warning("the learning rate is 0 in every step, so nothing is learnt: raise start_learning_rate")
        elif self.total_steps < self.warmup_steps:
            log.warning(
                "the warm-up takes %d steps, the run has %d: the learning rate reaches %.3g, never its %.3g; set "
                "--warmup_steps 0, or a share of the run such as --warmup_steps 0.1",
                *(self.warmup_steps, self.total_steps, highest, self.start),
            )


def tell_changes(options: Mapping[str, Any], path: Path) -> None:
    """One line where a resumed run has another learning rate or length than the options that were saved in `path`."""
    then = read_yaml(path, interpolate=False) if path.is_file() else {}
    changed = [name for name in _PLAN if name in then and name in options and then[name] != options[name]]
    if changed:
        told = ", ".join(f"{name} was {escaped(then[name])} and is now {options[name]}" for name in changed)
        log.warning("the run goes on with another plan, so it ends otherwise than it would have: %s", told)
