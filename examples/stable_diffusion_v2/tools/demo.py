"""The demo: what the embedded model draws, and what it draws before and after it has learnt a new style.

    python tools/demo.py [--output_path output/demo] [option of train_text_to_image.py ...]

It runs the project's own commands and prints them. The page OUTPUT/index.html shows the results. base.png has ten
concepts in the model's own three styles. before_after.png has ten concepts in four rows: as OpenMoji draws them, as the
model draws them before the fine-tuning, how the fine-tuned model redraws these pictures, and how a student draws the
concepts in four steps (docs/distillation.md). The fine-tuning has seen half of the concepts.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from itertools import count
from os.path import relpath
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
LEARNT = ("fox", "octopus", "hamburger", "rocket", "penguin")
STRENGTH = 0.5  # half of the steps: shapes stay, and lines, surfaces and colours become those of the new style
SIZE = 64
HELD_OUT = ("banana", "tomato", "mouse-face", "cactus", "broken-heart")


def run(*words: str) -> None:
    """Print and run a command; exit where it fails."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    if subprocess.run([sys.executable, *words], cwd=HERE).returncode:
        sys.exit(f"error: {words[0]} failed; its message is above")


def draw(checkpoint: str, prompts: Path, output: Path, *more: str) -> list[Path]:
    """The files of one picture per prompt; `more`: further words of the command."""
    first = len(list((output / "samples").glob("*.png")))
    words = ["--n_iter", "1", "--n_samples", "1", "--batch_size", "10", "--seed", "1"]
    words += ["--ckpt_path", checkpoint, "--data_path", str(prompts), "--output_path", str(output), *more]
    run("text_to_image.py", *words)
    return sorted((output / "samples").glob("*.png"))[first:]


def load(paths: list[Path]) -> np.ndarray:
    """The pictures of files, uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def unused(folder: Path) -> Path:
    """The folder, or where it exists the first folder with a number behind its name that does not."""
    names = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in count(1))
    return next(path for path in names if not path.exists())


def captions(folder: Path) -> dict[str, Sample]:
    """The samples of a folder by the names of their pictures."""
    return {Path(sample.path).stem: sample for sample in read_captions(folder)}


def draw_texts(checkpoint: str, texts: list[str], output: Path, *more: str) -> list[Path]:
    """`draw` for prompts that are not in a file yet."""
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "prompts.txt"
    prompts.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return draw(checkpoint, prompts, output, *more)


def draw_best(output: Path) -> None:
    """Draw the base's own styles, as OUTPUT/base.png."""
    of_styles = [captions(EMOJI / style / "train") for style in STYLES]
    pictures = load(draw_texts(BASE, [found[name].text for name in BEST for found in of_styles], output / "base"))
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
    names, samples = LEARNT + HELD_OUT, {**captions(EMOJI / "openmoji/train"), **captions(TEST)}
    of_styles = (captions(EMOJI / style / "train") for style in ("fluent", "noto"))
    fluent, noto = ([found[name].text for name in names] for found in of_styles)
    before = draw_texts(BASE, fluent, output / "before")
    starts = [f"init_image={relpath(path, HERE)} strength={STRENGTH}" for path in before]
    texts = [f"{samples[name].text} | {start}" for name, start in zip(names, starts)]
    rows = {
        "OpenMoji's pictures": np.stack([load_image(samples[name].path, SIZE) for name in names]),
        "before: fluent style": load(before),
        "after, from the picture above": load(draw_texts(str(tuned), texts, output / "after", "--batch_size", "1")),
        "noto style, in 4 steps": load(draw_texts(STUDENT, noto, output / "few_steps")),
    }
    words = ["learnt"] * len(LEARNT) + ["held out"] * len(HELD_OUT)
    headings = [f"{word}:\n{name.replace('-', ' ')}" for word, name in zip(words, names)]
    columns = dict(zip(headings, np.stack([*rows.values()], 1)))
    save_png(captioned_rows(columns, [*rows], scale=2), output / "before_after.png")


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
