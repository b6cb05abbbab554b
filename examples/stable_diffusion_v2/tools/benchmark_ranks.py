"""The time of a training step with one rank and with several, and the share of communication.

    python tools/benchmark_ranks.py --config configs/tiny-vpred.yaml --batch 16 --size 16
    python tools/benchmark_ranks.py --width 192 --batch 2 --size 16

Each number of ranks has a launch of its own and makes the same steps with the same samples: random weights, latents and
features, UNet alone, AdamW. A step's seconds are divided into the gradients (forward and backward), the wait for the
other ranks (over the hub, until the last rank has its gradients), the sum of the gradients over the ranks, and the rest
(norm, clipping, update). On a CPU the ranks share the cores; on Ascend each has a device.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ldm import runtime
from ldm.config.model import add_set, changed, load_model_config
from ldm.config.options import Parser, read_options, require_at_least, str2bool
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.errors import UserError
from ldm.networks.layers import initialize
from ldm.networks.unet import UNet
from ldm.parallel.hub import DEFAULT_PORT
from ldm.train.optimizer import build_optimizer
from ldm.train.step import TrainStep
from tools.benchmark_sampling import FULL_WIDTH, small_config

HERE = Path(__file__).resolve().parents[1]

NOT_COUNTED = 2  # steps: the first compiles, the second still fills buffers


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", help="the model's YAML file; without it SD 2.x of --width")
    add_set(add)
    add("--width", type=int, default=FULL_WIDTH, help="channels of the UNet's first level")
    add("--size", type=int, default=16, help="side of the latents")
    add("--batch", type=int, default=16, help="samples of a step, of all ranks together")
    add("--steps", type=int, default=10, help="timed steps")
    add("--ranks", type=int, nargs="+", default=[1, 2])
    add("--launcher", choices=("mpirun", "msrun"), default="msrun")
    add("--port", type=int, default=DEFAULT_PORT, help="port of the launcher")
    add("--device_target", choices=runtime.DEVICES, help="default: Ascend where there is one, else CPU")
    add("--use_parallel", type=str2bool, default=False, help="the launcher sets it")
    return parser


class Stopwatch:
    """The seconds of each part of a step."""

    def __init__(self):
        self.seconds = Counter()

    def around(self, part: str, function: Callable) -> Callable:
        """The function, whose time is added to the seconds of `part`."""

        def timed(*args, **words):
            began = time.perf_counter()
            result = function(*args, **words)
            runtime.ms.runtime.synchronize()  # a device may run ahead
            self.seconds[part] += time.perf_counter() - began
            return result

        return timed


def time_steps(args) -> None:
    """Make and time the steps of one rank; rank 0 prints."""
    ranks = runtime.join(args.use_parallel)
    runtime.connect_devices(ranks, runtime.start(args.device_target, ranks=ranks))
    if args.batch % ranks.size:
        raise UserError(f"{args.batch} samples do not divide among {ranks.size} ranks")
    config = changed(load_model_config(args.config) if args.config else small_config(args.width), args.set)
    net = UNet(config.unet)
    initialize(net, 0)
    schedule, prediction = build_schedule(config.schedule), get_prediction(config.prediction_type)
    loss = DiffusionLoss(net, schedule, prediction)
    trained = list(net.get_parameters())
    step = TrainStep(loss, build_optimizer("adamw", trained, (0.9, 0.999), weight_decay=0.0), ranks=ranks)

    rng = np.random.default_rng(0)
    shape = args.batch, config.unet.in_channels, args.size, args.size
    latents, eps = (rng.standard_normal(shape, np.float32) for _ in range(2))
    features = rng.standard_normal((args.batch, config.text.context_length, config.unet.context_dim), np.float32)
    times, weight = rng.integers(0, len(schedule), args.batch).astype(np.int32), np.ones(args.batch, np.float32)
    batch = [tuple(runtime.ms.Tensor(ranks.share(array)) for array in (latents, eps, times, weight, features))]

    watch, rows = Stopwatch(), []
    step.gradients = watch.around("gradients", step.gradients)
    ranks.gather = watch.around("wait for the others", ranks.gather)
    if step.sum_of_ranks:
        step.sum_of_ranks = watch.around("sum over the ranks", step.sum_of_ranks)
    for number in range(NOT_COUNTED + args.steps):
        watch.seconds.clear()
        began = time.perf_counter()
        result = step(batch, 1e-5, number)
        rows.append({"step": time.perf_counter() - began, **watch.seconds})
    if ranks.is_main:
        weights = sum(parameter.size for parameter in trained)
        report(ranks.size, weights, rows[NOT_COUNTED:], result.loss)


def report(size: int, weights: int, rows: list[dict[str, float]], loss: float) -> None:
    parts = {part: np.median([row[part] for row in rows]) for part in rows[0]}
    whole = parts.pop("step")
    parts["rest"] = whole - sum(parts.values())
    divided = ", ".join(f"{part} {seconds:.3f} s ({seconds / whole:.0%})" for part, seconds in parts.items())
    print(f"{size} rank(s), {weights / 1e6:.1f} M weights, median of {len(rows)} steps: {whole:.3f} s", flush=True)
    print(f"  rank 0: {divided}; loss of the last {loss:.6f}", flush=True)


def launch_each(args) -> None:
    """Launch this script once for each number of ranks."""
    print(f"{os.cpu_count()} cores, {args.batch} samples a step, latents of {args.size} x {args.size}", flush=True)
    for count in args.ranks:
        command = [sys.executable, "-m", "ldm.parallel.launch", "tools/benchmark_ranks.py"]
        command += ["--launcher", args.launcher, "--port", str(args.port)]
        if args.device_target:
            command += ["--device", args.device_target]
        words = [*command, "--ranks", str(count), "--", *sys.argv[1:]]
        if subprocess.run(words, cwd=HERE).returncode:
            raise UserError(f"the launch with {count} ranks failed; its message is above")


def main() -> None:
    args = read_options(build_parser())
    require_at_least(1, args, "width", "size", "batch", "steps")
    if args.use_parallel:
        time_steps(args)
    else:
        launch_each(args)


if __name__ == "__main__":
    runtime.run(main, communicates=True)
