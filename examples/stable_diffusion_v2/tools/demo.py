"""The main job in small: what the embedded model draws, then its fine-tuning to a new style, before and after.

    python tools/demo.py [--output_path output/demo] [option of train_text_to_image.py ...]

It runs the project's own commands and prints them. OUTPUT/index.html shows what came out: base.png, ten concepts in the
model's own three styles; before_after.png, concepts as OpenMoji draws them, before and after the fine-tuning, half of
them held out of it; the last column is drawn by a student of four steps (docs/distillation.md).
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

from ldm.data.captions import Sample, read_captions
from ldm.data.images import load_image
from ldm.files import replacing
from ldm.pictures import captioned_rows, save_png
from tools.demo_page import page

HERE = Path(__file__).resolve().parents[1]

CONFIG = "configs/train/train_config_tiny_openmoji_vpred.yaml"
EMOJI = HERE / "datasets/emoji"
TEST = EMOJI / "openmoji/test"
BASE, STUDENT = "models/tiny-vpred.safetensors", "models/tiny-4step.safetensors"
STYLES = ("noto", "twemoji", "fluent")
BEST = ("fox", "octopus", "tomato", "frog", "rocket", "lady-beetle", "robot", "penguin", "mushroom", "teapot")
LEARNT = ("fox", "octopus", "hamburger", "rocket")
SHOWN = ("banana", "tomato", "cactus", "mouse-face", "house", "broken-heart", "tropical-fish", "neutral-face")
HELD_OUT = SHOWN[:2] + SHOWN[3:5]


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


def captions(folder: Path) -> dict[str, Sample]:
    """The samples of a folder by the names of their pictures."""
    return {Path(sample.path).stem: sample for sample in read_captions(folder)}


def draw_texts(checkpoint: str, texts: list[str], output: Path) -> np.ndarray:
    """`draw` for prompts that are not in a file yet."""
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "prompts.txt"
    prompts.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return draw(checkpoint, prompts, output)


def draw_best(output: Path) -> None:
    """Draw the base's own styles, as OUTPUT/base.png."""
    of_styles = [captions(EMOJI / style / "train") for style in STYLES]
    pictures = draw_texts(BASE, [found[name].text for name in BEST for found in of_styles], output / "base")
    columns = {name.replace("-", " "): part for name, part in zip(BEST, np.split(pictures, len(BEST)))}
    save_png(captioned_rows(columns, [f"{style} style" for style in STYLES], scale=2), output / "base.png")


def fine_tune(output: Path, options: list[str]) -> Path:
    """Train, and return the run's folder."""
    trained = unused(output / "train")
    run("train_text_to_image.py", "--train_config", CONFIG, "--output_path", str(trained), *options)
    return trained


def newest_of(trained: Path) -> Path:
    """The last checkpoint of a run."""
    return max((trained / "ckpt/rank_0").glob("sd-*"), key=lambda path: path.stat().st_mtime)


def compare(output: Path, tuned: Path) -> None:
    """Draw before and after the fine-tuning, and by the student, as OUTPUT/before_after.png."""
    learnt, held_out = captions(EMOJI / "openmoji/train"), captions(TEST)
    chosen = [learnt[name] for name in LEARNT] + [held_out[name] for name in HELD_OUT]
    texts = [sample.text for sample in chosen]
    before = draw_texts(BASE, texts, output / "before")
    columns = {
        "real": np.stack([load_image(sample.path, before.shape[1]) for sample in chosen]),
        "before": before,
        "after": draw_texts(str(tuned), texts, output / "after"),
        "noto, 4 steps": draw_texts(STUDENT, [f"{text}, noto style" for text in texts], output / "few_steps"),
    }
    words = ["learnt"] * len(LEARNT) + ["held out"] * len(HELD_OUT)
    labels = [f"{word}: {text}" for word, text in zip(words, texts)]
    save_png(captioned_rows(columns, labels, scale=2), output / "before_after.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_path", default="output/demo")
    args, train_options = parser.parse_known_args()
    output = (HERE / args.output_path).resolve()
    began = time.monotonic()
    draw_best(output)
    trained = fine_tune(output, train_options)
    newest = newest_of(trained)
    compare(output, newest)
    with replacing(output / "index.html") as file:
        file.write(page(output, trained, CONFIG, newest).encode())
    print(f"\nWhat came out: {output / 'index.html'}   ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
