"""The rows of eval/results_table.py: the model, the data set, how pictures are drawn, and the row's folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import text_to_image

from ldm import runtime
from ldm.config.options import require_at_least
from ldm.data.captions import Sample, read_prompts
from ldm.drawing import file_facts, find_model, plan, run_facts, settings_of
from ldm.errors import UserError
from ldm.files import replacing
from ldm.pictures import make_folder
from ldm.pipeline import check_config

MODEL_OPTIONS = ("version", "config", "ckpt_path")  # options of text_to_image.py that are lists here


@dataclass(frozen=True)
class Row:
    """A model on a data set."""

    folder: Path
    data_path: str
    samples: list[Sample]  # the captions that are drawn, in order
    words: list[str]  # the command line of text_to_image.py
    facts: dict  # what the table says of model, data set and drawing

    @property
    def samples_folder(self) -> Path:
        return self.folder / "samples"

    @property
    def picture_count(self) -> int:
        """The number of pictures that are drawn."""
        return len(self.samples) * self.facts["n_samples"]


def one_for_each(values: list | None, number: int, option: str) -> list:
    """One value for each of `number` rows; UserError where there is neither one value nor `number` of them."""
    values = values or [None]
    if len(values) not in (1, number):
        raise UserError(f"{len(values)} values of --{option} for {number} rows: give one for each, or one for all")
    return values * number if len(values) == 1 else values


def plan_rows(args: argparse.Namespace, words: list[str]) -> list[Row]:
    """Every row of the call, before anything is drawn; UserError where a row cannot be drawn.

    `words` are the options that text_to_image.py gets for all rows.
    """
    require_at_least(1, args, "n_samples", "shown")
    require_at_least(2, args, "limit")  # a covariance and a KID need two pictures
    if not (args.version or args.ckpt_path):
        raise UserError("no model: give --version or --ckpt_path")
    number = max(len(getattr(args, option) or ()) for option in (*MODEL_OPTIONS, "name"))
    columns = [one_for_each(getattr(args, option), number, option) for option in MODEL_OPTIONS]
    models = [
        [word for option, value in zip(MODEL_OPTIONS, values) if value for word in (f"--{option}", value)]
        for values in zip(*columns)
    ]
    names = one_for_each(args.name, number, "name")
    datasets = one_for_each(args.dataset, len(args.data_path), "dataset")
    output = make_folder(args.output_path)
    return [
        plan_row(args, output, name, [*words, *model], data_path, dataset)
        for data_path, dataset in zip(args.data_path, datasets)
        for name, model in zip(names, models)
    ]


def plan_row(
    args: argparse.Namespace, output: Path, name: str | None, words: list[str], data_path: str, dataset: str | None
) -> Row:
    """A row, with its folder's name and the command that draws it; writes its file of prompts."""
    samples = read_prompts(data_path, args.limit)
    if len(samples) < 2:
        raise UserError(f"there is only one picture in {data_path}: FID and KID need two at least")
    prompts = "".join(f"{sample.text}\n" for sample in samples)
    file = output / f"prompts-{digest(prompts)}.txt"
    write_text(file, prompts)
    plain = ["--prompt_weights", "False"]  # brackets of captions are plain, unless `words` say otherwise
    words = [*plain, *words, "--data_path", str(file), "--n_iter", "1", "--n_samples", str(args.n_samples)]
    options = text_to_image.build_parser().parse_args(words)
    if options.skip_save:
        raise UserError("--skip_save leaves nothing to measure")
    config, checkpoint, _ = find_model(options)
    settings, pictures = settings_of(options, config), plan(options)
    drawing = run_facts(options, config, checkpoint, settings)
    check_config(config, drawing["H"], drawing["W"])
    sources = {**file_facts(options, checkpoint), "fixed_code": options.fixed_code}
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
        "set": " ".join(options.set),
        "version": options.version,
        "config": options.config,
        "device_target": options.device_target or runtime.default_device(),
    }
    folder = output / "-".join([*(re.sub(r"\W+", "_", facts[part]) for part in ("model", "dataset")), key])
    words += ["--output_path", str(folder), "--skip_grid", "--resume"]
    return Row(folder, data_path, samples, words, facts)


def digest(text: str) -> str:
    """The first eight hexadecimal digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())
