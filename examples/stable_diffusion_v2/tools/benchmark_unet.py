"""The full-size UNet and decoder of SD 2.x beside diffusers', float32 on a CPU: time, memory, agreement, in one run.

Two processes hold the same random weights and take turns, so that a busy machine slows both. Read the ratios: first the
CPU time of one thread, then the time on the clock of all cores. The last lines are a table in Markdown.

    python tools/benchmark_unet.py [--runs 3] [--size 64] [--batch 2] [--works UNet decoder] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).resolve().parents[1]
UNET, HALF, DECODER = WORKS = ("UNet", "UNet in bfloat16", "decoder")
SETS = ("avx512f", "avx512_bf16", "amx_bf16", "avx2", "asimd")  # instruction sets that decide the speed
HEAD = (
    "| work | measured | ours | diffusers | ours / diffusers | peak memory | first call | relative rms difference |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


class Answer(NamedTuple):
    """Of one call; `seconds`: on the clock, of the CPU."""

    output: np.ndarray
    seconds: tuple[float, float]
    peak: float  # GiB


class Work(NamedTuple):
    """What is measured: a network at a size, with so many threads on each side."""

    network: str
    size: int
    batch: int
    threads: int

    def inputs(self) -> list[np.ndarray]:
        """z [B, 4, size, size]; of the UNet also t [B] and context [B, 77, 1024]."""
        rng = np.random.default_rng(0)
        if self.network == DECODER:
            return [rng.standard_normal((1, 4, self.size, self.size), np.float32)]
        z = rng.standard_normal((self.batch, 4, self.size, self.size), np.float32)
        return [z, np.full(self.batch, 500, np.int32), rng.standard_normal((self.batch, 77, 1024), np.float32)]

    def title(self) -> str:
        batch = "" if self.network == DECODER else f", batch {self.batch}"
        return f"SD 2.x {self.network}{batch}, {self.size}×{self.size} latents"


def serve(pipe, forward: Callable[[], np.ndarray]) -> None:
    """Answer each request by one call."""
    while pipe.recv():
        began = time.perf_counter(), time.process_time()
        output = forward()
        seconds = time.perf_counter() - began[0], time.process_time() - began[1]
        pipe.send(Answer(output, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def diffusers_worker(pipe, weights: Path, work: Work) -> None:
    import diffusers
    import torch

    from ldm import checkpoint
    from ldm.checkpoint.names import from_diffusers

    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    if work.network != DECODER:
        heads = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        net = diffusers.UNet2DConditionModel(cross_attention_dim=1024, **heads).eval()
    else:
        widths, kinds = (128, 256, 512, 512), {"down_block_types": ["DownEncoderBlock2D"] * 4}
        kinds |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4}
        net = diffusers.AutoencoderKL(block_out_channels=widths, **kinds).eval()
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    states = ({}, state) if work.network == DECODER else (state, {})
    checkpoint.save(weights, from_diffusers(*states, {}, "openclip"), {}, "safetensors")
    arrays = [torch.from_numpy(array) for array in work.inputs()]
    pipe.send(f"diffusers {diffusers.__version__}, PyTorch {torch.__version__}")
    call = net.decode if work.network == DECODER else net
    if work.network == HALF:
        net.to(torch.bfloat16)
        arrays = [each.to(torch.bfloat16) if each.is_floating_point() else each for each in arrays]

    def forward() -> np.ndarray:
        with torch.no_grad():
            return call(*arrays).sample.float().numpy()

    serve(pipe, forward)


def our_worker(pipe, weights: Path, work: Work) -> None:
    from ldm import runtime

    runtime.start("CPU")
    import mindspore
    from mindspore import Tensor

    from ldm import checkpoint, kernels, parts
    from ldm.config.model import load_model_config
    from ldm.networks.layers import fill
    from ldm.networks.unet import UNet
    from ldm.networks.vae import AutoencoderKL

    config = load_model_config(HERE / "configs" / "v2-inference.yaml")
    decodes = work.network == DECODER
    net, prefix = (AutoencoderKL(config.vae), parts.VAE) if decodes else (UNet(config.unet), parts.UNET)
    net.set_train(False)
    runtime.set_compute_dtype(net, "bfloat16" if work.network == HALF else "float32")
    tensors = checkpoint.load(weights).tensors
    for name, parameter in net.parameters_and_names():
        fill(parameter, tensors[prefix + name])
    del tensors
    arrays = [Tensor(array) for array in work.inputs()]
    how = "native kernels" if kernels.select() is kernels.NATIVE else "no native kernels"
    pipe.send(f"this project, MindSpore {mindspore.__version__}, {how}")
    serve(pipe, lambda: net(*arrays).asnumpy())


def measure(work: Work, runs: int) -> tuple[list[str], list[list[Answer]]]:
    """The titles of both sides and their answers, diffusers' first; the first answer of each is not to be counted."""
    context = get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(work.threads)  # of both processes
    titles, pipes, processes, answers = [], [], [], ([], [])
    with tempfile.TemporaryDirectory() as folder:
        for worker in (diffusers_worker, our_worker):
            here, there = context.Pipe()
            process = context.Process(target=worker, args=(there, Path(folder) / "net.safetensors", work), daemon=True)
            process.start()
            there.close()  # otherwise the end of a worker is not noticed
            titles.append(here.recv())
            pipes.append(here)
            processes.append(process)
        for _ in range(runs + 1):
            for pipe, answered in zip(pipes, answers):
                pipe.send(True)
                answered.append(pipe.recv())
        for pipe, process in zip(pipes, processes):
            pipe.send(False)
            process.join()
    return titles, list(answers)


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


def machine() -> str:
    """The processor and those of its instruction sets that matter here."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split("\t:", 1) for line in reversed(info.splitlines()) if "\t:" in line)
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    has = [name for name in SETS if name in (lines.get("flags") or lines.get("Features", "")).split()]
    name = lines.get("model name", platform.processor() or platform.machine())
    return f"{os.cpu_count()} cores, {name} ({', '.join(has)}), Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each, after one that is not counted")
    parser.add_argument("--size", type=int, default=64, help="side of the latents: 64 for 512 pixels, 96 for 768")
    parser.add_argument("--batch", type=int, default=2, help="of the UNet")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    args = parser.parse_args()

    works = [Work(network, args.size, args.batch, n) for network in args.works for n in args.threads]
    rows = []
    for work in works:
        titles, answers = measure(work, args.runs)
        rows.append(row(work, *answers))
        print(rows[-1], flush=True)
    print(f"\n{machine()}; {titles[1]}; {titles[0]}; float32, medians of {args.runs} pairs\n\n{HEAD}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
