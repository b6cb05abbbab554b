"""Options of the scripts: defaults, then the YAML file named by `--train_config`, then the command line.

A value in the file is checked as if it stood on the command line. A mistake in either is answered with one line.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldm.errors import UserError
from ldm.yaml_file import find_file, nearest, read_yaml

log = logging.getLogger(__name__)


class HelpFormatter(argparse.HelpFormatter):
    """Adds each option's default to its help, but where there is none or the help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or action.default in (None, "", [], argparse.SUPPRESS):
            return text
        return text if "default:" in text else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers a mistake with one line and the nearest option, and guesses no abbreviations."""

    def __init__(self, description: str | None = None, add_help: bool = True):
        super().__init__(description=description, add_help=add_help, allow_abbrev=False, formatter_class=HelpFormatter)
        self.ignored: dict[str, str] = {}

    def ignore(self, options: dict[str, str]) -> None:
        """Accepts options (name: reason) that have no effect; `read_options` warns of those that were given."""
        for name in options:
            self.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.ignored.update(options)

    def options(self) -> dict[str, argparse.Action]:
        """Every option but --help by its name in the parsed result."""
        return {action.dest: action for action in self._actions if action.option_strings and action.dest != "help"}

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            wrong = next((arg.split("=")[0] for arg in unknown if arg.startswith("-")), None)
            if wrong is None:
                self.error(f"unexpected {unknown[0]!r}: it belongs to no option (a text with spaces needs quotes)")
            known = [name for action in self.options().values() for name in action.option_strings]
            self.error(f"unknown option {wrong}; the nearest known option is {nearest(wrong, known)}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage; exit code 2."""
        self.exit(2, f"error: {message} (--help lists all options)\n")


def str2bool(text: str) -> bool:
    """Reads yes or no in the usual words; for `type=`."""
    word = text.strip().lower()
    if word in ("true", "yes", "on", "t", "y", "1"):
        return True
    if word in ("false", "no", "off", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def seed(text: str) -> int:
    """A whole number from 0; for `type=`."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0, not {text!r}")
    return int(text)


def require_at_least(lowest: int, args: argparse.Namespace, *names: str) -> None:
    """UserError where one of these options is below `lowest`; those that are None are left alone."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"{name} is {value}; it must be at least {lowest}")


def read_options(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command: what it does not say is taken from its `--train_config` file, then from the defaults.

    Args:
        parser: with the option `--train_config` if the script has such a file. The file's keys are the parser's
            options; a key without a value keeps the default.
        argv: the command line without the script's name; the process's own if None.

    Raises:
        UserError: for a mistake in the file, naming the file and the key.
        SystemExit: for a mistake in the command, with code 2 and one line on stderr.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--train_config", default=parser.get_default("train_config"))
    path = finder.parse_known_args(argv)[0].train_config
    values = _read_values(parser, find_file(path)) if path else {}
    options = parser.parse_args(argv, argparse.Namespace(**values))
    for name, reason in parser.ignored.items():
        if hasattr(options, name):
            delattr(options, name)
            log.warning("the option %s has no effect here: %s", name, reason)
    return options


def _read_values(parser: Parser, path: Path) -> dict:
    """The file's values, each of the type that its option gives it."""
    options = parser.options()
    values = {}
    for key, value in read_yaml(path).items():
        if key not in options:
            raise UserError(f"{path}: unknown key '{key}'; the nearest known option is '{nearest(key, options)}'")
        if value is None:
            continue
        try:
            values[key] = value if key in parser.ignored else _convert(options[key], value)
        except ValueError as e:
            raise UserError(f"{path}: '{key}': {e}") from None
        options[key].required = False
    return values


def _convert(action: argparse.Action, value: Any) -> Any:
    """A YAML value through an option's `nargs`, `type` and `choices`; ValueError if it does not pass."""
    if action.nargs == 0:  # a flag such as --ddim
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    if action.nargs in (None, "?"):
        return _convert_one(action, value)
    items = value if isinstance(value, list) else [value]
    if isinstance(action.nargs, int) and len(items) != action.nargs:
        raise ValueError(f"expected {action.nargs} values, got {value!r}")
    return [_convert_one(action, item) for item in items]


def _convert_one(action: argparse.Action, value: Any) -> Any:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"expected one value, got {value!r}")
    convert = action.type or str
    try:
        converted = convert(str(value))
    except argparse.ArgumentTypeError as e:
        raise ValueError(e) from None
    except (TypeError, ValueError):
        raise ValueError(f"expected {getattr(convert, '__name__', 'another value')}, got {value!r}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{value!r} is none of {', '.join(map(str, action.choices))}")
    return converted
