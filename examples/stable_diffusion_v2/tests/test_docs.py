"""The pages: their links lead somewhere, and their commands name scripts and options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import text_to_image
import train_autoencoder
import train_distillation
import train_text_to_image

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in HERE.rglob("*.md") if "output" not in path.parts)]
PARSERS = {
    module.__name__ + ".py": module.build_parser
    for module in (text_to_image, train_autoencoder, train_distillation, train_text_to_image)
}


def commands(text: str) -> list[list[str]]:
    """The words of every command in the page's indented blocks; lines that end in a backslash go on."""
    block = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in block.splitlines() if line.startswith("    ")]
    lines = [line.split(" | ")[0] for line in lines if line.startswith(("python ", "scripts/"))]
    return [shlex.split(line, comments=True) for line in lines]


def options_of(script: Path) -> set[str]:
    """The options of a script: its parser's; or those in its source and in what it shares or hands on."""
    if script.name in PARSERS:
        return {option for action in PARSERS[script.name]()._actions for option in action.option_strings}
    sources = [script, *HERE.glob("eval/*.py"), *HERE.glob("tools/ascend_checks/*.py"), *HERE.glob("ldm/parallel/*.py")]
    sources += [HERE / "ldm/runtime.py", HERE / "ldm/config/model.py"]
    own = re.findall(r'"(--?\w[\w-]*)"', "".join(path.read_text(encoding="utf-8") for path in sources))
    return {*own, "--"}.union(*map(options_of, map(Path, PARSERS)))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`|(?m:^ {4,}.*$)", "", page.read_text(encoding="utf-8"))  # without code
    links = re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_what_exists(page):
    for words in commands(page.read_text(encoding="utf-8")):
        name, *given = words[1:] if words[0] == "python" else words
        if name.startswith("-"):  # python -c, python -m
            continue
        script = next((path for path in (HERE / name, page.parent / name) if path.exists()), None)
        assert script, f"there is no {name}"
        known = options_of(script)
        assert [word for word in given if re.match(r"--?[a-zA-Z]", word) and word not in known] == [], " ".join(words)


def test_the_map_names_every_file():
    text = (HERE / "docs/architecture.md").read_text(encoding="utf-8")
    files = {path.stem for pattern in ("ldm/**/*.py", "eval/*.py", "tools/*.py", "*.py") for path in HERE.glob(pattern)}
    assert [name for name in sorted(files - {"__init__"}) if not re.search(rf"\b{name}\b", text)] == []
