"""YAML files of the user: found, read strictly, written readably; and the nearest known name for a wrong one."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Hashable, Iterable
from pathlib import Path

import yaml

from ldm.errors import UserError
from ldm.files import escaped, quoted, replacing

SCRIPTS = Path(__file__).resolve().parents[2]  # the folder the commands are run from


LONGEST = 1_000_000  # characters of a file
LONGEST_CARRIED = 100_000  # of a text that a checkpoint carries; PyYAML needs a second for it
LARGEST = 1_000_000  # values and characters, counted wherever an alias brings them again
DEEPEST = 64  # sections in sections
LONGEST_NAME = 100  # characters that are compared with known names
LONGEST_NUMBER = 100  # characters; PyYAML needs minutes for the longest
_TAGS = "tag:yaml.org,2002:"
_TEXT, _MERGE = _TAGS + "str", _TAGS + "merge"


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-5` is a number, as in YAML 1.2, and a key given twice is an error.

    What would need much memory or time is an error too: deep nesting, endless numbers, aliases of aliases.
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
        """Count what begins with this event."""
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
    """For the text that a checkpoint carries, which a program has written: plain values alone, and no aliases."""

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

    A name that no file can have is one that is not there: `os.path` says so where `Path` raises.
    """
    return next((place for place in (Path(path), SCRIPTS / path) if os.path.isfile(place)), None)


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
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {path}: it is not a text file") from None
    return _parse(text, str(path), _Loader, LONGEST)


def parse_carried(text: str, source: str) -> dict:
    """The keys and values of YAML text that a checkpoint carries; `source` says in messages where it came from.

    They are words, finite numbers, truth values and nothing, in lists and sections. UserError where the text has
    anything else, such as aliases and tags, is too long, or cannot be parsed.
    """
    return _parse(text, source, _CarriedLoader, LONGEST_CARRIED)


def _parse(text: str, source: str, loader: type[_Loader], longest: int) -> dict:
    if len(text) > longest:
        raise UserError(f"{source} has more than {longest:,} characters, which is too long for options or a model")
    try:
        data = yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{source}{line}: {escaped(e.problem, 200)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # for instance an unprintable character
        raise UserError(f"{source}: {escaped(str(e).splitlines()[0], 200)}") from None
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
    return difflib.get_close_matches(str(name)[:LONGEST_NAME], known, n=1, cutoff=0.0)[0]
