"""Options of the scripts: defaults, then the YAML file named by `--train_config`, then the command line.

A value in the file is checked like one on the command line. One line answers a mistake in either.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldm.config.mindone import is_placeholder, remarks
from ldm.config.yaml_file import find_file, nearest, read_yaml
from ldm.errors import UserError
from ldm.files import escaped, quoted

log = logging.getLogger(__name__)

_IS_PATH = re.compile(r"(path|dir|config|cfg)$|^resume$")  # names of options that take a file or a folder
_OTHER_WORDS = {  # other programs' names of options, where ours look different
    "learning_rate": "start_learning_rate",
    "lr": "start_learning_rate",
    "lr_scheduler": "scheduler",
    "lr_warmup_steps": "warmup_steps",
    "batch_size": "train_batch_size",
    "max_steps": "train_steps",
    "max_train_steps": "train_steps",
    "num_train_epochs": "epochs",
    "train_data_dir": "data_path",
    "output_dir": "output_path",
    "outdir": "output_path",
    "resolution": "image_size",
    "resume_from_checkpoint": "resume",
    "mixed_precision": "dtype",
    "precision": "dtype",
    "ckpt": "ckpt_path",
    "steps": "sampling_steps",
    "num_inference_steps": "sampling_steps",
    "guidance_scale": "scale",
    "cfg_scale": "scale",
    "image": "init_image",
    "image_path": "init_image",
    "mask_image": "mask",
    "mask_path": "mask",
    "denoising_strength": "strength",
    "num_samples": "n_samples",
    "sample_steps": "sampling_steps",
    "height": "H",
    "width": "W",
}


class HelpFormatter(argparse.HelpFormatter):
    """Adds each option's default to its help, unless there is none or the help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or action.default in (None, "", [], argparse.SUPPRESS):
            return text
        return text if "default:" in text else f"{text} (default: %(default)s)"


class _Store(argparse.Action):
    """An option with a value. A yes-or-no option without a value is True. `~` and `$HOME` in a path are the user's
    folder."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings):
        if settings.get("type") is str2bool:
            settings = {"nargs": "?", "const": True, **settings}
        elif settings.get("type") is None and _IS_PATH.search(dest):
            settings["type"] = path
        super().__init__(option_strings, dest, **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers a mistake with one line and the nearest option, and guesses no abbreviations."""

    def __init__(self, description: str | None = None, add_help: bool = True):
        super().__init__(description=description, add_help=add_help, allow_abbrev=False, formatter_class=HelpFormatter)
        for word in (None, "store"):
            self.register("action", word, _Store)
        self.ignored: dict[str, str] = {}
        self.refused: dict[str, str] = {}

    def ignore(self, options: dict[str, str]) -> None:
        """Accepts options (name: reason) that have no effect; `read_options` warns where one is given."""
        self._add_hidden(options)
        self.ignored.update(options)

    def refuse(self, options: dict[str, str]) -> None:
        """Knows options (name: reason) that are not available; `read_options` raises where one is asked for."""
        self._add_hidden(options)
        self.refused.update(options)

    def _add_hidden(self, names: Iterable[str]) -> None:
        for name in names:
            self.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def nearest(self, name: str) -> str:
        """The visible option that a wrong name most likely means, by its meaning or by its look."""
        known = [name for name, action in self.options().items() if action.help != argparse.SUPPRESS]
        other = _OTHER_WORDS.get(name.lstrip("-").replace("-", "_").lower())
        return other if other in known else nearest(name.lstrip("-"), known)

    def options(self) -> dict[str, argparse.Action]:
        """Every option but --help by its name in the parsed result."""
        return {action.dest: action for action in self._actions if action.option_strings and action.dest != "help"}

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            wrong = next((arg.split("=")[0] for arg in unknown if arg.startswith("-")), None)
            if wrong is None:
                self.error(f"unexpected {unknown[0]!r}: it belongs to no option (a text with spaces needs quotes)")
            self.error(f"unknown option {wrong}; the nearest known option is --{self.nearest(wrong)}")
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
    raise argparse.ArgumentTypeError(f"expected True or False, got {quoted(text)}")


def seed(text: str) -> int:
    """A whole number from 0, or -1, which `randomness.settled_seed` replaces; for `type=`."""
    if not text.strip().isdecimal() and text.strip() != "-1":
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0, or -1 to draw one, not {quoted(text)}")
    return int(text)


def whole(text: str) -> int:
    """A whole number, also written as 1000.0; for `type=`."""
    try:
        number = float(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, got {quoted(text)}")


def steps_or_share(text: str) -> int | float:
    """A number of steps, or a share of all steps below 1; for `type=`."""
    try:
        return whole(text)
    except argparse.ArgumentTypeError:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < 1:
                return float(text)
    wanted = "a number of steps, or a share of them between 0 and 1"
    raise argparse.ArgumentTypeError(f"expected {wanted}, got {quoted(text)}")


def path(text: str) -> str:
    """A file or a folder; `~` and variables such as `$HOME`, which a shell has left, are replaced."""
    return text if os.path.lexists(text) else os.path.expanduser(os.path.expandvars(text))


def require_at_least(lowest: int, args: argparse.Namespace, *names: str) -> None:
    """UserError where one of these options is below `lowest`; None is allowed."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"{name} is {value}; it must be at least {lowest}")


def read_options(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command. The command line goes before the `--train_config` file, the file before the defaults.

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
    file = finder.parse_known_args(argv)[0].train_config
    values = _read_values(parser, find_file(file)) if file else {}
    options = parser.parse_args(argv, argparse.Namespace(**values))
    for name, reason in parser.refused.items():
        if _is_wanted(options, name):
            raise UserError(f"--{name} is not available here: {reason}")
    for name, reason in parser.ignored.items():
        if hasattr(options, name):
            log.warning("the option %s has no effect here: %s", name, reason)
    for line in remarks(values, options):
        log.warning("%s: %s", file, line)
    for name in (*parser.refused, *parser.ignored):
        if hasattr(options, name):
            delattr(options, name)
    return options


def _is_wanted(options: argparse.Namespace, name: str) -> bool:
    """Whether a refused option was given, with a value that switches it on."""
    if not hasattr(options, name):
        return False
    value = getattr(options, name)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value  # a flag alone is an empty list
    return str(value).strip().lower() not in ("", "false", "no", "none", "0")


def _read_values(parser: Parser, file: Path) -> dict:
    """The file's values, each of the type that its option gives it."""
    options = parser.options()
    values = {}
    for key, value in read_yaml(file).items():
        if key == "model" and isinstance(value, dict):
            option = "model_config" if "model_config" in options else "config"
            raise UserError(f"{file} describes a model, not a run: give it as --{option}, not as --train_config")
        if key not in options:
            near = parser.nearest(str(key))
            raise UserError(f"{file}: unknown key {quoted(key)}; the nearest known option is '{near}'")
        if value is None:
            continue
        if is_placeholder(value):
            log.info("%s: %s says %s, which is a placeholder and counts as not given", file, key, escaped(value))
            continue
        hidden = key in parser.ignored or key in parser.refused
        try:
            values[key] = value if hidden else _convert(options[key], value)
        except ValueError as e:
            raise UserError(f"{file}: '{key}': {e}") from None
        options[key].required = False
    return values


def _convert(action: argparse.Action, value: Any) -> Any:
    """A YAML value through an option's `nargs`, `type` and `choices`; ValueError if it does not pass."""
    if action.nargs == 0:  # a flag such as --ddim
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {quoted(value)}")
        return value
    if action.nargs in (None, "?"):
        return _convert_one(action, value)
    items = value if isinstance(value, list) else [value]
    if isinstance(action.nargs, int) and len(items) != action.nargs:
        raise ValueError(f"expected {action.nargs} values, got {quoted(value)}")
    return [_convert_one(action, item) for item in items]


def _convert_one(action: argparse.Action, value: Any) -> Any:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"expected one value, got {quoted(value)}")
    if "\0" in str(value):
        raise ValueError(f"{quoted(value)} holds a NUL, which no file and no word has")
    convert = action.type or str
    try:
        converted = convert(str(value))
    except argparse.ArgumentTypeError as e:
        raise ValueError(e) from None
    except (TypeError, ValueError):
        raise ValueError(f"expected {getattr(convert, '__name__', 'another value')}, got {quoted(value)}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{quoted(value)} is none of {', '.join(map(str, action.choices))}")
    return converted
