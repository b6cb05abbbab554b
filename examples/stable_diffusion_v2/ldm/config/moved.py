"""The answer of scripts at paths where MindONE has a script: the command that does the same here."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

DRAWING = {  # names in MindONE's scripts that draw from a picture
    "--image": "--init_image",
    "--save_path": "--output_path",
    "--num_samples": "--n_samples",
    "--sample_steps": "--sampling_steps",
    "--guidance_scale": "--scale",
    "--ms_mode": "--mode",
    **dict.fromkeys(("--version", "-v", "--aug", "--img_size", "--save_graph")),
}


def answer(
    script: str, names: Mapping[str, str | None] | None = None, note: str = "", words: Sequence[str] = ()
) -> NoReturn:
    """Print the command that does the same here as MindONE's script, and end with exit code 2.

    Args:
        script: ours.
        names: as in `translated`.
        note: what else there is to know.
        words: options that MindONE's script does not need.
    """
    command = shlex.join([script, *words, *translated(sys.argv[1:], names or {})])
    line = f"error: this is {script} here: python {command}"
    print(line + (f" ({note})" if note else ""), file=sys.stderr)
    sys.exit(2)


def translated(words: Sequence[str], names: Mapping[str, str | None]) -> list[str]:
    """A command's words with our names of the options.

    Args:
        words: the command line without the script's name.
        names: MindONE's options that have another name here. "": ours takes the value alone, in the order of `names`.
            None: there is none. Other options keep their names.
    """
    given, words = [], list(words)
    while words:
        option, equals, value = words.pop(0).partition("=")
        values = [value] if equals else []
        while words and not words[0].startswith("-"):
            values.append(words.pop(0))
        given.append((option, values))
    alone = [name for name in names if names[name] == ""]
    result = [value for name in alone for option, values in given if option == name for value in values]
    for option, values in given:
        name = names.get(option, option)
        result += [name, *values] if name else []
    return result
