"""Caption tables: CSV, JSON lines and Parquet files, read with pandas into the columns `dir` and `text`.

A CSV has the columns `dir` and `text`. In the two other kinds, which other programs write, `dir` may be called
`file_name`, as in the `metadata.jsonl` of Hugging Face's image folders.
"""

from __future__ import annotations

import csv
import io
import json
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas

from ldm.data.utf8 import read_text
from ldm.errors import UserError
from ldm.files import escaped, quoted

COLUMNS = ("dir", "text")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # what spreadsheets write in place of commas
OTHER_NAMES = {  # of the columns in other collections
    "dir": ("dir", "file_name", "filename", "file", "image", "image_path", "path"),
    "text": ("text", "caption", "prompt", "description"),
}
FOREIGN_DIR = "file_name"  # the name of the column `dir` that JSON lines and Parquet may have
FIRST_LINE = 1 << 20  # bytes of a file's first line that are looked at for the columns


@dataclass(frozen=True)
class Table:
    """The rows of a caption file, without the blank ones.

    Args:
        path: the file.
        rows: strings in the columns `dir` and `text`; the index is what `place` takes.
        place: says where in the file a row stands, for example "line 7".
    """

    path: Path
    rows: pandas.DataFrame
    place: Callable[[int], str]


def read_table(path: Path) -> Table:
    """Read a caption file: Parquet and JSON lines by the ending of its name, any other file as CSV.

    Raises:
        UserError: a column is missing; the file has no rows, or is not what its name says; a cell is not text. Parquet:
            pyarrow is not installed.
    """
    table = KINDS.get(path.suffix, KINDS[".csv"]).read(path)
    if table.rows.empty:
        raise UserError(f"{quoted(path, 200)} has no rows with captions")
    return table


def has_columns(path: Path) -> bool:
    """Whether a caption file names both columns, whatever its rows hold. True where only reading can tell."""
    return KINDS[path.suffix].has_columns(path)


# --- CSV ---


def _read_csv(path: Path) -> Table:
    text = read_text(path, "caption file")
    header = [name.strip() for name in next(_csv_rows(path, text), (1, []))[1]]
    if not set(COLUMNS) <= set(header):
        raise UserError(f"{quoted(path, 200)} {_separated(header) or _lack(header)}")
    try:
        cells = _parse_csv(text, len(header))
    except pandas.errors.ParserError:
        cells = _parse_csv(text, _longest(path, text, len(header)))
    cells = cells.fillna("").iloc[1:]  # pandas fills up short rows with NaN
    filled = cells.apply(lambda column: column.str.strip()).ne("").any(axis=1)
    dirs, texts = (cells[header.index(name)][filled] for name in COLUMNS)
    rows = pandas.DataFrame({"dir": dirs.str.strip(), "text": texts})
    return Table(path, rows, lambda row: f"line {next(islice(_csv_rows(path, text), row, None))[0]}")


def _parse_csv(text: str, width: int) -> pandas.DataFrame:
    """All rows as strings, the header and blank rows too; ParserError where a row has more than `width` fields."""
    return pandas.read_csv(
        io.StringIO(text, newline=""),
        header=None,
        names=range(width),
        dtype=str,
        engine="python",  # pandas' C engine takes `"a"b` for a field; this one is strict
        keep_default_na=False,
        na_filter=False,
        skip_blank_lines=False,
    )


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row, for messages: pandas does not tell on which line a row begins.

    Raises:
        UserError: the text of the file is not CSV.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{quoted(path, 200)} line {reader.line_num} is not CSV: {error}") from error


def _longest(path: Path, text: str, columns: int) -> int:
    """The fields of the longest row, where the fields behind the columns are blank, as spreadsheets write them.

    Raises:
        UserError: such a field is not blank, or the text of the file is not CSV.
    """
    longest = columns
    for line, fields in _csv_rows(path, text):
        if any(field.strip() for field in fields[columns:]):
            raise UserError(
                f"{quoted(path, 200)} line {line} has {len(fields)} fields for {columns} columns: "
                "put a caption with a comma in double quotes"
            )
        longest = max(longest, len(fields))
    return longest


def _csv_has_columns(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            return set(COLUMNS) <= {name.strip() for name in next(csv.reader([file.readline(FIRST_LINE)]), [])}
    except (OSError, csv.Error):
        return False


# --- JSON lines ---


def _read_jsonl(path: Path) -> Table:
    lines = enumerate(read_text(path, "caption file").split("\n"), 1)  # JSON's strings may hold other line breaks
    records = {number: _record(path, number, line) for number, line in lines if line.strip()}
    dir_name = _dir_name(path, [*next(iter(records.values()), COLUMNS)])
    cells = [(record.get(dir_name), record.get("text")) for record in records.values()]
    # dtype object, because pandas would turn a column of 7 and null into 7.0 and NaN
    frame = pandas.DataFrame(cells, index=[*records], columns=[*COLUMNS], dtype=object)
    return _as_table(path, frame, "line")


def _record(path: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = escaped(getattr(error, "msg", error), 200)
        raise UserError(f"{quoted(path, 200)} line {number} is not JSON: {problem}") from None
    if not isinstance(record, dict):
        raise UserError(f"{quoted(path, 200)} line {number} is not a JSON object with the columns {','.join(COLUMNS)}")
    return record


def _jsonl_has_columns(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            names = json.loads(file.readline(FIRST_LINE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(names, dict) and _has_names(names)


# --- Parquet ---


def _read_parquet(path: Path) -> Table:
    dir_name = _dir_name(path, _parquet_names(path))
    try:
        with open(path, "rb") as file:
            # nullable types, because a whole number beside null would become a fraction
            frame = pandas.read_parquet(
                file, engine="pyarrow", columns=[dir_name, "text"], dtype_backend="numpy_nullable"
            )
    except Exception as error:  # pyarrow raises all sorts of exceptions on a broken file
        raise UserError(f"{quoted(path, 200)} cannot be read as Parquet: {_first_line(error)}") from error
    frame = frame.rename(columns={dir_name: "dir"}).reset_index(drop=True)
    frame.index += 1
    return _as_table(path, frame, "row")


def _parquet_names(path: Path) -> list[str]:
    """The names of a Parquet file's columns, without its rows."""
    try:
        from pyarrow import parquet
    except ImportError:
        advice = '`pip install "pyarrow<22"`, or save the captions as CSV'
        raise UserError(f"{quoted(path, 200)} is Parquet, which needs pyarrow: {advice}") from None
    try:
        return parquet.read_schema(path).names
    except Exception as error:
        raise UserError(f"{quoted(path, 200)} cannot be read as Parquet: {_first_line(error)}") from error


def _parquet_has_columns(path: Path) -> bool:
    try:
        return _has_names(_parquet_names(path))
    except UserError:
        return True  # the reader says what is wrong


def _first_line(error: Exception) -> str:
    return escaped((str(error).splitlines() or [type(error).__name__])[0], 200)


# --- what the kinds share ---


@dataclass(frozen=True)
class Kind:
    """How a kind of caption file is read, and how one finds out whether it has the columns."""

    read: Callable[[Path], Table]
    has_columns: Callable[[Path], bool]


KINDS = {
    ".csv": Kind(_read_csv, _csv_has_columns),
    ".jsonl": Kind(_read_jsonl, _jsonl_has_columns),
    ".parquet": Kind(_read_parquet, _parquet_has_columns),
}


def _has_names(names) -> bool:
    return "text" in names and ("dir" in names or FOREIGN_DIR in names)


def _dir_name(path: Path, names: list[str]) -> str:
    """What the column `dir` is called among these names; UserError where a column is missing."""
    if not _has_names(names):
        raise UserError(f"{quoted(path, 200)} {_lack(names, FOREIGN_DIR)}")
    return "dir" if "dir" in names else FOREIGN_DIR


def _as_table(path: Path, frame: pandas.DataFrame, unit: str) -> Table:
    """A table of cells of any type, null as the empty caption and numbers as text; `unit` is what the index counts."""
    frame = frame[[*COLUMNS]].astype(object)
    rows = frame.apply(lambda column: column.map(_as_text))
    wrong = rows.isna()
    if wrong.to_numpy().any():
        row = wrong.any(axis=1).idxmax()
        name = wrong.loc[row].idxmax()
        problem = f"{name} is {escaped(frame.loc[row, name])}, which is not text"
        raise UserError(f"{quoted(path, 200)} {unit} {row}: {problem}: write a string")
    rows["dir"] = rows["dir"].map(str.strip)
    filled = (rows["dir"] != "") | (rows["text"].map(str.strip) != "")
    return Table(path, rows[filled], lambda row: f"{unit} {row}")


def _as_text(value: object) -> str | None:
    """A cell as text, "" for null; None where it is neither text, number nor null."""
    if isinstance(value, str):
        whole = "\0" not in value and value.encode("utf-8", "ignore").decode() == value  # no half of a surrogate pair
        return value if whole else None
    if value is None or value is pandas.NA:
        return ""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return str(value) if value == value else ""  # NaN alone is unequal to itself
    return None


def _separated(header: list[str]) -> str | None:
    """What is wrong with the separators of a CSV's header; None where they are commas."""
    first = ",".join(header)
    if first.lower().startswith("sep="):
        return f"begins with the line {quoted(first)}: delete that line, and separate the columns by commas"
    for separator, name in SEPARATORS.items():
        if separator in first:
            return f"has its columns separated by {name}, {quoted(first)}: save it with commas"
    return None


def _lack(header: list[str], also_dir: str = "dir") -> str:
    """Which columns a header lacks, where `also_dir` is as good as `dir`, and what to do about it."""
    missing = [name for name in COLUMNS if name not in header and not (name == "dir" and also_dir in header)]
    advice = [
        f"rename {quoted(other)} to {name}"
        for name in missing
        for other in [other for other in header if other.lower() in OTHER_NAMES[name]][:1]
    ]
    have = escaped(",".join(header) or "none")
    return f"lacks the column {' and '.join(missing)}: " + "; ".join([f"it has {have}", *advice])
