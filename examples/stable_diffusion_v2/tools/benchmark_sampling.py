"""text_to_image.py beside diffusers' pipeline, float32 on a CPU: time to the first step, peak memory of the whole run.

Both draw one picture from the same diffusers folder with random weights, one after the other, each in a process of its
own. The time begins with the process and includes imports, loading and compilation.
python tools/benchmark_sampling.py [--model xl] [--sizes 512 768] [--steps 3] [--width 64] [--sides ours diffusers]
"""

from __future__ import annotations

import argparse
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).resolve().parents[1]
PROMPT, GUIDANCE = "a drawing of a fox with a red tail", 7.5
FULL_WIDTH = 320  # channels of SD's UNet at its first level
MODELS = {"2.1-v": "configs/v2-vpred-inference.yaml", "xl": "configs/sdxl-vpred-inference.yaml"}


def small_config(model: str, width: int):
    """A model with v-prediction and all widths scaled down, so that the UNet begins with `width` channels."""
    from ldm.config.model import GROUPS, load_model_config

    config = load_model_config(HERE / MODELS[model])
    if width == FULL_WIDTH:
        return config

    def shrunk(full: int, unit: int) -> int:
        return max(unit, round(full * width / FULL_WIDTH / unit) * unit)

    def narrow(text):
        width = shrunk(text.width, 64)
        return replace(text, width=width, heads=width // 64, projection=width if text.projection else None)

    texts = [narrow(text) for text in config.texts]
    pooled, sizes = texts[-1].projection, config.size_numbers
    unet = replace(config.unet, model_channels=width, context_dim=sum(text.width for text in texts))
    if sizes:
        unet = replace(unet, adm_in_channels=pooled + sizes * unet.size_channels)
    vae = replace(config.vae, ch=shrunk(config.vae.ch, GROUPS))
    return replace(config, unet=unet, vae=vae, **dict(zip(("text", "text_2"), texts)))


def write_model(folder: Path, model: str, width: int, dtype: str) -> None:
    """Write the diffusers folder and, beside it, our config of the same model."""
    from ldm import runtime

    runtime.start("CPU")
    from ldm import checkpoint
    from ldm.config.model import save_model_config
    from ldm.model import StableDiffusion
    from ldm.networks.layers import initialize
    from ldm.weights import words_of

    config = small_config(model, width)
    networks = StableDiffusion(config)
    initialize(networks, 0)
    save_model_config(config, folder / "model.yaml")
    checkpoint.save(folder / "model", networks.tensors(), words_of(config), "diffusers", dtype)


@contextmanager
def made_model(model: str, width: int, dtype: str) -> Iterator[Path]:
    """A folder with what `write_model` writes. Another process makes it, and takes its memory with it."""
    with tempfile.TemporaryDirectory() as name:
        words = ["--model", model, "--width", str(width), "--stored", dtype]
        subprocess.run([sys.executable, __file__, "--make", name, *words], check=True)
        yield Path(name)


def draw_with_diffusers(folder: Path, size: int, steps: int) -> None:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()  # the "5/5" of the loading bar could be taken for a step
    pipe = DiffusionPipeline.from_pretrained(folder / "model")
    pipe(PROMPT, height=size, width=size, num_inference_steps=steps, guidance_scale=GUIDANCE)


class Run(NamedTuple):
    """What a command took."""

    first_step: float  # seconds
    per_step: float
    whole: float
    peak: float  # GiB


def time_command(command: list[str], steps: int) -> Run:
    """Run a command that shows its steps in a progress bar; exits with its last words where it fails."""
    began, seen, text, peak = time.perf_counter(), {}, "", 0.0
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=HERE)
    ended = False
    while not ended:
        peak = max(peak, peak_memory(process.pid))
        if select.select([process.stderr], [], [], 0.05)[0]:
            part = os.read(process.stderr.fileno(), 4096)
            text, ended = text + part.decode(errors="replace"), not part
            for step in re.findall(rf"\b(\d+)/{steps} \[", text):
                seen.setdefault(int(step), time.perf_counter() - began)
    if process.wait() or not {1, steps} <= seen.keys():
        sys.exit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    per_step = (seen[steps] - seen[1]) / max(1, steps - 1)
    return Run(seen[1], per_step, time.perf_counter() - began, peak)


def peak_memory(pid: int) -> float:
    """The most resident memory of a process so far, in GiB.

    wait4 would include the memory of the parent, which a child shares until it becomes another program.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # the line is missing when the process has ended
    return int(found[1]) / 2**20 if found else 0.0


def commands(folder: Path, size: int, steps: int) -> dict[str, list[str]]:
    """Side -> the command line that draws with it."""
    ours = [sys.executable, "text_to_image.py", "--config", str(folder / "model.yaml"), "--ckpt_path"]
    ours += [str(folder / "model"), "--output_path", str(folder / "output"), "--prompt", PROMPT, "--n_iter", "1"]
    ours += ["--n_samples", "1", "--H", str(size), "--W", str(size), "--sampling_steps", str(steps)]
    ours += ["--scale", str(GUIDANCE), "--device_target", "CPU"]
    theirs = [sys.executable, __file__, "--draw", str(folder), "--sizes", str(size), "--steps", str(steps)]
    return {"ours": ours, "diffusers": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768], help="sides of the pictures in pixels")
    parser.add_argument("--steps", type=int, default=3, help="sampling steps of each run")
    parser.add_argument(
        "--width", type=int, default=FULL_WIDTH, help="channels of the UNet's first level: less is small"
    )
    parser.add_argument("--sides", nargs="+", choices=("ours", "diffusers"), default=["diffusers", "ours"])
    parser.add_argument("--model", choices=list(MODELS), default="2.1-v", help="which kind of model")
    parser.add_argument("--stored", choices=("float32", "float16"), default="float32", help="the files' number type")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        write_model(Path(args.make), args.model, args.width, args.stored)
    elif args.draw:
        draw_with_diffusers(Path(args.draw), args.sizes[0], args.steps)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Make the model, run both sides at each size, print a line for each."""
    with made_model(args.model, args.width, args.stored) as folder:
        kind = f"SD {args.model} at width {args.width}, computed in float32, stored in {args.stored}"
        print(f"{kind}, {os.cpu_count()} cores, one picture, {args.steps} steps")
        for size in args.sizes:
            for side in args.sides:
                run = time_command(commands(folder, size, args.steps)[side], args.steps)
                steps = f"first step after {run.first_step:.1f} s, {run.per_step:.2f} s per step"
                whole = f"whole run {run.whole:.1f} s, peak memory {run.peak:.2f} GiB"
                print(f"  {size}x{size} {side:9}: {steps}, {whole}", flush=True)


if __name__ == "__main__":
    main()
