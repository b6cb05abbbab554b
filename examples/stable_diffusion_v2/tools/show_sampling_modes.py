"""The sheet of docs/sampling_modes.md: what a drawing can begin with, shown with the embedded tiny model.

    python tools/show_sampling_modes.py [--output_path output/modes]

It runs text_to_image.py with a prompt file. The sheet is OUTPUT/sheet.png.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.config.options import Parser
from ldm.pictures import GAP, read_png, save_png

HERE = Path(__file__).resolve().parents[1]
EMOJI = Path("datasets/emoji/noto/train")  # of HERE, without blanks for the prompt file
TILE, HEAD, LEFT = 128, 24, 130
STRENGTHS = 0.1, 0.2, 0.3, 0.6
MASKED = "medical mask", "tongue", "open mouth"
HIRES = 0.05, 0.1
SAMPLER = ["--version", "tiny", "--sampling_steps", "20", "--batch_size", "1", "--n_iter", "1", "--n_samples", "1"]

Cells = list[tuple[str, str]]  # of a row: the word above a picture, and its file or its line of the prompt file


def from_picture(name: str, caption: str) -> Cells:
    picture = EMOJI / name
    line = f"{caption} | seed=1 init_image={picture} strength="
    return [("the picture", str(picture)), *((f"strength {by}", f"{line}{by}") for by in STRENGTHS)]


def masked(name: str, mask: Path) -> Cells:
    picture = EMOJI / name
    line = "a drawing of a face with {}, yellow, noto style | seed=1 init_image={} mask={}"
    cells = [(what, line.format(what, picture, mask)) for what in MASKED]
    return [("the picture", str(picture)), ("the mask", str(mask)), *cells]


def larger(caption: str) -> Cells:
    line = f"{caption} | seed=1"
    cells = [(f"strength {by}", f"{line} hires_scale=1.5 hires_strength={by}") for by in HIRES]
    return [("64x64", line), *cells, ("96x96 at once", f"{line} H=96 W=96")]


def rows(mask: Path) -> list[tuple[str, Cells]]:
    """What stands before each row, and its pictures."""
    return [
        ("--init_image", from_picture("grinning-face.png", "a drawing of an angry face with horns, pink, noto style")),
        ("--init_image", from_picture("red-heart.png", "a drawing of a blue heart, noto style")),
        ("--mask", masked("grinning-face.png", mask)),
        ("--hires_scale 1.5", larger("a drawing of a fox, orange, noto style")),
    ]


def main() -> None:
    args = _options()
    out = Path(args.output_path).resolve()
    out.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((0, 34, 63, 63), 255)
    mask.save(out / "mask.png")
    wanted = rows(Path(os.path.relpath(out / "mask.png", HERE)))
    lines = [line for _, row in wanted for _, line in row if " | " in line]
    (out / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    drawn = dict(zip(lines, _run(out, "--data_path", out / "prompts.txt")))
    sheet = [
        (name, [word for word, _ in row], [drawn[line] if line in drawn else read_png(HERE / line) for _, line in row])
        for name, row in wanted
    ]
    save_png(_sheet(sheet), out / "sheet.png")
    print(f"the sheet is {out / 'sheet.png'}")


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_path", default="output/modes")
    return parser.parse_args()


def _run(folder: Path, *words) -> list[np.ndarray]:
    """The pictures that text_to_image.py draws into a folder; those that are there are kept."""
    command = [sys.executable, str(HERE / "text_to_image.py"), *SAMPLER, "--output_path", folder, "--resume"]
    subprocess.run([*map(str, command), *map(str, words), "--skip_grid"], cwd=HERE, check=True)
    return [read_png(path) for path in sorted((folder / "samples").glob("*.png"))]


def _sheet(rows: list[tuple[str, list[str], list[np.ndarray]]]) -> Image.Image:
    """Rows of pictures with a word above each, all of them TILE pixels wide."""
    columns = max(len(pictures) for _, _, pictures in rows)
    size = LEFT + columns * (TILE + GAP), len(rows) * (HEAD + TILE + GAP)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(sheet)
    for row, (name, words, pictures) in enumerate(rows):
        top = row * (HEAD + TILE + GAP)
        draw.text((LEFT - 10, top + HEAD + TILE / 2), name, "black", font, anchor="rm")
        for column, (word, picture) in enumerate(zip(words, pictures)):
            left = LEFT + column * (TILE + GAP)
            draw.text((left + TILE / 2, top + HEAD / 2), word, "black", font, anchor="mm")
            sheet.paste(Image.fromarray(picture).resize((TILE, TILE), Image.BICUBIC), (left, top + HEAD))
    return sheet


if __name__ == "__main__":
    main()
