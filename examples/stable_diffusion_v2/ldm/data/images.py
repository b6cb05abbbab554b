"""Picture files as arrays: 8-bit sRGB, upright, on white, the short side scaled to the size of training.

Whatever a file holds (palette, transparency, 16 bits, CMYK, colour profile, a camera's orientation mark) becomes plain
sRGB here, and whatever cannot be read raises; no stand-in picture is ever made up.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ldm.data.colour import to_srgb
from ldm.errors import UserError
from ldm.files import escaped, quoted

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, for which Pillow starts another program
LONGEST = 8  # of a picture with longer sides than 8 : 1 only the middle is kept, or scaling could exhaust the memory
DECODER = 2  # one more with each change of what a file's pixels become, so that no cache mixes two
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
BLOCK = 4096  # bytes; see `fingerprint`
PIXELS_AT_ONCE = 1 << 27  # of all pictures that threads decode at one time; a larger one is decoded alone
MEMORY_BLOCK = 64 << 20  # bytes by which Pillow takes memory; blocks below 32 MiB would stay with their thread
PNG_WORDS = 16 << 20  # bytes of a packed text or profile in a PNG; Pillow refuses pictures with more than 1 MiB of it
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PNG_WORDS)
Image.core.set_block_size(MEMORY_BLOCK)


class BadImageError(UserError):
    """A picture file that cannot be used; the message names it and says why."""


class Room:
    """Room for so many pixels, shared by threads: `take` waits until there is enough, or nothing else is held."""

    def __init__(self, pixels: int):
        self.pixels, self.taken, self.changed = pixels, 0, Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
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
        image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction, still twice the size
        with _room.take(image.width * image.height):
            return np.asarray(_scale(_upright_rgb(image), size))


def decode(path: str | Path) -> np.ndarray:
    """A picture in its own size, uint8 [height, width, 3]; BadImageError as `load_image`."""
    with opened(path) as image, _room.take(image.width * image.height):
        return np.asarray(_upright_rgb(image))


def check_image(path: str) -> tuple[int, int]:
    """Read a picture's header and look whether its end is there; decode it only where that leaves doubt.

    Returns:
        (width, height) in pixels as stored.

    Raises:
        BadImageError: as `load_image`. Damage in the middle of a file is for `load_image` to find.
    """
    with opened(path) as image:
        if not _has_end(path, image.format):
            with _room.take(image.width * image.height):
                image.load()
        return image.size


def fingerprint(path: str) -> bytes:
    """Stands for a file's content and costs three reads: its length, and a block from its beginning, middle and end.

    The end of a packed picture (PNG's checksum, JPEG's last bits) changes with any of its pixels.
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


def crop(picture: np.ndarray, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Cut a square out of uint8 [height, width, 3]: the middle one, or one at a place drawn from `rng`."""
    room_y, room_x = picture.shape[0] - size, picture.shape[1] - size
    top, left = (room_y // 2, room_x // 2) if rng is None else (rng.integers(room_y + 1), rng.integers(room_x + 1))
    return picture[top : top + size, left : left + size]


def to_float(pictures: list[np.ndarray]) -> np.ndarray:
    """uint8 [height, width, 3] each -> float32 [B, 3, height, width] in [-1, 1]."""
    stacked = np.stack(pictures).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(stacked, dtype=np.float32) / 127.5 - 1


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture's file, its header read; whatever goes wrong with it is a BadImageError that names it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, a device may never end
            raise ValueError("not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # Pillow's readers raise all sorts of exceptions on a broken file
        raise BadImageError(f"cannot read the picture {quoted(path, 200)}: {_reason(error)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # a damaged camera record says nothing against the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
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
    """Grey with 16 bits; Pillow's own conversion would clip every value above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits, save it with 8 or 16 bits")
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}  # a level of 16 bits
    return grey


def _scale(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    keep_x, keep_y = min(width, LONGEST * short), min(height, LONGEST * short)
    left, top = (width - keep_x) / 2, (height - keep_y) / 2
    target = (round(keep_x * size / short), round(keep_y * size / short))
    return image.resize(target, Image.LANCZOS, box=(left, top, left + keep_x, top + keep_y))


def _has_end(path: str, image_format: str) -> bool:
    """Whether the file's last bytes hold its format's end mark. WebP is checked whole when it is opened."""
    if image_format == "WEBP":
        return True
    if image_format not in END_MARKS:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return END_MARKS[image_format] in file.read()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a complete picture of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, scale it down"
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return escaped(lines[0] if lines else type(error).__name__, 200)
