"""A process of test_ranks.py: steps of a small network on two ranks, each with its half of every batch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import test_train_parts as parts
from mindspore import Tensor

from ldm import runtime
from ldm.train.state import save_state
from ldm.train.step import _SumOfRanks

STEPS = 20


def micro_batches(step: int, rank: int) -> list:
    """Two of the four pairs of samples of a step."""
    x, y = (array.asnumpy() for array in parts.batch(step, 8))
    return [(Tensor(x[i : i + 2]), Tensor(y[i : i + 2])) for i in (2 * rank, 2 * rank + 4)]


def main() -> None:
    ranks = runtime.join(True)
    runtime.connect_devices(ranks, runtime.start("CPU", 0, ranks))
    shapes = [(i % 7 + 1, 3, i % 5 + 1) for i in range(60)]
    tensors = [Tensor(np.full(shape, i * (ranks.rank + 1), np.float32)) for i, shape in enumerate(shapes)]
    for i, total in enumerate(_SumOfRanks()(*tensors)):  # each with its own counterpart, however many are under way
        assert (total.asnumpy() == 3 * i).all(), i
    train_step = parts.make(ranks=ranks)
    for step in range(STEPS):
        train_step(micro_batches(step, ranks.rank), 1e-2 / (1 + step), step)
    save_state(Path(sys.argv[1]) / f"{ranks.rank}.safetensors", train_step, {}, {})


if __name__ == "__main__":
    runtime.run(main, communicates=True)
