"""YAML files of the user: found, read strictly, written readably; and the nearest known name for a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from ldm.errors import UserError
from ldm.files import replacing

SCRIPTS = Path(__file__).resolve().parents[1]  # the folder the commands are run from


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-5` is a number, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Tuples as lists on one line; quotes around text that `_Loader` would take for a number."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
for _class in (_Loader, _Dumper):
    _number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+0123456789"))


def search(path: str | Path) -> Path | None:
    """A file named in a command or in a config: as seen from here, else from the scripts' folder; None if neither."""
    return next((place for place in (Path(path), SCRIPTS / path) if place.is_file()), None)


def find_file(path: str | Path) -> Path:
    """`search`, where a file that is not there is the user's mistake."""
    found = search(path)
    if found is None:
        places = " or ".join(dict.fromkeys((str(Path.cwd()), str(SCRIPTS))))
        raise UserError(f"there is no file {path}" + ("" if Path(path).is_absolute() else f" in {places}"))
    return found


def read_yaml(path: Path) -> dict:
    """The keys and values of a YAML file; UserError if it cannot be read, with the line where it cannot be parsed."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not a text file") from None


def parse_yaml(text: str, source: str) -> dict:
    """`read_yaml` for text that is at hand; `source` says in messages where it came from."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{source}{line}: {e.problem}") from None
    except (yaml.YAMLError, ValueError) as e:  # an unprintable character; an impossible date
        raise UserError(f"{source}: {str(e).splitlines()[0]}") from None
    if not isinstance(data, (dict, type(None))):
        raise UserError(f"{source} must hold keys and values, not one {type(data).__name__}")
    return data or {}


def dump_yaml(data: dict) -> str:
    """YAML text, keys in their order; the same text for the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def save_yaml(data: dict, path: str | Path) -> None:
    """Writes the file whole or not at all; UserError where that cannot be."""
    with replacing(path) as file:
        file.write(dump_yaml(data).encode())


def nearest(name: object, known: Iterable[str]) -> str:
    """The one of the known names that looks most like a wrong one."""
    return difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
