"""The captions of a data folder: the rows of its caption tables, each with an existing picture inside the folder."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ldm.data.tables import COLUMNS, KINDS, Table, has_columns, read_table
from ldm.errors import UserError
from ldm.files import escaped, quoted
from ldm.text.tokenizer import Tokenizer

NAME = "img_txt.csv"  # what a folder's caption file is called; others may lie beside it
LISTED = 1 << 17  # files of a data folder among which the meaning of a wrong name is sought
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One row: the picture's absolute path and its caption ("" where there is none)."""

    path: str
    text: str


def read_captions(data_path: str | Path, file_name: str | None = None) -> list[Sample]:
    """Read the caption files of a data folder in the order of their names, or the named file alone.

    The files are all CSVs with the right columns. JSON lines are read where no CSV has them, and Parquet where no JSON
    lines have them. Captions stay as they are written: "007" and "NA" are text, and quoted commas and line breaks
    belong to the caption. Null is the empty caption, and a number becomes text. Other columns and blank rows are
    ignored. Where the folder holds several such files, one line of the log says which are read.

    Raises:
        UserError: the folder, the file or a column is missing; a file has no rows, or is not what its name says; a row
            names a picture that does not exist or, links resolved, lies outside `data_path` (with its line number).
    """
    folder = Path(data_path)
    if not os.path.isdir(folder):
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise UserError(f"data folder '{folder}' {problem}: give the folder that holds {file_name or NAME}")
    files = [folder / file_name] if file_name else _tables(folder)
    if not files or not files[0].is_file():
        raise UserError(f"no {file_name or NAME} in data folder '{folder}'; it needs the columns {','.join(COLUMNS)}")
    chosen = files if file_name else _chosen(files)
    read = {path.name: _locate(read_table(path)) for path in chosen}
    if len(files) > 1:
        log.info("captions of '%s': %s", folder, _account(read, files, chosen))
    return [sample for samples in read.values() for sample in samples]


def read_prompts(data_path: str | Path, limit: int | None = None) -> list[Sample]:
    """The first `limit` rows, or all, each caption as one line to draw from. UserError where a caption is empty."""
    samples = [Sample(sample.path, " ".join(sample.text.split())) for sample in read_captions(data_path)[:limit]]
    empty = [sample.path for sample in samples if not sample.text]
    if empty:
        first = quoted(empty[0], 200)
        raise UserError(f"{len(empty)} pictures in '{data_path}' have no caption to draw from, the first: {first}")
    return samples


def caption_warnings(samples: list[Sample], tokenizer: Tokenizer, pieces: int = 1) -> list[str]:
    """Warnings about captions before training: that all are empty, or how many are longer than the encoder reads in so
    many pieces."""
    texts = {sample.text for sample in samples}
    if not any(text.strip() for text in texts):
        return ["all captions are empty: the model will learn to draw without a prompt, and prompts will not steer it"]
    room = pieces * (tokenizer.context_length - 2)  # start and end token take two; a token has one byte at least
    large = (text for text in texts if len(text.encode("utf-8", "replace")) > room)
    long = {text for text in large if len(tokenizer.tokens(text)) > room}
    cut = [sample for sample in samples if sample.text in long]
    if not cut:
        return []
    example = quoted(" ".join(cut[0].text.split()))
    too_long = f"{len(cut):,} of {len(samples):,} captions have more than {room} tokens; the rest is not seen"
    return [f"{too_long} without a larger --text_chunks: {example}"]


def _tables(folder: Path) -> list[Path]:
    """The files of a folder that may hold captions, kind by kind."""
    found = [path for suffix in KINDS for path in sorted(folder.glob(f"*{suffix}"))]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def _chosen(files: list[Path]) -> list[Path]:
    """The files to read: those with the columns, of the first kind that has any; else the first file, for its error."""
    for suffix in KINDS:
        chosen = [path for path in files if path.suffix == suffix and (path.name == NAME or has_columns(path))]
        if chosen:
            return chosen
    return files[:1]


def _account(read: dict[str, list[Sample]], files: list[Path], chosen: list[Path]) -> str:
    """Which files were read, and which were not for what reason."""
    names = [f"{escaped(name)} ({len(samples):,} rows)" for name, samples in read.items()]
    later = [*KINDS][[*KINDS].index(chosen[0].suffix) + 1 :]
    others = [path for path in files if path not in chosen]
    lacking = [escaped(path.name) for path in others if path.suffix not in later]
    beside = [escaped(path.name) for path in others if path.suffix in later]
    parts = [_listed(names, " and {} more")]
    if lacking:
        parts.append(f"not read, for lack of the columns {','.join(COLUMNS)}: {_listed(lacking, ' ...')}")
    if beside:
        parts.append(f"not read beside {chosen[0].suffix}: {_listed(beside, ' ...')}")
    return "; ".join(parts)


def _listed(names: list[str], rest: str, most: int = 8) -> str:
    return ", ".join(names[:most]) + (rest.format(len(names) - most) if len(names) > most else "")


def _locate(table: Table) -> list[Sample]:
    """The samples of a table. UserError where pictures cannot be used: it names the first row and their number."""
    root = os.path.realpath(table.path.parent)
    real_folder = lru_cache(maxsize=None)(os.path.realpath)  # most rows share their folder
    samples, problems = [], []
    for row, name, text in zip(table.rows.index, table.rows["dir"], table.rows["text"]):
        folder, base = os.path.split(os.path.join(root, name))
        named = path = os.path.join(real_folder(folder), base)
        if os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(os.path.join(root, "")):
            problems.append((row, name, named))
        elif not os.path.isfile(path):
            problems.append((row, name, None))
        else:
            samples.append(Sample(path, text))
    if problems:
        row, name, outside = problems[0]
        problem = _outside(root, outside) if outside else _not_there(root, name)
        more = f" ({len(problems)} of {len(table.rows)} rows are wrong)" if len(problems) > 1 else ""
        raise UserError(f"{quoted(table.path, 200)} {table.place(row)}: {quoted(name)} {problem}{more}")
    return samples


def _outside(root: str, path: str) -> str:
    """What is wrong with a picture outside the folder, and what to do about it."""
    place = "lies outside the data folder"
    if os.path.islink(path) and path.startswith(os.path.join(root, "")):
        place += f", for it is a link to {quoted(os.path.realpath(path), 200)}"
    return f"{place}: copy the picture into {quoted(root, 200)}, or give a data folder that holds both"


def _not_there(root: str, name: str) -> str:
    """What is wrong with the name of no file, and which file it may mean."""
    meant = _meant(root, name)
    return "is not a file in the data folder" + (f": did you mean {quoted(meant, 200)}?" if meant else "")


def _meant(root: str, name: str) -> str | None:
    """The file that a wrong name may mean.

    The name may differ from the file's in case, in the coding of accents, by backslashes, or by a missing extension or
    folder.
    """

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
