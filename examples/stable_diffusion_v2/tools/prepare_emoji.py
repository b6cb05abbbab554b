"""Render the emoji data set in `datasets/emoji` anew from the four published emoji sets.

The pictures come from npm packages (exact versions in `SETS`), the names from emojibase-data. To repeat it:

    mkdir /tmp/packages
    npm pack --pack-destination /tmp/packages @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
        @iconify-json/fluent-emoji-flat@1.2.6 openmoji@17.0.0 emojibase-data@17.0.0
    pip install pillow==13.0.0 resvg-py==0.5.0 tqdm
    python tools/prepare_emoji.py --packages /tmp/packages --check

With these versions `--check` finds every committed file equal byte for byte. Another version of the renderer or of
Pillow may round a few pixels differently. `--output_path` writes the files instead of comparing them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.emoji_concepts import caption, main_colour, plain_code, read_concepts

DATASET = Path(__file__).resolve().parents[1] / "datasets" / "emoji"
SIZE = 64  # pixels of a side
COLOURS = 128  # of the palette
MARGIN = 1.08  # the cropped square is this much wider than the drawing
NAMES_PACKAGE = "emojibase-data@17.0.0"


@dataclass(frozen=True)
class EmojiSet:
    """One source: where its files go, the npm package, and the word that captions call its style ("" for none)."""

    folder: str
    package: str
    style: str
    is_base: bool  # a base set trains on every concept; the other one holds the test concepts out


SETS = (
    EmojiSet("noto", "@iconify-json/noto@1.2.9", "noto", is_base=True),
    EmojiSet("twemoji", "@iconify-json/twemoji@1.2.5", "twemoji", is_base=True),
    EmojiSet("fluent", "@iconify-json/fluent-emoji-flat@1.2.6", "fluent", is_base=True),
    EmojiSet("openmoji", "openmoji@17.0.0", "", is_base=False),
)


# --- the pictures ---


def read_drawings(package: dict[str, bytes]) -> dict[str, str]:
    """The SVG source of every drawing by its code."""
    if "icons.json" in package:
        return _iconify_drawings(json.loads(package["icons.json"]), json.loads(package["chars.json"]))
    svg_files = {path: data for path, data in package.items() if path.startswith("color/svg/")}
    return {plain_code(Path(path).stem): data.decode() for path, data in svg_files.items()}


def _iconify_drawings(icons: dict, names: dict[str, str]) -> dict[str, str]:
    drawings = {}
    for code, name in names.items():
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        height = icon.get("height", icons.get("height", 16))
        width = icon.get("width", icons.get("width", icons.get("height", 16)))
        drawings[plain_code(code)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
            f'width="{width}" height="{height}">{icon["body"]}</svg>'
        )
    return drawings


def rasterize(svg: str) -> Image.Image:
    """The drawing with transparency, four times larger than the final picture."""
    import resvg_py  # only this tool needs it, and only to render

    data = resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE, height=4 * SIZE)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def to_png(drawing: Image.Image) -> bytes:
    """Crop to the drawing's square plus a margin, put it on white, scale it down, reduce it to a palette."""
    left, top, right, bottom = drawing.getchannel("A").getbbox()
    x, y, radius = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) * MARGIN / 2
    square = drawing.crop(tuple(round(edge) for edge in (x - radius, y - radius, x + radius, y + radius)))
    side = max(square.size)  # rounding may leave the crop one pixel off square
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(square, ((side - square.width) // 2, (side - square.height) // 2))
    picture = canvas.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS).quantize(COLOURS)
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    return png.getvalue()


# --- the files ---


def read_package(folder: Path, spec: str) -> dict[str, bytes]:
    """The files of an npm package as `npm pack` leaves it, by their path within the package."""
    path = folder / (spec.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.is_file():
        sys.exit(f"error: {path} is missing: run `npm pack {spec}` in {folder}")
    wanted = re.compile(r"package/(icons\.json|chars\.json|en/(data|messages)\.json|color/svg/[^/]+\.svg)")
    with tarfile.open(path) as archive:
        members = [member for member in archive if wanted.fullmatch(member.name)]
        return {member.name[len("package/") :]: archive.extractfile(member).read() for member in members}


def to_csv(rows: list[tuple[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("dir", "text"), *rows])
    return text.getvalue().encode()


def combine(files: dict[str, bytes], folders: list[str]) -> bytes:
    """One `img_txt.csv` for several folders that each have one: the training data of the base model."""
    rows = []
    for folder in folders:
        text = files[f"{folder}/img_txt.csv"].decode()
        rows += [(f"{folder}/{row['dir']}", row["text"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
    return to_csv(rows)


def render(packages: Path) -> dict[str, bytes]:
    """All files of the data set by their path, of the concepts that every set draws."""
    drawings = {s: read_drawings(read_package(packages, s.package)) for s in SETS}
    concepts = [
        c for c in read_concepts(read_package(packages, NAMES_PACKAGE)) if all(c.code in d for d in drawings.values())
    ]
    files: dict[str, bytes] = {}
    for emoji_set in SETS:
        rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for concept in tqdm(concepts, desc=emoji_set.folder, unit=" pictures"):
            drawing = rasterize(drawings[emoji_set][concept.code])
            png, text = to_png(drawing), caption(concept.label, main_colour(drawing), emoji_set.style)
            in_part = {"test": concept.is_test, "train": emoji_set.is_base or not concept.is_test}
            for part in (part for part, is_in in in_part.items() if is_in):
                files[f"{emoji_set.folder}/{part}/{concept.file_name}"] = png
                rows[part].append((concept.file_name, text))
        files.update({f"{emoji_set.folder}/{part}/img_txt.csv": to_csv(rows[part]) for part in rows})
    files["img_txt.csv"] = combine(files, [f"{s.folder}/train" for s in SETS if s.is_base])
    return files


def check(files: dict[str, bytes], folder: Path) -> None:
    """Exit with an error where the folder lacks a rendered file or holds another one of its name."""
    differing = [
        path for path, data in files.items() if not (folder / path).is_file() or (folder / path).read_bytes() != data
    ]
    if differing:
        sys.exit(f"error: {len(differing)} of {len(files)} files differ from {folder}, the first is {differing[0]}")
    print(f"all {len(files)} files are equal to those in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder with the five .tgz files of `npm pack`")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help=f"compare with the files in {DATASET}")
    action.add_argument("--output_path", type=Path, help="folder to write the data set to")
    args = parser.parse_args()

    files = render(args.packages)
    if args.check:
        check(files, DATASET)
        return
    for path, data in files.items():
        target = args.output_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    print(f"{len(files)} files are in {args.output_path}")


if __name__ == "__main__":
    main()
