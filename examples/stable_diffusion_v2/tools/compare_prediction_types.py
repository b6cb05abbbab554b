"""eps, x0 and v side by side: the tiny architecture, trained from random weights on the same data, seed and steps.

    pip install -r requirements-dev.txt
    python tools/compare_prediction_types.py [--output_path output/types] [option of train_text_to_image.py ...]

The training data are the base styles without the 121 Noto pictures of datasets/emoji/noto/test, which are the test
data. For each type there are the mean squared error of x0 by timestep on the test data (eps and v converted), and the
KID of pictures drawn with 4, 8, 15 and 50 steps (tools/measure_offline.py). The results are OUTPUT/results.json,
table.md and plot.png. A run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ldm import runtime
from ldm.config.model import ModelConfig, load_model_config, save_model_config
from ldm.data.dataset import CaptionedImages
from ldm.data.images import to_float
from ldm.model import StableDiffusion
from ldm.pipeline import Pipeline
from ldm.randomness import generator
from ldm.train.state import RESUME_NAME
from ldm.weights import read_checkpoint
from tools import measure_offline

HERE = Path(__file__).resolve().parents[1]

TYPES = ("eps", "x0", "v")
STEPS = (4, 8, 15, 50)
BASE, TEST = HERE / "datasets/emoji", HERE / "datasets/emoji/noto/test"
CONFIG, CHECKPOINT = HERE / "configs/tiny-vpred.yaml", HERE / "models/tiny-vpred.safetensors"
TRAIN_CONFIG = "configs/train/train_config_tiny_base_vpred.yaml"


def copy_data(folder: Path) -> None:
    """Copy the base data without the test pictures into a folder."""
    held_out = {Path("noto/train", row["dir"]) for row in read_rows(TEST)}
    rows = [row for row in read_rows(BASE) if Path(row["dir"]) not in held_out]
    for row in rows:
        (folder / row["dir"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(BASE / row["dir"], folder / row["dir"])
    with open(folder / "img_txt.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "img_txt.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def train(folder: Path, data: Path, options: list[str]) -> Path:
    """Train from random weights with the model config in `folder`, or resume; returns the last checkpoint."""
    words = ["train_text_to_image.py", "--train_config", TRAIN_CONFIG, "--data_path", str(data)]
    words += ["--model_config", str(folder / "model.yaml"), "--pretrained_model_path", str(CHECKPOINT)]
    words += ["--unet_initialize_random", "True", "--text_encoder_initialize_random", "True"]
    words += ["--timestep_bias_strategy", "none"]  # a bias towards some noise levels could suit one type better
    words += ["--validation_interval", "0", "--output_path", str(folder), *options]
    words += ["--resume", str((folder / "ckpt/rank_0" / RESUME_NAME).exists())]
    if subprocess.run([sys.executable, *words], cwd=HERE).returncode:
        sys.exit("error: the training failed; its message is above")
    return max((folder / "ckpt/rank_0").glob("sd-*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))


def x0_losses(path: Path, config: ModelConfig, seed: int = 42) -> dict[int, float]:
    """Timestep -> mean squared error of x0 in latents, over the test pictures, always with the same noise."""
    model = StableDiffusion(config)
    model.load(read_checkpoint(str(path), config).tensors, str(path))
    pipeline = Pipeline(config, model)
    data = CaptionedImages(TEST, config.image_size)
    pictures, texts = zip(*(data[i] for i in range(len(data))))
    x0 = model.encode_images(to_float(pictures))[0]
    denoise = pipeline.denoiser(list(texts), [""] * len(texts), 1.0)
    losses = {}
    for t in np.linspace(0, config.schedule.timesteps - 1, 21).round().astype(int).tolist():
        eps = generator(seed, "judging noise", t).standard_normal(x0.shape)
        z = pipeline.schedule.alpha(t) * x0 + pipeline.schedule.sigma(t) * eps
        losses[t] = float(np.mean((denoise(z, t)[0] - x0) ** 2))
    return losses


def kid_by_steps(path: Path, config_path: Path, folder: Path) -> dict[str, float]:
    """Sampling steps -> KID x 1000 of pictures drawn for the test captions."""
    scores = {}
    for steps in STEPS:
        options = ["--config", str(config_path), "--sampling_steps", str(steps), "--skip_grid"]
        options += ["--sampler", "dpm_solver_pp", "--scale", "2.5"]  # this sampler adds no noise
        drawn = measure_offline.draw(str(TEST), str(path), folder / f"steps-{steps:02}", options)
        scores[str(steps)] = measure_offline.compare_folders(drawn, TEST)["kid_x1000"]
    return scores


def table(results: dict) -> str:
    """The results as a Markdown table, a row per type."""
    times = [t for t in next(iter(results.values()))["x0_loss"] if int(t) in (0, 250, 500, 749, 999)]
    lines = [
        "| type | " + " | ".join([f"x0 error, t = {t}" for t in times] + [f"KID, {s} steps" for s in STEPS]) + " |"
    ]
    lines.append("| --- " * (1 + len(times) + len(STEPS)) + "|")
    for name, result in results.items():
        cells = [f"{result['x0_loss'][t]:.3g}" for t in times] + [f"{result['kid'][str(s)]:.0f}" for s in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, result in results.items():
        left.plot([int(t) for t in result["x0_loss"]], list(result["x0_loss"].values()), label=name)
        right.plot(STEPS, [result["kid"][str(s)] for s in STEPS], marker="o", label=name)
    left.set(
        yscale="log", xlabel="timestep t", ylabel="mean squared error of x0", title="Error of x0 on unseen pictures"
    )
    right.set(xscale="log", xlabel="sampling steps", ylabel="KID × 1000", title="Drawn pictures against real ones")
    right.set_xticks(STEPS, STEPS)
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_path", type=Path, default=Path("output/types"))
    args, train_options = parser.parse_known_args()
    output = args.output_path.resolve()
    if not (output / "data/img_txt.csv").exists():
        copy_data(output / "data")
    runtime.start(None, 0)
    results_path = output / "results.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {}
    for name in TYPES:
        if name in results:
            continue
        config = replace(load_model_config(CONFIG), prediction_type=name)
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        save_model_config(config, folder / "model.yaml")
        path = train(folder, output / "data", train_options)
        losses = {str(t): loss for t, loss in x0_losses(path, config).items()}
        results[name] = {"x0_loss": losses, "kid": kid_by_steps(path, folder / "model.yaml", folder)}
        results_path.write_text(json.dumps(results, indent=1))
    (output / "table.md").write_text(table(results))
    plot(results, output / "plot.png")
    print(table(results) + f"\nThe plot is {output / 'plot.png'}")


if __name__ == "__main__":
    runtime.run(main)
