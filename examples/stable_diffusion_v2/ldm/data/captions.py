"""The caption files of a data folder: its `*.csv` with the columns `dir` (a picture, relative) and `text`."""

from __future__ import annotations

import csv
import io
import logging
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ldm.data.utf8 import read_text
from ldm.errors import UserError
from ldm.files import escaped, quoted
from ldm.text.tokenizer import Tokenizer

COLUMNS = ("dir", "text")
NAME = "img_txt.csv"  # what a folder's caption file is called; others may lie beside it
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # what spreadsheets write in place of commas
OTHER_NAMES = {  # of the columns in other collections
    "dir": ("dir", "file_name", "filename", "file", "image", "image_path", "path"),
    "text": ("text", "caption", "prompt", "description"),
}
LISTED = 1 << 17  # files of a data folder that are looked through for what a wrong name may have meant
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One row: the picture's absolute path and its caption ("" where there is none)."""

    path: str
    text: str


def read_captions(data_path: str | Path, csv_name: str | None = None) -> list[Sample]:
    """Read the caption files of a data folder: all with the right columns in order of their names, or the named one.

    Captions stay as they are written: "007" and "NA" are text, quoted commas and line breaks belong to the caption.
    Other columns are ignored, and so are rows without any word. One line says what is read where there is a choice.

    Raises:
        UserError: the folder, the file or a column is missing; a file is empty, not UTF-8 or not CSV; a row names a
            picture that does not exist or, links resolved, lies outside `data_path` (with its line number).
    """
    folder = Path(data_path)
    if not os.path.isdir(folder):
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise UserError(f"data folder '{folder}' {problem}: give the folder that holds {csv_name or NAME}")
    found = [folder / csv_name] if csv_name else folder.glob("*.csv")
    files = sorted(path for path in found if path.is_file() and (csv_name or not path.name.startswith(".")))
    if not files:
        raise UserError(f"no {csv_name or NAME} in data folder '{folder}'; it needs the columns {','.join(COLUMNS)}")
    chosen = [path for path in files if path.name == NAME or _has_columns(path)] or files[:1]
    read = {path.name: _read_file(path) for path in chosen}
    if len(files) > 1:
        log.info("captions of '%s': %s", folder, _account(read, [path.name for path in files if path not in chosen]))
    return [sample for samples in read.values() for sample in samples]


def read_prompts(data_path: str | Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` rows to draw from, or all: captions as one line each; UserError where one is empty."""
    samples = [Sample(sample.path, " ".join(sample.text.split())) for sample in read_captions(data_path)[:limit]]
    empty = [sample.path for sample in samples if not sample.text]
    if empty:
        first = quoted(empty[0], 200)
        raise UserError(f"{len(empty)} pictures in '{data_path}' have no caption to draw from, the first: {first}")
    return samples


def caption_warnings(samples: list[Sample], tokenizer: Tokenizer) -> list[str]:
    """What is to be said of captions before training: how many are cut, and that all are empty."""
    texts = {sample.text for sample in samples}
    if not any(text.strip() for text in texts):
        return ["all captions are empty: the model will learn to draw without a prompt, and prompts will not steer it"]
    room = tokenizer.context_length - 2  # beside start and end token; a token is a byte at least
    large = (text for text in texts if len(text.encode("utf-8", "replace")) > room)
    long = {text for text in large if len(tokenizer.tokens(text)) > room}
    cut = [sample for sample in samples if sample.text in long]
    if not cut:
        return []
    example = quoted(" ".join(cut[0].text.split()))
    return [f"{len(cut):,} of {len(samples):,} captions have more than {room} tokens; the rest is not seen: {example}"]


def _account(read: dict[str, list[Sample]], others: list[str], most: int = 8) -> str:
    """Which files were read, and which not."""
    parts = [f"{escaped(name)} ({len(samples):,} rows)" for name, samples in [*read.items()][:most]]
    said = ", ".join(parts) + (f" and {len(read) - most} more" if len(read) > most else "")
    if others:
        named = ", ".join(map(escaped, others[:most]))
        said += f"; not read, for lack of the columns {','.join(COLUMNS)}: {named}{' ...' if others[most:] else ''}"
    return said


def _has_columns(csv_path: Path) -> bool:
    """Whether a file's first line names both columns, whatever follows it."""
    try:
        with open(csv_path, encoding="utf-8-sig", errors="replace", newline="") as file:
            return set(COLUMNS) <= {name.strip() for name in next(csv.reader([file.readline(1 << 16)]), [])}
    except (OSError, csv.Error):
        return False


def _read_file(csv_path: Path) -> list[Sample]:
    text = read_text(csv_path, "caption file")
    rows = _read_rows(csv_path, csv.reader(io.StringIO(text, newline=""), strict=True))
    if not rows:
        raise UserError(f"{quoted(csv_path, 200)} has no rows below its header")
    return _locate(csv_path, rows)


def _read_rows(csv_path: Path, reader) -> list[tuple[int, str, str]]:
    """(line number, dir, text) of every row that is not blank."""
    file = quoted(csv_path, 200)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not set(COLUMNS) <= set(header):
            raise UserError(f"{file} {_lack(header)}")
        dir_at, text_at = (header.index(name) for name in COLUMNS)
        rows = []
        line = reader.line_num + 1
        for fields in reader:
            if any(field.strip() for field in fields[len(header) :]):
                raise UserError(
                    f"{file} line {line} has {len(fields)} fields for {len(header)} columns: "
                    "put a caption with a comma in double quotes"
                )
            if any(field.strip() for field in fields):
                fields += [""] * (len(header) - len(fields))
                rows.append((line, fields[dir_at].strip(), fields[text_at]))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num} is not CSV: {error}") from error
    return rows


def _lack(header: list[str]) -> str:
    """What is wrong with a header that has not both columns, and what to do about it."""
    first = ",".join(header)
    if first.lower().startswith("sep="):
        return f"begins with the line {quoted(first)}: delete that line, and separate the columns by commas"
    for separator, name in SEPARATORS.items():
        if separator in first:
            return f"has its columns separated by {name}, {quoted(first)}: save it with commas"
    missing = [name for name in COLUMNS if name not in header]
    advice = [
        f"rename {quoted(other)} to {name}"
        for name in missing
        for other in [other for other in header if other.lower() in OTHER_NAMES[name]][:1]
    ]
    return f"lacks the column {' and '.join(missing)}: " + "; ".join([f"it has {escaped(first or 'none')}", *advice])


def _locate(csv_path: Path, rows: list[tuple[int, str, str]]) -> list[Sample]:
    """Resolve every row's picture; where some cannot be used, say which row is the first and how many there are."""
    root = os.path.realpath(csv_path.parent)
    real_folder = lru_cache(maxsize=None)(os.path.realpath)  # most rows share their folder
    samples, problems = [], []
    for line, name, text in rows:
        folder, base = os.path.split(os.path.join(root, name))
        named = path = os.path.join(real_folder(folder), base)
        if os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(os.path.join(root, "")):
            problems.append((line, name, named))
        elif not os.path.isfile(path):
            problems.append((line, name, None))
        else:
            samples.append(Sample(path, text))
    if problems:
        line, name, outside = problems[0]
        problem = _outside(root, outside) if outside else _not_there(root, name)
        more = f" ({len(problems)} of {len(rows)} rows are wrong)" if len(problems) > 1 else ""
        raise UserError(f"{quoted(csv_path, 200)} line {line}: {quoted(name)} {problem}{more}")
    return samples


def _outside(root: str, path: str) -> str:
    place = "lies outside the data folder"
    if os.path.islink(path) and path.startswith(os.path.join(root, "")):
        place += f", for it is a link to {quoted(os.path.realpath(path), 200)}"
    return f"{place}: copy the picture into {quoted(root, 200)}, or give a data folder that holds both"


def _not_there(root: str, name: str) -> str:
    meant = _meant(root, name)
    return "is not a file in the data folder" + (f": did you mean {quoted(meant, 200)}?" if meant else "")


def _meant(root: str, name: str) -> str | None:
    """The file that a wrong name may stand for: of other case, accents written otherwise, with a backslash, without
    its extension or its folder."""

    def plain(path: str) -> str:
        return unicodedata.normalize("NFC", path.replace("\\", "/")).casefold().removeprefix("./")

    files = list(islice(_files(root), LISTED))
    wanted = plain(name)
    base = os.path.basename(wanted)
    likenesses = (
        lambda path: plain(path) == wanted,
        lambda path: os.path.splitext(plain(path))[0] == wanted,
        lambda path: os.path.basename(plain(path)) == base,
    )
    return next((path for alike in likenesses for path in files if wanted and alike(path)), None)


def _files(root: str) -> Iterator[str]:
    """All files of a folder and the folders in it, relative to it."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in sorted(names))
