"""The main job in small: fine-tune the embedded model to a new style, and draw before and after.

    python tools/demo.py [--output_path output/demo] [option of train_text_to_image.py ...]

It runs the project's own commands and prints them. The result is OUTPUT/before_after.png. For each of some held-out
concepts it shows the real picture, the picture before and after the fine-tuning, and the caption.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.data.captions import read_captions
from ldm.data.images import load_image
from ldm.pictures import captioned_rows, save_png

HERE = Path(__file__).resolve().parents[1]

CONFIG = "configs/train/train_config_tiny_openmoji_vpred.yaml"
TEST = HERE / "datasets/emoji/openmoji/test"
SHOWN = ("banana", "tomato", "cactus", "mouse-face", "house", "broken-heart", "tropical-fish", "neutral-face")


def run(*words: str) -> None:
    """Print and run a command; exit where it fails."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    if subprocess.run([sys.executable, *words], cwd=HERE).returncode:
        sys.exit(f"error: {words[0]} failed; its message is above")


def draw(checkpoint: str, prompts: Path, output: Path, *more: str) -> np.ndarray:
    """One picture per prompt, uint8 [N, H, W, 3]; `more`: further words of the command."""
    first = len(list((output / "samples").glob("*.png")))
    words = f"--n_iter 1 --n_samples 1 --batch_size {len(SHOWN)} --seed 1".split()
    words += ["--ckpt_path", checkpoint, "--data_path", str(prompts), "--output_path", str(output), *more]
    run("text_to_image.py", *words)
    return np.stack([np.asarray(Image.open(path)) for path in sorted((output / "samples").glob("*.png"))[first:]])


def unused(folder: Path) -> Path:
    """The folder, or where it exists the first folder with a number behind its name that does not."""
    names = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in count(1))
    return next(path for path in names if not path.exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_path", default="output/demo")
    args, train_options = parser.parse_known_args()
    output = (HERE / args.output_path).resolve()
    began = time.monotonic()

    samples = {Path(sample.path).stem: sample for sample in read_captions(TEST)}
    chosen = [samples[name] for name in SHOWN]
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "prompts.txt"
    prompts.write_text("".join(f"{sample.text}\n" for sample in chosen), encoding="utf-8")

    before = draw("models/tiny-vpred.safetensors", prompts, output / "before")
    trained = unused(output / "train")
    run("train_text_to_image.py", "--train_config", CONFIG, "--output_path", str(trained), *train_options)
    newest = max((trained / "ckpt/rank_0").glob("sd-*"), key=lambda path: path.stat().st_mtime)
    after = draw(str(newest), prompts, output / "after")

    real = np.stack([load_image(sample.path, before.shape[1]) for sample in chosen])
    columns = {"real": real, "before": before, "after": after}
    picture = output / "before_after.png"
    save_png(captioned_rows(columns, [sample.text for sample in chosen], scale=2), picture)
    print(f"\nBefore and after, side by side: {picture}   ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
