"""Picture files as arrays: 8-bit sRGB, upright, on white, the short side scaled to the size of training.

Every kind of picture (palette, transparency, 16 bits, CMYK, colour profile, a camera's orientation mark) becomes plain
sRGB here. A file that cannot be read raises an error; no other picture takes its place.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ldm.data.colour import to_srgb
from ldm.errors import UserError
from ldm.files import escaped, quoted

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS: Pillow starts another program for it
LONGEST = 8  # most that the sides may differ: of a longer picture the middle is kept, so that memory suffices
DECODER = 2  # the version of this decoder: a change of the pixels raises it, so no cache mixes two versions
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
BLOCK = 4096  # bytes; see `fingerprint`
PIXELS_AT_ONCE = 1 << 27  # of all pictures that threads decode at one time; a larger picture is decoded alone
MEMORY_BLOCK = 64 << 20  # bytes that Pillow allocates at a time; a thread would never give back blocks below 32 MiB
PNG_WORDS = 16 << 20  # bytes of a packed text or profile in a PNG; Pillow's own limit is 1 MiB
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PNG_WORDS)
Image.core.set_block_size(MEMORY_BLOCK)


class BadImageError(UserError):
    """A picture file that cannot be used. The message names the file and the reason."""


class Room:
    """Room for a number of pixels, shared by threads."""

    def __init__(self, pixels: int):
        self.pixels, self.taken, self.changed = pixels, 0, Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Hold so many pixels inside the block. Wait until they fit, or until no other thread holds any."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + pixels <= self.pixels)
            self.taken += pixels
        try:
            yield
        finally:
            with self.changed:
                self.taken -= pixels
                self.changed.notify_all()


_room = Room(PIXELS_AT_ONCE)


def load_image(path: str, size: int) -> np.ndarray:
    """Decode a picture and scale its short side to `size` pixels (Lanczos, antialiased).

    Returns:
        uint8 [height, width, 3] with min(height, width) == size.

    Raises:
        BadImageError: the file is missing, truncated, of another format or too large to be decoded safely.
    """
    with opened(path) as image:
        _draft(image, size)
        with _room.take(image.width * image.height):
            return np.asarray(_scale(_upright_rgb(image), size))


class Measures(NamedTuple):
    """The (height, width) of a picture in its file, upright, and of the picture that `load_image` makes of it."""

    original: tuple[int, int]
    scaled: tuple[int, int]


def measure(path: str, size: int) -> Measures:
    """The measures of a picture that `load_image` scales to `size`. BadImageError where the file cannot be read."""
    with opened(path) as image:
        with _room.take(image.width * image.height):  # a PNG may be decoded to its end for the mark
            turned = _is_turned(image)
        original = image.size
        _draft(image, size)
        sides = original, _scaled_sides(*image.size, size)
    return Measures(*(each if turned else each[::-1] for each in sides))


def decode(path: str | Path) -> np.ndarray:
    """A picture in its own size, uint8 [height, width, 3]. BadImageError as in `load_image`."""
    with opened(path) as image, _room.take(image.width * image.height):
        return np.asarray(_upright_rgb(image))


def decode_grey(path: str | Path) -> np.ndarray:
    """The brightness of a picture, float32 [height, width] from 0 to 1; 16 bits stay 16. BadImageError as above."""
    with opened(path) as image, _room.take(image.width * image.height):
        image = _upright(image)
        if image.mode.startswith("I"):
            return _values_of_16_bits(image).astype(np.float32) / 65535
        return np.asarray(_to_rgb(image).convert("L"), np.float32) / 255


def check_image(path: str) -> tuple[int, int]:
    """Check a picture's header and its end. A picture whose format or file has no end mark is decoded whole.

    Returns:
        (width, height) in pixels as stored.

    Raises:
        BadImageError: as in `load_image`. Only `load_image` finds damage in the middle of a file.
    """
    with opened(path) as image:
        if not _has_end(path, image.format):
            with _room.take(image.width * image.height):
                image.load()
        return image.size


def fingerprint(path: str) -> bytes:
    """A digest, 32 bytes, of a file's length and of three blocks: from its beginning, its middle and its end.

    The digest costs three reads. The end of a packed picture (PNG's checksum, JPEG's last bits) depends on every pixel.

    Raises:
        BadImageError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            parts = [length.to_bytes(8, "big")]
            for start in (0, length // 2, length - BLOCK):
                file.seek(max(0, start))
                parts.append(file.read(BLOCK))
    except OSError as error:
        raise BadImageError(f"cannot read the picture {quoted(path, 200)}: {error.strerror}") from error
    return hashlib.sha256(b"".join(parts)).digest()


def crop_place(sides: tuple[int, int], size: int, rng: np.random.Generator | None = None) -> tuple[int, int]:
    """(top, left) of a square in a picture of this (height, width): in the middle, or at a place drawn from `rng`."""
    room_y, room_x = sides[0] - size, sides[1] - size
    if rng is None:
        return room_y // 2, room_x // 2
    return int(rng.integers(room_y + 1)), int(rng.integers(room_x + 1))


def crop(picture: np.ndarray, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Cut a square out of uint8 [height, width, 3] at its `crop_place`."""
    top, left = crop_place(picture.shape[:2], size, rng)
    return picture[top : top + size, left : left + size]


def to_float(pictures: list[np.ndarray]) -> np.ndarray:
    """B pictures, uint8 [height, width, 3] each, as float32 [B, 3, height, width] in [-1, 1]."""
    stacked = np.stack(pictures).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(stacked, dtype=np.float32) / 127.5 - 1


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture and read its header. Every error inside the block becomes a BadImageError that names the file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait, and a device may never end
            raise ValueError("not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # Pillow's readers raise all sorts of exceptions on a broken file
        raise BadImageError(f"cannot read the picture {quoted(path, 200)}: {_reason(error)}") from error


def _draft(image: Image.Image, size: int) -> None:
    """Let a large JPEG be decoded at a fraction of its size, at least at twice `size`."""
    image.draft("RGB", (2 * size, 2 * size))


def _is_turned(image: Image.Image) -> bool:
    """Whether `_upright_rgb` exchanges the width and height that the opened picture has."""
    if image.format == "TIFF":  # Pillow has done it
        return False
    with suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return False


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned by the camera's orientation mark."""
    image.load()
    with suppress(Exception):  # pixels are usable beside a damaged camera record
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, turned by the camera's orientation mark."""
    return _to_rgb(_upright(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB of 8 bits, transparency on white."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range, save it with 8 or 16 bits")
    image = to_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8 bits. Pillow's own conversion would clip every value above 255 to white."""
    grey = Image.fromarray(np.round(_values_of_16_bits(image) / 257).astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}  # it has 16 bits
    return grey


def _values_of_16_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits, save it with 8 or 16 bits")
    return values


def _scale(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side to `size`, of a picture longer than LONGEST : 1 its middle alone."""
    width, height = image.size
    keep_x, keep_y = _kept_sides(width, height)
    left, top = (width - keep_x) / 2, (height - keep_y) / 2
    target = _scaled_sides(width, height, size)
    return image.resize(target, Image.LANCZOS, box=(left, top, left + keep_x, top + keep_y))


def _kept_sides(width: int, height: int) -> tuple[int, int]:
    most = LONGEST * min(width, height)
    return min(width, most), min(height, most)


def _scaled_sides(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) of the picture that `_scale` makes of one of these sides."""
    short = min(width, height)
    keep_x, keep_y = _kept_sides(width, height)
    return round(keep_x * size / short), round(keep_y * size / short)


def _has_end(path: str, image_format: str) -> bool:
    """Whether the file's last bytes hold its format's end mark. Pillow checks a WebP whole when it opens the file."""
    if image_format == "WEBP":
        return True
    if image_format not in END_MARKS:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return END_MARKS[image_format] in file.read()


def _reason(error: Exception) -> str:
    """What is wrong with a picture, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a complete picture of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, scale it down"
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return escaped(lines[0] if lines else type(error).__name__, 200)
