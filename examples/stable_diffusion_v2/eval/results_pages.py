"""The pages of eval/results_table.py: the table in Markdown and CSV, and every row's sheet of pictures."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from eval.results_rows import Row, write_text
from ldm.data.images import decode
from ldm.diffusion.samplers import SAMPLERS
from ldm.pictures import captioned_rows

LARGEST, SMALLEST = 256, 128  # pixels of a picture's side on the sheet
NONE = "—"  # in the place of a figure that could not be computed
COLUMNS = {  # heading: key of the figure, its format
    "FID": ("fid", "{:.1f}"),
    "KID × 1000": ("kid_x1000", "{:.2f}"),
    "CLIP score": ("clip_score", "{:.1f}"),
    "pictures": ("pictures", "{}"),
    "offline KID × 1000": ("offline_kid_x1000", "{:.1f}"),
    "offline top 1": ("offline_top1", "{:.1%}"),
    "offline top 5": ("offline_top5", "{:.1%}"),
}
NOTES = """
FIDs can be compared only for equal numbers of pictures, and are too high for fewer than 2,048. KID, by the same
features, has no such bias. CLIP scores are 100 · cosine. The offline figures come from a small network in a Python
package (`tools/measure_offline.py`). They order models on the same real pictures and cannot be compared with published
numbers. Top 1 and top 5 are the shares of pictures whose real picture is the nearest, or among the nearest five, of the
data set. All settings are in `table.csv`, pictures in `samples.md`.
"""


def sheet(row: Row, shown: int) -> Image.Image:
    """A sheet of real pictures, drawn pictures and captions, taken at even distances from the whole data set."""
    picks = np.linspace(0, len(row.samples) - 1, min(shown, len(row.samples))).round().astype(int).tolist()
    each, longer = row.facts["n_samples"], max(row.facts["H"], row.facts["W"])
    size = tuple(round(row.facts[side] * min(1, LARGEST / longer)) for side in ("W", "H"))
    paths = {
        "real": [row.samples[i].path for i in picks],
        "drawn": [row.samples_folder / f"{i * each:05}.png" for i in picks],
    }
    columns = {heading: np.stack([fitted(path, size) for path in column]) for heading, column in paths.items()}
    return captioned_rows(columns, [row.samples[i].text for i in picks], max(1, SMALLEST // max(size)))


def fitted(path: Path | str, size: tuple[int, int]) -> np.ndarray:
    """A picture file cropped and scaled to (width, height), uint8 [height, width, 3]."""
    return np.asarray(ImageOps.fit(Image.fromarray(decode(path)), size, Image.LANCZOS))


def labels(row: dict) -> list[str]:
    """The first five columns of the table."""
    sampling = f"{SAMPLERS[row['sampler']].label} ({row['sampling_steps']} steps, scale {row['scale']:g})"
    size = f"{row['H']}²" if row["H"] == row["W"] else f"{row['H']} × {row['W']}"
    return [row["model"], row["dataset"], row["prediction_type"], size, sampling]


def markdown(rows: list[dict]) -> str:
    """The table; below it, for each missing figure, what is needed for it."""
    always = {"FID", "CLIP score"}
    shown = [heading for heading, (key, _) in COLUMNS.items() if heading in always or any(key in row for row in rows)]
    cells = [["Pretrained model", "Dataset", "objective", "image size", "sampling algorithm", *shown]]
    count = Counter(map(str, map(labels, rows)))
    for row in rows:
        model, *settings = labels(row)
        if count[str([model, *settings])] > 1:  # rows differ in the seed or in files of one name
            model += f" ({row['folder'].rsplit('-', 1)[1]})"
        figures = [COLUMNS[heading] for heading in shown]
        cells.append([model, *settings, *(form.format(row[key]) if key in row else NONE for key, form in figures)])
    cells.insert(1, ["---"] * len(cells[0]))
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    lacks = dict.fromkeys(f"{NONE} {what}: {why}" for row in rows for what, why in row["lacks"].items())
    return "\n".join([*lines, "", *(f"{line}\n" for line in lacks)]) + NOTES


def to_csv(rows: list[dict]) -> str:
    """Every fact of every row, as CSV."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "lacks"))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def gallery(rows: list[dict]) -> str:
    """A Markdown page with every row's sheet."""
    parts = ["# Drawn beside real pictures\n"]
    for row in rows:
        model, dataset, objective, size, sampling = labels(row)
        parts.append(f"## {model} on {dataset}\n\n{objective}, {size}, {sampling}, seed {row['seed']}\n")
        parts.append(f"![Real and drawn pictures of {dataset} with their captions]({row['folder']}/samples.png)\n")
    return "\n".join(parts)


def publish(output: Path) -> str:
    """Write table and pages of all rows in the output folder; returns the table in Markdown."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in output.glob("*/row.json")]
    rows.sort(key=lambda row: (labels(row), row["folder"]))
    table = markdown(rows)
    write_text(output / "table.md", table)
    write_text(output / "table.csv", to_csv(rows))
    write_text(output / "samples.md", gallery(rows))
    return table
