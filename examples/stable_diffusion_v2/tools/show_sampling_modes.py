"""The sheet of docs/sampling_modes.md: what a drawing can begin with, shown with the embedded tiny model.

    python tools/show_sampling_modes.py [--output_path output/modes]

It runs text_to_image.py with a prompt file. The sheet is OUTPUT/sheet.png.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.config.options import Parser
from ldm.pictures import GAP, read_png, save_png

HERE = Path(__file__).resolve().parents[1]
TEST = Path("datasets/emoji/noto/test")  # of HERE, without blanks for the prompt file
TILE, HEAD, LEFT = 128, 24, 110
STRENGTHS = 0.1, 0.2, 0.3, 0.5
CHANGED = "tomato.png", "a drawing of an apple, green, noto style"
MASKED = "tomato.png", "a drawing of a tomato, red, noto style"
SAMPLER = ["--version", "tiny", "--sampling_steps", "20", "--batch_size", "1", "--n_iter", "1", "--n_samples", "1"]


def main() -> None:
    args = _options()
    out = Path(args.output_path)
    out.mkdir(parents=True, exist_ok=True)
    changed, masked = TEST / CHANGED[0], TEST / MASKED[0]
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((0, 0, 63, 27), 255)
    mask.save(out / "mask.png")
    lines = [f"{CHANGED[1]} | init_image={changed} strength={strength} seed=1" for strength in STRENGTHS]
    lines += [f"{MASKED[1]} | init_image={masked} mask={out / 'mask.png'} seed={seed}" for seed in (1, 2, 3)]
    (out / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    drawn = _run(out, "--data_path", out / "prompts.txt")
    rows = [
        (
            "--init_image",
            ["the picture", *(f"strength {s}" for s in STRENGTHS)],
            [read_png(HERE / changed), *drawn[:4]],
        ),
        ("--mask", ["the picture", "the mask", "seed 1", "2", "3"], [read_png(HERE / masked), _rgb(mask), *drawn[4:7]]),
    ]
    save_png(_sheet(rows), out / "sheet.png")
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


def _rgb(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask.convert("RGB"))


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
