"""The log of a run: ``result.log``, a table of tab-separated values, and the loss curve as a picture."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.files import replacing
from ldm.plot import Plot, ticks

log = logging.getLogger(__name__)


class ResultLog:
    """A table that grows by one line per step; ``write`` hands each line to the system at once.

    Args:
        path: the file.
        columns: their names; the first is "step".
        last_step: the step after which a resumed run goes on: later lines are cut off. 0 begins a new table.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], last_step: int = 0):
        assert columns[0] == "step"
        self.path, self.columns = path, tuple(columns)
        old = read_log(path) if last_step and Path(path).exists() else {}
        steps = old.get("step", np.zeros(0))
        nothing = np.full(len(steps), np.nan)
        kept = [old.get(column, nothing)[steps <= last_step] for column in self.columns]
        self.numbers = [array("d", column) for column in kept]
        with replacing(path) as file:
            file.write("".join(map(_line, (self.columns, *zip(*kept)))).encode())
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.failed = False

    def write(self, **values: float) -> None:
        """Add a line: one value for every column. If the disk refuses, one warning says so and the run goes on: there
        may be room again before the next checkpoint."""
        row = [values.pop(column) for column in self.columns]
        assert not values, f"no columns for {list(values)}"
        line = _line(row)
        for column, value in zip(self.numbers, row):
            column.append(value)
        try:
            self.file.write(line)
        except OSError as error:
            if not self.failed:
                log.warning(
                    "cannot write %s: %s; make room, or the next checkpoint cannot be written",
                    self.path,
                    error.strerror,
                )
            self.failed = True

    def table(self) -> dict[str, np.ndarray]:
        """The columns by name, float64, without reading the file."""
        return {name: np.array(column) for name, column in zip(self.columns, self.numbers)}


def read_log(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of a table by name, float64; lines that a crash has cut short are left out.

    Raises:
        UserError: the file cannot be read or is no such table.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        columns = lines[0].split("\t")
        rows = [line.split("\t") for line in lines[1:-1]]  # after the last newline comes nothing, or half a line
        table = np.array([row for row in rows if len(row) == len(columns)], np.float64).reshape(-1, len(columns))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the log {path}: {error}; move it out of the way") from None
    return dict(zip(columns, table.T))


def _line(values: Sequence) -> str:
    return "\t".join(v if isinstance(v, str) else f"{v:.7g}" for v in values) + "\n"


# ---- the loss curve ----

_POINTS = 2000  # at most in a curve; more than it has pixels
_RAW, _SMOOTH, _RATE = "#bcd6f2", "#1f63b5", "#e08a2e"


def loss_curve(path: str | Path, log: dict[str, np.ndarray]) -> None:
    """Draw the loss over the steps, faint for each step and strong when smoothed, and the learning rate behind it.

    In a long run, neighbouring steps form groups. The strong line goes through their means, the faint line through
    their lowest and highest losses. So the time to draw does not grow with the run.

    Args:
        path: of the PNG; replaced as a whole.
        log: columns step, loss and learning_rate, as ``read_log`` gives them.
    """
    fine = np.isfinite(log["loss"])
    step, loss, rate = (log[column][fine] for column in ("step", "loss", "learning_rate"))
    if not len(step):
        return
    groups = np.linspace(0, len(step), min(len(step), _POINTS) + 1).astype(int)[:-1]  # where each begins
    means = [np.add.reduceat(x, groups) / np.diff([*groups, len(x)]) for x in (step, loss, rate)]
    centre, smooth, rate = means[0], _smoothed(means[1]), means[2]
    low, high = np.percentile(loss, [0.5, 99.5])
    low, high = min(low, smooth.min()), max(high, smooth.max())
    pad = 0.06 * (high - low) or abs(high) / 2 or 1.0
    plot = Plot(step[0], max(step[-1], step[0] + 1), max(low - pad, 0.0) if low >= 0 else low - pad, high + pad)
    marks = np.unique(np.round(ticks(plot.first, plot.last, 8)))
    shares = {plot.low + 0.94 * share * plot.height: f"{share * rate.max():.2g}" for share in (0, 0.5, 1)}
    plot.axes({x: f"{x:.10g}" for x in marks}, "step", shares, _RATE)
    plot.curve(centre, rate / (rate.max() or 1) * plot.height * 0.94 + plot.low, _RATE, 1.5)
    ends = np.stack([np.minimum.reduceat(loss, groups), np.maximum.reduceat(loss, groups)], -1)
    short = len(groups) == len(step)
    plot.curve(centre if short else centre.repeat(2), loss if short else ends.reshape(-1), _RAW, 1)
    plot.curve(centre, smooth, _SMOOTH, 3)
    names = {_RAW: "loss", _SMOOTH: f"smoothed, last {smooth[-1]:.4g}", _RATE: "learning rate (right)"}
    plot.legend("Training loss", names)
    plot.save(path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Gaussian mean over about a fortieth of all steps; at the ends, over the steps that exist."""
    sigma = max(len(values) / 80, 1.5)
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-((reach / sigma) ** 2) / 2)
    inside = slice(len(kernel) // 2, len(kernel) // 2 + len(values))
    return np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]
