"""SD 2.x here beside diffusers on a CPU: networks, a training step, a drawing. The last lines are a Markdown table.

    python tools/benchmark.py [--works UNet bfloat16 decoder training drawing] [--runs 2] [--threads 1 2] [--avx2]

Both sides have the same random weights and take turns, so that a busy machine slows both. In training they run one
after the other, because two would need 26 GiB. Read the ratios: first the CPU time of one thread, then the time on the
clock. For a drawing, the time begins with the command and ends with the picture.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import runtime
from ldm.kernels import products
from tools import benchmark_sampling as sampling
from tools.benchmark_sides import DECODER, HALF, NETWORKS, TRAINING, Answer, Work, diffusers_worker, our_worker

DRAWING = "drawing"
WORKS = (*NETWORKS, DRAWING)
SHORT = tuple(name for name in NETWORKS if name != TRAINING)  # 9 minutes on 2 cores
SETS = ("avx512f", "avx512_bf16", "amx_bf16", "avx2", "asimd")  # instruction sets that decide the speed
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
COMPILER = """#!/bin/sh
for word; do
  shift
  [ "$word" = -march=native ] && word=-march=x86-64-v3
  set -- "$@" "$word"
done
exec g++ "$@"
"""
HEAD = (
    "| SD 2.x | measured | here | diffusers | here / diffusers | peak memory | first call | difference |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


@contextmanager
def avx2() -> Iterator[None]:
    """Both sides as on a CPU with AVX2 alone: for PyTorch's and MindSpore's libraries, and for the kernels here."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder) / "g++-avx2"
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        os.environ |= AVX2 | {"CXX": str(compiler), "XDG_CACHE_HOME": folder}
        yield


def measure(work: Work, runs: int) -> tuple[list[str], list[list[Answer]]]:
    """The titles of both sides and their answers, diffusers' first; the first answer of each is not to be counted."""
    context = get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(work.threads)  # of both processes
    titles, sides, answers = [], [], ([], [])
    with tempfile.TemporaryDirectory() as folder:

        def start(worker):
            here, there = context.Pipe()
            place = Path(folder) / "net.safetensors"
            process = context.Process(target=worker, args=(there, place, work), daemon=True)
            process.start()
            there.close()  # otherwise the end of a worker is not noticed
            titles.append(here.recv())
            return here, process

        def stop(pipe, process):
            pipe.send(False)
            process.join()

        for number, worker in enumerate((diffusers_worker, our_worker)):
            sides.append(start(worker))
            if work.network == TRAINING:
                answers[number].extend(ask(sides[-1][0]) for _ in range(runs + 1))
                stop(*sides.pop())
        for _ in range(runs + 1 if sides else 0):
            for (pipe, _), answered in zip(sides, answers):
                answered.append(ask(pipe))
        for side in sides:
            stop(*side)
    return titles, list(answers)


def ask(pipe) -> Answer:
    pipe.send(True)
    return pipe.recv()


def row(work: Work, theirs: list[Answer], ours: list[Answer]) -> str:
    """A line of the table. With one thread the CPU's seconds count, which other processes hardly change."""
    kind = int(work.threads == 1)
    times = [np.array([answer.seconds[kind] for answer in answers[1:]]) for answers in (ours, theirs)]
    ratio = float(np.median(times[0] / times[1]))
    error = np.sqrt(np.mean((ours[0].output - theirs[0].output) ** 2) / np.mean(theirs[0].output ** 2))
    measured = "CPU time, 1 thread" if kind else f"clock, {work.threads} threads"
    cells = [work.title(), measured, *(f"{np.median(each):.2f} s" for each in times), f"**{ratio:.2f}**"]
    cells.append(f"{ours[-1].peak:.1f} and {theirs[-1].peak:.1f} GiB")
    cells.append(f"{ours[0].seconds[0]:.1f} and {theirs[0].seconds[0]:.1f} s")
    return f"| {' | '.join([*cells, f'{error:.1e}'])} |"


def drawing_row(size: int, steps: int) -> str:
    """A line for a picture from the command to the file."""
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    with sampling.made_model("2.1-v", sampling.FULL_WIDTH, "float32") as folder:
        theirs, ours = (
            sampling.time_command(sampling.commands(folder, size, steps)[side], steps) for side in ("diffusers", "ours")
        )
    cells = [f"a picture of {size}×{size}, {steps} steps, guided", f"clock, {os.cpu_count()} threads, whole process"]
    cells += [f"{ours.whole:.1f} s", f"{theirs.whole:.1f} s", f"**{ours.whole / theirs.whole:.2f}**"]
    cells += [f"{ours.peak:.1f} and {theirs.peak:.1f} GiB", f"{ours.first_step:.1f} and {theirs.first_step:.1f} s", ""]
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """The processor and those of its instruction sets that matter here."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split("\t:", 1) for line in reversed(info.splitlines()) if "\t:" in line)
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    has = [name for name in SETS if name in (lines.get("flags") or lines.get("Features", "")).split()]
    name = lines.get("model name", platform.processor() or platform.machine())
    return f"{os.cpu_count()} cores, {name} ({', '.join(has)}), Python {platform.python_version()}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--works", nargs="+", choices=WORKS, default=SHORT, help="default: the networks")
    add(
        "--runs", type=int, default=2, help="timed runs of each, after one that is not counted; of the decoder one less"
    )
    add("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    add("--size", type=int, default=64, help="side of the latents: 64 for 512 pixels, 96 for 768")
    add("--batch", type=int, default=2, help="of the UNet")
    add("--steps", type=int, default=2, help="of the drawing")
    add("--avx2", action="store_true", help="both sides as on a CPU with AVX2 alone")
    return parser


def rows_of(args: argparse.Namespace) -> Iterator[str]:
    for name in args.works:
        if name == DRAWING:
            yield drawing_row(8 * args.size, args.steps)
        elif name == HALF and (args.avx2 or not products.multiplies_bfloat16()):
            print("bfloat16 is left out: this CPU does not multiply such numbers")
        else:
            for work in (Work(name, args.size, args.batch, threads) for threads in args.threads):
                titles, answers = measure(work, max(1, args.runs - (name == DECODER)))  # its runs are the longest
                yield row(work, *answers)
                print("; ".join(titles))


def main() -> None:
    args = build_parser().parse_args()
    rows = []
    with avx2() if args.avx2 else nullcontext():
        for line in rows_of(args):
            rows.append(line)
            print(line, flush=True)
    forced = ", AVX2 forced on both sides" if args.avx2 else ""
    print(f"\n{machine()}{forced}; medians of {args.runs} pairs, of the decoder {max(1, args.runs - 1)}\n\n{HEAD}")
    print("\n".join(rows))


if __name__ == "__main__":
    runtime.run(main)
