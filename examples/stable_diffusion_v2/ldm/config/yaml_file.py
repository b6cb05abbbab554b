"""YAML files of the user: found, read strictly, written readably; and the nearest known name for a wrong one.

PyYAML parses the text within bounds. OmegaConf replaces interpolations by their values: `${key}` is another value of
the file, `${oc.env:NAME}` a variable of the environment.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import UserError
from ldm.files import escaped, quoted, replacing

SCRIPTS = Path(__file__).resolve().parents[2]  # the folder the commands are run from


LONGEST = 1_000_000  # characters of a file
LONGEST_CARRIED = 100_000  # characters of a text that a checkpoint carries; PyYAML needs a second for it
LARGEST = 1_000_000  # values and characters; an alias counts as much as what it repeats
DEEPEST = 64  # sections in sections
LONGEST_NAME = 100  # characters that are compared with known names
LONGEST_NUMBER = 100  # characters; PyYAML needs minutes for the longest
MOST_INTERPOLATIONS = 20  # of a file: they can be nested, and 20 of them repeat a value 3^(20/3) = 1,517 times at most
LARGEST_INTERPOLATED = 10_000  # values and characters of a file with interpolations
INTERPOLATION = "${"
_TAGS = "tag:yaml.org,2002:"
_TEXT, _MERGE = _TAGS + "str", _TAGS + "merge"


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-5` is a number, as in YAML 1.2, and a key given twice is an error.

    Deep nesting, endless numbers and aliases of aliases are errors too, because they need much memory or time.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.size = 0
        self.sizes: dict[str, int] = {}  # by anchor

    def compose_node(self, parent, index):
        event, before = self.peek_event(), self.size
        self.check_event_of_node(event)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _problem(f"more than {DEEPEST} sections in one another", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if getattr(event, "anchor", None) and not isinstance(event, yaml.AliasEvent):
            self.sizes[event.anchor] = self.size - before
        return node

    def check_event_of_node(self, event: yaml.NodeEvent) -> None:
        """Add the event's value to the size, and refuse what becomes too large."""
        self.size += 1 + len(getattr(event, "value", ""))
        if not isinstance(event, yaml.AliasEvent):
            return
        if event.anchor in self.anchors and event.anchor not in self.sizes:
            raise _problem(f"the alias {quoted(event.anchor)} stands for something that it is a part of", event)
        self.size += self.sizes.get(event.anchor, 0)
        if self.size > LARGEST:
            raise _problem(f"its aliases stand for more than {LARGEST:,} values and characters", event)

    def construct_object(self, node, deep=False):
        if not isinstance(node, yaml.ScalarNode) or node.tag == _TEXT:
            return super().construct_object(node, deep)
        try:
            if len(node.value) > LONGEST_NUMBER:
                raise ValueError
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):  # PyYAML's, of a value like "abc"
            kind = escaped(node.tag.removeprefix(_TAGS))
            raise _problem(f"{quoted(node.value)} cannot be read as what it seems to be, {kind}", node) from None

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _problem("a list or a section cannot be a key", key_node)
            if key in seen:
                raise _problem(f"the key {quoted(key)} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _CarriedLoader(_Loader):
    """For the text that a checkpoint carries, which a program has written: plain values, no aliases, no `${...}`."""

    def check_event_of_node(self, event):
        super().check_event_of_node(event)
        for what in ("anchor", "tag"):
            if word := getattr(event, what, None):
                raise _problem(f"the {what} {quoted(word)} does not belong there", event)

    def construct_object(self, node, deep=False):
        value = super().construct_object(node, deep)
        if isinstance(value, float) and not math.isfinite(value):
            raise _problem(f"{quoted(node.value)} is no finite number", node)
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, (str, bool, int, float, type(None))):
            raise _problem(f"{quoted(node.value)} is neither a word nor a number", node)
        if isinstance(value, str) and INTERPOLATION in value:
            raise _problem(f"the interpolation {quoted(value)} does not belong there", node)
        return value


def _problem(text: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=where.start_mark)


class _Dumper(yaml.SafeDumper):
    """Tuples as lists on one line; quotes around text that `_Loader` would take for a number; no aliases."""

    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
for _class in (_Loader, _CarriedLoader, _Dumper):
    _number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+0123456789"))


def search(path: str | Path) -> Path | None:
    """A file named in a command or in a config: as seen from here, else from the scripts' folder; None if neither.

    A name that no file can have gives None too. `Path.is_file` would raise an error for it, `os.path.isfile` does not.
    """
    return next((place for place in (Path(path), SCRIPTS / path) if os.path.isfile(place)), None)


def find_file(path: str | Path) -> Path:
    """As `search`; UserError where there is no such file."""
    found = search(path)
    if found is None:
        places = " or ".join(dict.fromkeys((str(Path.cwd()), str(SCRIPTS))))
        raise UserError(f"there is no file {path}" + ("" if Path(path).is_absolute() else f" in {places}"))
    return found


def read_yaml(path: Path, interpolate: bool = True) -> dict:
    """The keys and values of a YAML file, with `interpolate` its interpolations replaced by their values.

    UserError where it cannot be read or parsed, with the line, and where an interpolation has no value.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not a text file") from None
    table = _table(_parse(text, str(path), _Loader, LONGEST), str(path))
    return interpolated(table, str(path)) if interpolate else table


def parse_value(text: str, source: str) -> Any:
    """One value, as it may stand behind a key of a YAML file; `source` names it in messages."""
    return _parse(text, source, _Loader, LONGEST)


def parse_carried(text: str, source: str) -> dict:
    """The keys and values of YAML text that a checkpoint carries; `source` says in messages where it came from.

    The values are words, finite numbers, truth values and null, in lists and sections. UserError where the text has
    anything else, such as aliases, tags and interpolations, is too long, or cannot be parsed.
    """
    return _table(_parse(text, source, _CarriedLoader, LONGEST_CARRIED), source)


def _parse(text: str, source: str, loader: type[_Loader], longest: int) -> Any:
    if len(text) > longest:
        raise UserError(f"{source} has more than {longest:,} characters, which is too long for options or a model")
    try:
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{source}{line}: {escaped(e.problem, 200)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # for instance an unprintable character
        raise UserError(f"{source}: {escaped(str(e).splitlines()[0], 200)}") from None


def _table(data: Any, source: str) -> dict:
    if not isinstance(data, (dict, type(None))):
        raise UserError(f"{source} must hold keys and values, not one {type(data).__name__}")
    return data or {}


def interpolated(data: dict, source: str) -> dict:
    """The same data, with every `${...}` replaced by the value that it stands for.

    UserError where it stands for nothing or for itself, or where there are so many that they might fill the memory.
    """
    values = list(_values(data))
    texts = [value for value in values if isinstance(value, str)]
    number = sum(text.count(INTERPOLATION) for text in texts)
    if not number:
        return data
    if number > MOST_INTERPOLATIONS or len(values) + sum(map(len, texts)) > LARGEST_INTERPOLATED:
        limits = f"at most {MOST_INTERPOLATIONS} ${{...}} and {LARGEST_INTERPOLATED:,} values and characters"
        raise UserError(f"{source}: a file with interpolations may have {limits}: write their values instead")
    try:
        return OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except OmegaConfBaseException as e:
        where = f"{quoted(e.full_key)}: " if e.full_key else ""
        reason = escaped(str(e).partition("\n")[0], 200)
        hint = "${KEY} is another value, ${oc.env:NAME} a variable of the environment, \\${ a plain ${"
        raise UserError(f"{source}: {where}{reason} ({hint})") from None


def _values(data: Any) -> Iterator[Any]:
    """Every value in sections and lists."""
    if isinstance(data, (dict, list, tuple)):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _values(value)
    else:
        yield data


def dump_yaml(data: dict) -> str:
    """YAML text, keys in their order; the same text for the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def save_yaml(data: dict, path: str | Path) -> None:
    """Writes the whole file, which `read_yaml` reads back as the same data; UserError where it cannot.

    The old file stays as it was then.
    """
    with replacing(path) as file:
        file.write(dump_yaml(_without_interpolations(data)).encode())


def _without_interpolations(data: Any) -> Any:
    """The data with every `${` escaped, so that OmegaConf reads it as plain text."""
    if isinstance(data, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", data)
    if isinstance(data, dict):
        return {key: _without_interpolations(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(map(_without_interpolations, data))
    return data


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that looks most like a wrong one."""
    return difflib.get_close_matches(str(name)[:LONGEST_NAME], known, n=1, cutoff=0.0)[0]
