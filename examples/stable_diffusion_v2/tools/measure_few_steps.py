"""What students of few steps draw, beside the model that they were distilled from, at equal numbers of network calls.

    pip install -r requirements-dev.txt
    python tools/measure_few_steps.py --students output/few_steps/ckpt/rank_0 --output_path output/few_steps/measured

It draws with the tiny model and with every student-N of the folder, from the same noise, and writes OUT/figures.csv:
the offline KID (see tools/measure_offline.py, with its limits), precision and recall (arXiv 1904.06991) against the
real pictures, and the root mean square of the pixels' distance, in units of 255, to the teacher's pictures. The teacher
is the base with its default guidance, drawn in 32 steps of DDIM. OUT/SET.png shows a few noises at every number of
steps, OUT/SET_kid.png the KID over the network calls.

The sets of prompts are the empty caption, the style's words alone, and captions. The first two do not determine the
picture. What was drawn before is kept, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.metrics import kid, precision_recall
from ldm import runtime
from ldm.config.model import ModelConfig
from ldm.data.captions import read_captions
from ldm.data.images import load_image
from ldm.errors import UserError
from ldm.files import quoted, replacing
from ldm.model import StableDiffusion
from ldm.parts import PARTS
from ldm.pictures import captioned_rows, make_folder, save_png
from ldm.pipeline import Pipeline, sampler_of, settings_for
from ldm.plot import Plot
from ldm.weights import choose_config, open_weights, tensors_of
from tools.measure_offline import open_features

Features = Callable[[list[Image.Image]], np.ndarray]
HERE = Path(__file__).resolve().parents[1]
EMOJI = HERE / "datasets" / "emoji"
BATCH = 50
SHOWN = 8  # noises on a sheet
SHEET = {  # the rows on a sheet, and what it calls them
    "ddim-32": "teacher",
    "ddim-32-guided": "teacher",
    **{f"ddim-{calls}": f"base, {calls}" for calls in (8, 4, 2, 1)},
    **{f"student-{calls}": f"student, {calls}" for calls in (8, 4, 2, 1)},
}


class PromptSet(NamedTuple):
    """Prompts, each drawn from a noise of its own, and the folder of the real pictures."""

    name: str
    prompts: list[str]
    real: Path


class Row(NamedTuple):
    """A way to draw; `name` is also its file's. None is the model's own setting."""

    name: str
    checkpoint: Path
    steps: int | None = None
    scale: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    final_sigma: str | None = None


def prompt_sets(count: int) -> list[PromptSet]:
    captions = [sample.text for sample in read_captions(EMOJI / "noto" / "test")]
    styles = ("noto", "twemoji", "fluent")
    return [
        PromptSet("empty", [""] * count, EMOJI),
        *(PromptSet(style, [f"{style} style"] * count, EMOJI / style / "train") for style in styles),
        PromptSet("captions", captions, EMOJI / "noto" / "test"),
    ]


def rows(base: Path, students: Path, captioned: bool) -> list[Row]:
    """The teacher first, then the base in other ways, then the students. Without a caption there is no guidance."""
    ddim = {"sampler": "ddim", "spacing": "trailing", "final_sigma": "zero"}
    scale, ending = (None, "-guided") if captioned else (1.0, "")
    found = [Row(f"ddim-{steps}{ending}", base, steps, scale, **ddim) for steps in (32, 16, 8, 4, 2, 1)]
    if captioned:
        found += [Row(f"ddim-{steps}", base, steps, 1.0, **ddim) for steps in (8, 4, 2, 1)]
    found += [Row(f"dpm_solver_pp-{steps}{ending}", base, steps, scale, "dpm_solver_pp") for steps in (8, 4)]
    found += [Row(f"ddpm-15{ending}", base, 15, scale)]
    own = sorted(students.glob("student-*.safetensors"), key=lambda path: -int(path.stem.split("-")[1]))
    return [*found, *(Row(path.stem, path) for path in own)]


def pipelines() -> Callable[[Path], tuple[ModelConfig, Pipeline]]:
    """A checkpoint's config and pipeline; the last ones are kept."""
    last: dict[Path, tuple[ModelConfig, Pipeline]] = {}

    def of(path: Path) -> tuple[ModelConfig, Pipeline]:
        if path not in last:
            weights = open_weights(str(path), widen=False)
            choice = choose_config(weights)
            model = StableDiffusion(choice.config)
            model.load(tensors_of(weights, choice), str(path), PARTS)
            last.clear()
            last[path] = choice.config, Pipeline(choice.config, model)
        return last[path]

    return of


def draw(config: ModelConfig, pipeline: Pipeline, row: Row, prompts: list[str], seed: int) -> tuple[np.ndarray, int]:
    """(pictures uint8 [N, H, W, 3], network calls for each)."""
    sampler = sampler_of(config, row.sampler, None, row.spacing, row.final_sigma)
    settings = settings_for(config, sampler, seed, steps=row.steps, guidance_scale=row.scale)
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        filled = part + part[-1:] * (BATCH - len(part))  # the graph is compiled for one size
        numbers = list(range(start, start + BATCH))
        pictures.append(pipeline.draw(filled, [""] * BATCH, numbers, settings)[: len(part)])
    guided = settings.guidance_scale != 1 and not config.unet.time_cond_proj_dim
    return np.concatenate(pictures), settings.steps * (2 if guided else 1)


def drawn(folder: Path, chosen: PromptSet, ways: list[Row], seed: int) -> Iterator[tuple[Row, np.ndarray, int]]:
    """(row, pictures, network calls) of every row, drawn now or before."""
    pipeline_of = pipelines()
    for row in ways:
        path = folder / chosen.name / f"{row.name}.npz"
        if not path.exists():
            pictures, calls = draw(*pipeline_of(row.checkpoint), row, chosen.prompts, seed)
            make_folder(path.parent)
            with replacing(path) as file:
                np.savez_compressed(file, pictures=pictures, calls=calls)
        with np.load(path) as kept:
            yield row, kept["pictures"], int(kept["calls"])


def rms(one: np.ndarray, other: np.ndarray) -> float:
    """The root mean square of two sets of pictures' distance, in units of 255."""
    return float(np.sqrt(((one.astype(np.float64) - other) ** 2).mean()))


def figures(pictures: np.ndarray, teacher: np.ndarray, features: Features, real: np.ndarray) -> dict[str, float]:
    """The figures of a row; `real`: the real pictures' features."""
    own = features([Image.fromarray(picture) for picture in pictures])
    precision, recall = precision_recall(real, own)
    found = {
        "kid_x1000": 1000 * kid(own, real),
        "precision": precision,
        "recall": recall,
        "rms": rms(pictures, teacher),
    }
    return {name: round(value, 3) for name, value in found.items()}


CURVES = {  # the beginnings of the rows' names in a curve, its name and colour
    "ddim-guided": ("base, guided", "#e08a2e"),
    "ddim": ("base, not guided", "#8a97a8"),
    "student": ("students", "#1f63b5"),
}


def plot(path: Path, title: str, table: list[dict]) -> None:
    """Draw the KID over the network calls of a picture."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        family, *more = row["row"].split("-")
        name = f"{family}-guided" if more[-1] == "guided" else family
        if name in CURVES:
            curves.setdefault(name, []).append((math.log2(row["calls"]), row["kid_x1000"]))
    high = max(y for points in curves.values() for _, y in points)
    low = min(y for points in curves.values() for _, y in points)
    room = 0.06 * (high - low)
    frame = Plot(0, 6, max(0.0, low - room), high + room)
    frame.axes({n: str(2**n) for n in range(7)}, "network calls for a picture")
    for name, points in curves.items():
        frame.curve(*np.transpose(points), CURVES[name][1], 4)
    frame.legend(title, {color: name for key, (name, color) in CURVES.items() if key in curves})
    frame.save(path)


def real_features(folder: Path, chosen: PromptSet, features: Features) -> np.ndarray:
    """The features of the real pictures, computed once."""
    path = make_folder(folder / chosen.name) / "real.npy"
    if not path.exists():
        paths = dict.fromkeys(sample.path for sample in read_captions(chosen.real))
        found = features([Image.fromarray(load_image(path, 64)) for path in paths])
        with replacing(path) as file:
            np.save(file, found)
    return np.load(path)


def measure(folder: Path, chosen: PromptSet, ways: list[Row], seed: int, features: Features) -> Iterator[dict]:
    """A table's rows for one set of prompts, and its sheet."""
    real, teacher, shown = real_features(folder, chosen, features), None, {}
    for row, pictures, calls in drawn(folder, chosen, ways, seed):
        teacher = pictures if teacher is None else teacher
        if row.name in SHEET:
            shown[SHEET[row.name]] = pictures[:SHOWN]
        yield {"set": chosen.name, "row": row.name, "calls": calls, **figures(pictures, teacher, features, real)}
    save_png(captioned_rows(shown, chosen.prompts[:SHOWN], scale=2), folder / f"{chosen.name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=HERE / "models" / "tiny-vpred.safetensors")
    parser.add_argument("--students", type=Path, required=True, help="the folder with student-N.safetensors")
    parser.add_argument("--output_path", type=Path, default=Path("output/few_steps/measured"))
    parser.add_argument("--count", type=int, default=1000, help="pictures of each set but the captions")
    parser.add_argument("--sets", nargs="+", help="names of the sets to measure (default: all)")
    parser.add_argument("--rows", nargs="+", help="names of the rows to measure, the teacher's first (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    args = parser.parse_args()
    if not any(args.students.glob("student-*.safetensors")):
        raise UserError(f"no student-N.safetensors in {quoted(args.students)}: train_distillation.py leaves them there")
    runtime.start()
    features, table = open_features(), []
    for chosen in prompt_sets(args.count):
        if args.sets and chosen.name not in args.sets:
            continue
        of_set = []
        ways = rows(args.base, args.students, captioned=any(chosen.prompts))
        ways = [row for row in ways if not args.rows or row.name in args.rows]
        for figure in measure(args.output_path, chosen, ways, args.seed, features):
            print(*figure.values(), sep="\t", flush=True)
            of_set.append(figure)
        plot(args.output_path / f"{chosen.name}_kid.png", "KID x 1000", of_set)
        table += of_set
    with open(args.output_path / "figures.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    runtime.run(main)
