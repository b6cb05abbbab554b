"""The full-size SD 2.x UNet (866 million parameters) beside diffusers': time, memory and agreement, in one run.

Two processes hold the same random weights and take turns, so that a busy machine slows both. Read the ratio.

    python tools/benchmark_unet.py [--runs 5] [--size 64] [--batch 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).resolve().parents[1]


def inputs(batch: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z [B, 4, size, size], t [B], context [B, 77, 1024]."""
    rng = np.random.default_rng(0)
    z, context = rng.standard_normal((batch, 4, size, size)), rng.standard_normal((batch, 77, 1024))
    return z.astype(np.float32), np.full(batch, 500, np.int32), context.astype(np.float32)


def serve(pipe, forward) -> None:
    """Answer each request with (output, seconds of this call, peak resident memory in GiB)."""
    while pipe.recv():
        began = time.perf_counter()
        output = forward()
        seconds = time.perf_counter() - began
        pipe.send((output, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def diffusers_worker(pipe, weights: Path, batch: int, size: int) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ).eval()
    from ldm import checkpoint
    from ldm.checkpoint.names import from_diffusers

    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    checkpoint.save(weights, from_diffusers(state, {}, {}, "openclip"), {}, "safetensors")
    arrays = [torch.from_numpy(array) for array in inputs(batch, size)]
    pipe.send(f"diffusers, PyTorch {torch.__version__}")

    def forward() -> np.ndarray:
        with torch.no_grad():
            return net(*arrays).sample.numpy()

    serve(pipe, forward)


def our_worker(pipe, weights: Path, batch: int, size: int) -> None:
    from ldm import runtime

    runtime.start("CPU")
    import mindspore
    from mindspore import Tensor

    from ldm import checkpoint, kernels
    from ldm.config.model import load_model_config
    from ldm.networks.layers import fill
    from ldm.networks.unet import UNet
    from ldm.parts import UNET

    net = UNet(load_model_config(HERE / "configs" / "v2-inference.yaml").unet)
    tensors = checkpoint.load(weights).tensors
    for name, parameter in net.parameters_and_names():
        fill(parameter, tensors[UNET + name])
    del tensors
    arrays = [Tensor(array) for array in inputs(batch, size)]
    how = "native kernels" if kernels.select() is kernels.NATIVE else "no native kernels"
    pipe.send(f"this project, MindSpore {mindspore.__version__}, {how}")
    serve(pipe, lambda: net(*arrays).asnumpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each, after one that is not counted")
    parser.add_argument("--size", type=int, default=64, help="side of the latents: 64 for 512 pixels, 96 for 768")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()

    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for worker in (diffusers_worker, our_worker):
            here, there = context.Pipe()
            process = context.Process(
                target=worker, args=(there, Path(folder) / "unet.safetensors", args.batch, args.size), daemon=True
            )
            process.start()
            there.close()  # otherwise the end of a worker is not noticed
            sides.append((here.recv(), here, []))
        for _ in range(args.runs + 1):
            for _, pipe, answers in sides:
                pipe.send(True)
                answers.append(pipe.recv())

    for _, pipe, _ in sides:
        pipe.send(False)

    print(f"SD 2.x UNet forward, float32, batch {args.batch}, {args.size}x{args.size} latents, {args.runs} runs each")
    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    for title, _, answers in sides:
        first, *rest = (answer[1] for answer in answers)
        print(f"  {title}: median {np.median(rest):.2f} s (min {min(rest):.2f}, max {max(rest):.2f}),", end=" ")
        print(f"first call {first:.1f} s, peak memory {answers[-1][2]:.1f} GiB")
    theirs, ours = (np.array([answer[1] for answer in answers[1:]]) for _, _, answers in sides)
    wanted, got = sides[0][2][-1][0], sides[1][2][-1][0]
    error = np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))
    print(f"  ours / theirs, pair by pair: median {np.median(ours / theirs):.2f}; relative rms difference {error:.1e}")


if __name__ == "__main__":
    main()
