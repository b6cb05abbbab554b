"""Drawn pictures as files: numbered files that hold the facts of their making, grids, and sheets with captions.

The record of a run, the file RECORD beside its pictures, holds one line of JSON per picture: its file name and facts.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tempfile
import textwrap
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFilter, ImageFont, PngImagePlugin

from ldm.data.images import BadImageError, opened
from ldm.errors import UserError
from ldm.files import replacing

log = logging.getLogger(__name__)

GAP = 4
ENTRY = "text_to_image"  # the PNG text entry with the picture's facts, as in its line of the record
PARAMETERS = "parameters"  # A1111's; the entry of the facts too, in pictures of older versions
RECORD = "prompts.jsonl"
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # suffixes of drawn pictures, and Pillow's names
QUALITY = 95  # of JPEG and WebP
JPEG_ROOM = 65_533  # bytes of the EXIF data of a JPEG


def make_folder(path: str | Path) -> Path:
    """Make the folder where it does not exist, and write to it once. A run then fails at its start, not at its end.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".write-test-", dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output_path") from None
    return folder


def next_number(folder: Path) -> int:
    """One more than the highest number of the folder's files 00000.png, 00001.jpg, ...; 0 where there are none."""
    names = rf"\d{{5,}}\.({'|'.join(FORMATS)})"
    numbers = [int(path.stem) for path in folder.glob("*.*") if re.fullmatch(names, path.name)]
    return max(numbers, default=-1) + 1


def find_drawn(folder: Path, number: int) -> Path | None:
    """The file of that number, of whatever format; None where there is none."""
    paths = (folder / f"{number:05}.{suffix}" for suffix in FORMATS)
    return next((path for path in paths if path.exists()), None)


def save_png(
    picture: np.ndarray | Image.Image, path: Path, text: dict[str, str] | None = None, new: bool = False
) -> None:
    """Write a picture, uint8 [H, W, 3], whole or not at all, with `text` as PNG text entries.

    Raises:
        UserError: the file cannot be written, or with `new` it exists already.
    """
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    entries = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        entries.add_itxt(key, value)
    _write(picture, path, new, "PNG", pnginfo=entries)


def _exif(facts: dict, text: str) -> Image.Exif:
    """The facts as ImageDescription, the text as UserComment, as A1111 has it."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(facts)  # ASCII, as EXIF wants it
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def require_room(image_format: str, facts: dict, text: str) -> None:
    """UserError where a picture of this format has no room for its facts and text."""
    if image_format == "jpg" and len(_exif(facts, text).tobytes()) > JPEG_ROOM:
        raise UserError("a JPEG has no room for prompts of such length: --image_format png or webp has")


def _write(picture: Image.Image, path: Path, new: bool, form: str, **options) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    with replacing(path, new) as file:
        file.write(buffer.getbuffer())


def save_drawn(picture: np.ndarray, path: Path, facts: dict, parameters: str = "") -> None:
    """Write a picture with the facts of its making, then its line in the folder's record.

    Args:
        picture: uint8 [H, W, 3].
        path: a new file, whose suffix is one of FORMATS.
        facts: values of JSON.
        parameters: the same in A1111's words.

    Raises:
        UserError: the picture or the record cannot be written, or another run has written a picture of that name.
    """
    if path.suffix == ".png":
        text = {PARAMETERS: parameters} if parameters else {}
        save_png(picture, path, {**text, ENTRY: json.dumps(facts, ensure_ascii=False)}, new=True)
    else:
        require_room(path.suffix[1:], facts, parameters)
        options = {"quality": QUALITY, "subsampling": 0, "exif": _exif(facts, parameters)}
        _write(Image.fromarray(picture), path, True, FORMATS[path.suffix[1:]], **options)
    line = json.dumps({"file": path.name, **facts}, ensure_ascii=False).encode() + b"\n"
    record = path.with_name(RECORD)
    try:
        with open(record, "a+b", buffering=0) as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":  # a full disk cut the last line
                line = b"\n" + line
            if file.write(line) < len(line):  # one write, because processes may share the file
                raise OSError("no room is left")
    except OSError as error:
        raise UserError(f"cannot write {record}: {error.strerror or error}; the picture itself is there") from None


def read_facts(path: Path) -> dict:
    """The facts that a picture holds, or none where it holds none. UserError where the file is no picture."""
    try:
        with opened(path) as picture:
            said = picture.info.get(ENTRY) or picture.info.get(PARAMETERS)
            return _facts(said or picture.getexif().get(ExifTags.Base.ImageDescription))
    except BadImageError as error:
        raise UserError(f"{path} is damaged, or no picture ({error}); remove it") from None


def read_record(path: Path) -> dict[str, dict]:
    """The record of a run as file name -> facts. Of a picture that was drawn again the last line counts.

    A line that a full disk or a crash has cut is passed over with a warning. UserError where the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a prompt may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    found = [_facts(line) for line in lines if line.strip()]
    damaged = sum("file" not in facts for facts in found)
    if damaged:
        log.warning("%d of %d lines in %s are damaged and left out", damaged, len(found), path)
    return {str(facts["file"]): facts for facts in found if "file" in facts}


def _facts(text: str | None) -> dict:
    """The facts in a text of JSON; none where the text holds no facts."""
    try:
        facts = json.loads(text or "")
    except (ValueError, RecursionError):  # no JSON, or too many nested brackets
        return {}
    return facts if isinstance(facts, dict) else {}


def read_png(path: Path) -> np.ndarray:
    """A picture that `save_png` wrote, uint8 [H, W, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounded. Values outside are clipped."""
    return np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def enlarged(pictures: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Pictures uint8 [B, H, W, 3] at other sides, by Lanczos."""
    return [np.asarray(Image.fromarray(picture).resize((width, height), Image.LANCZOS)) for picture in pictures]


def pasted(pictures: np.ndarray, known: np.ndarray, hole: np.ndarray, edge: int) -> np.ndarray:
    """Pictures inside the hole, the known picture outside, with a soft edge.

    Args:
        pictures: uint8 [B, H, W, 3].
        known: uint8 [H, W, 3].
        hole: truth values [H, W].
        edge: so many pixels around the hole go from the one to the other; all farther ones are the known picture's.
    """
    near = Image.fromarray(hole.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(edge // 2 * 2 + 1))
    share = np.asarray(near.filter(ImageFilter.BoxBlur(edge // 2)), np.float32)[:, :, None] / 255  # [H, W, 1]
    return np.round(known + share * (pictures.astype(np.float32) - known)).astype(np.uint8)


def grid(pictures: np.ndarray, rows: int) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] in a grid of so many rows on white."""
    n, h, w, _ = pictures.shape
    rows = min(rows, n)
    columns = -(-n // rows)
    out = np.full((rows * (h + GAP) + GAP, columns * (w + GAP) + GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = GAP + i // columns * (h + GAP), GAP + i % columns * (w + GAP)
        out[top : top + h, left : left + w] = picture
    return out


def captioned_rows(columns: dict[str, np.ndarray], captions: list[str], scale: int = 1) -> Image.Image:
    """A sheet with one row per caption: one picture of every column, then the caption.

    Args:
        columns: heading, of one line or several -> uint8 [N, H, W, 3].
        captions: N captions.
        scale: the factor by which the pictures are enlarged, pixel by pixel.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    _, h, w, _ = next(iter(columns.values())).shape
    h, w = h * scale, w * scale
    texts = [textwrap.fill(caption, 28) for caption in captions]
    widest = max(small.getlength(line) for text in texts for line in text.split("\n"))
    head = 10 + 18 * max(heading.count("\n") + 1 for heading in columns)
    text_width = int(widest) + 24 if widest else 0
    sheet = Image.new("RGB", ((w + GAP) * len(columns) + text_width, head + (h + GAP) * len(captions)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (heading, pictures) in enumerate(columns.items()):
        left = column * (w + GAP)
        draw.multiline_text((left + w / 2, head / 2), heading, "black", font, anchor="mm", align="center")
        for row, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((w, h), Image.NEAREST)
            sheet.paste(enlarged, (left, head + row * (h + GAP)))
    for row, text in enumerate(texts):
        middle = head + row * (h + GAP) + h / 2
        draw.multiline_text(((w + GAP) * len(columns) + 12, middle), text, "black", small, anchor="lm")
    return sheet


def psnr(squared_error: float | np.ndarray) -> float | np.ndarray:
    """Peak signal-to-noise ratio in dB of mean squared errors of pictures in [-1, 1]."""
    return 10 * np.log10(4 / squared_error)
