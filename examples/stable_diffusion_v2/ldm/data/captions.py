"""The caption file of a data folder: `img_txt.csv` with the columns `dir` (a picture, relative) and `text`."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ldm.errors import UserError

COLUMNS = ("dir", "text")


@dataclass(frozen=True)
class Sample:
    """One row: the picture's absolute path and its caption ("" where there is none)."""

    path: str
    text: str


def read_captions(data_path: str | Path, csv_name: str = "img_txt.csv") -> list[Sample]:
    """Read a data folder's caption file.

    Captions stay as they are written: "007" and "NA" are text, quoted commas and line breaks belong to the caption.
    Other columns are ignored.

    Raises:
        UserError: the folder, the file or a column is missing; the file is empty, not UTF-8 or not CSV; a row names a
            picture that does not exist or, links resolved, lies outside `data_path` (with its line number).
    """
    folder, csv_path = Path(data_path), Path(data_path) / csv_name
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data folder '{folder}' {problem}: give the folder that holds {csv_name}")
    if not csv_path.is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.csv"))[:3])
        hint = f"it has {others}: rename the caption file" if others else f"it needs the columns {','.join(COLUMNS)}"
        raise UserError(f"no {csv_name} in data folder '{folder}'; {hint}")
    try:
        with open(csv_path, encoding="utf-8-sig", newline="") as file:
            rows = _read_rows(csv_path, csv.reader(file, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"'{csv_path}' is not UTF-8 text: save it with that encoding ({error.reason})") from error
    except OSError as error:
        raise UserError(f"cannot read '{csv_path}': {error.strerror}") from error
    if not rows:
        raise UserError(f"'{csv_path}' has no rows below its header")
    return _locate(csv_path, rows)


def read_prompts(data_path: str | Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` rows to draw from, or all: captions as one line each; UserError where one is empty."""
    samples = [Sample(sample.path, " ".join(sample.text.split())) for sample in read_captions(data_path)[:limit]]
    empty = [sample.path for sample in samples if not sample.text]
    if empty:
        raise UserError(f"{len(empty)} pictures in '{data_path}' have no caption to draw from, the first: {empty[0]}")
    return samples


def _read_rows(csv_path: Path, reader) -> list[tuple[int, str, str]]:
    """(line number, dir, text) of every row that is not blank."""
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise UserError(
                f"'{csv_path}' lacks the column {' and '.join(missing)}: it has {','.join(header) or 'none'}"
            )
        dir_at, text_at = (header.index(name) for name in COLUMNS)
        rows = []
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) > len(header):
                raise UserError(
                    f"'{csv_path}' line {line} has {len(fields)} fields for {len(header)} columns: "
                    "put a caption with a comma in double quotes"
                )
            if fields:
                fields += [""] * (len(header) - len(fields))
                rows.append((line, fields[dir_at].strip(), fields[text_at]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"'{csv_path}' line {reader.line_num} is not CSV: {error}") from error
    return rows


def _locate(csv_path: Path, rows: list[tuple[int, str, str]]) -> list[Sample]:
    """Resolve every row's picture; where some cannot be used, say which row is the first and how many there are."""
    root = os.path.realpath(csv_path.parent)
    real_folder = lru_cache(maxsize=None)(os.path.realpath)  # most rows share their folder
    samples, problems = [], []
    for line, name, text in rows:
        folder, base = os.path.split(os.path.join(root, name))
        path = os.path.join(real_folder(folder), base)
        if os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(os.path.join(root, "")):
            problems.append(f"line {line}: '{name}' lies outside the data folder")
        elif not os.path.isfile(path):
            problems.append(f"line {line}: '{name}' is not a file in the data folder")
        else:
            samples.append(Sample(path, text))
    if problems:
        more = f" ({len(problems)} of {len(rows)} rows are wrong)" if len(problems) > 1 else ""
        raise UserError(f"'{csv_path}' {problems[0]}{more}")
    return samples
