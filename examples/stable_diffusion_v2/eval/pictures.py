"""Pictures of a folder for the evaluation networks: found, decoded, resized, in threads ahead of the network.

Pictures are decoded like the training data (ldm.data.images): upright, on white, 16 bits scaled to 8, the first frame
of an animation, in sRGB. pytorch-fid and clean-fid decode the same pixels where a picture has 8-bit pixels, no
transparency, no orientation mark and no colour profile but sRGB's, as nearly all pictures have.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.images import BadImageError, decode
from ldm.errors import UserError
from ldm.files import escaped
from ldm.pictures import RECORD, read_facts, read_record

log = logging.getLogger(__name__)
BESIDE = re.compile(r"grid-\d{5,}\.png|loss_curve\.png")  # pictures beside the drawn ones in a run's folder
SIDE = 299  # pixels of the Inception network's input
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_pictures(folder: str | Path) -> list[Path]:
    """The picture files of a folder and of the folders in it, sorted; hidden files are ignored.

    Where the folder or its samples/ has a record of text_to_image.py, only the drawn pictures count, not the grids and
    curves beside them.

    Raises UserError where there is no such folder, or no picture in it, or a grid or curve of a run among the pictures.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    record = find_record(folder)
    found = _walk(record.parent if record else folder)
    if record:
        found = _only_drawn(found, record)
    elif beside := [path for path in found if path.parent == folder and BESIDE.fullmatch(path.name)]:
        better = next((folder / name for name in ("samples", "validation") if (folder / name).is_dir()), None)
        advice = f"give {better}" if better else "give a folder without it"
        raise UserError(f"{folder} is the folder of a run, and its {beside[0].name} would count as a picture: {advice}")
    return found


def find_record(folder: Path) -> Path | None:
    """The record that text_to_image.py has left in a folder, or in the samples/ of a run's folder."""
    return next((path for path in (folder / RECORD, folder / "samples" / RECORD) if path.is_file()), None)


def _only_drawn(found: list[Path], record: Path) -> list[Path]:
    """The pictures that the record names, or that hold the facts of their drawing.

    Where there is none, the file is no record of ours, and all pictures are returned.
    """
    named = {record.parent / name for name in read_record(record)}
    drawn = {path for path in found if path in named or _has_facts(path)}
    others = [path for path in found if path not in drawn]
    if drawn and others:
        first = escaped(others[0], 200)
        log.warning("%d pictures that %s does not name are left out, the first: %s", len(others), record, first)
    return sorted(drawn) or found


def _has_facts(path: Path) -> bool:
    try:
        return bool(read_facts(path))
    except UserError:
        return True  # the picture is damaged; an error comes when it is decoded


def _walk(folder: Path) -> list[Path]:
    """The picture files below a folder, sorted; UserError where there is none."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not found:
        raise UserError(f"there is no picture in {folder}: files {', '.join(f'*{suffix}' for suffix in SUFFIXES)}")
    return sorted(found)


def resize_clean(picture: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] to float32 [299, 299, 3] in 0 to 255: bicubic, antialiased (arXiv 2104.11222).

    Pillow scales each channel in floating point; its bicubic filter grows with the scale. Nothing is rounded to whole
    numbers. Values of the filter beyond 0 and 255 are clipped.
    """
    planes = [Image.fromarray(picture[..., i].astype(np.float32)) for i in range(3)]  # mode F
    scaled = [np.asarray(plane.resize((SIDE, SIDE), Image.BICUBIC)) for plane in planes]
    return np.stack(scaled, -1).clip(0, 255)


def resize_legacy(picture: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] to float32 [299, 299, 3] in 0 to 1: bilinear, not antialiased, as in pytorch-fid.

    Each value is interpolated from the four nearest pixels, at x = (i + 1/2) width / 299 - 1/2 within the picture.
    """
    top, bottom, down = _neighbours(picture.shape[0])
    left, right, across = _neighbours(picture.shape[1])
    x = picture.astype(np.float32) / 255
    x = x[:, left] * (1 - across[:, None]) + x[:, right] * across[:, None]  # [height, 299, 3]
    return x[top] * (1 - down[:, None, None]) + x[bottom] * down[:, None, None]


def _neighbours(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of 299 places along a side: (pixel before it, pixel behind it, weight of the pixel behind)."""
    place = (np.arange(SIDE, dtype=np.float32) + 0.5) * (np.float32(length) / np.float32(SIDE)) - 0.5
    place = np.maximum(place, 0).astype(np.float32)
    before = np.minimum(place.astype(np.int64), length - 1)
    return before, np.minimum(before + 1, length - 1), (place - before).astype(np.float32)


def clean(picture: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] to the network's input, float32 [3, 299, 299], as in clean-fid: (x - 128) / 128."""
    return np.ascontiguousarray(((resize_clean(picture) - 128) / 128).transpose(2, 0, 1))


def legacy(picture: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] to the network's input, float32 [3, 299, 299], as in pytorch-fid: 2 x - 1."""
    return np.ascontiguousarray((2 * resize_legacy(picture) - 1).transpose(2, 0, 1))


RESIZE = {"clean": clean, "legacy": legacy}


def ahead(function: Callable, items: Iterable, number: int) -> Iterator[tuple[object, Future]]:
    """(item, its future) for each item in order, while threads work on the next `number` items.

    No more results are in memory at once. The future's `result()` returns the function's value or raises its error.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    items = iter(items)
    try:
        waiting = deque((item, pool.submit(function, item)) for item in islice(items, number))
        while waiting:
            yield waiting.popleft()
            waiting.extend((item, pool.submit(function, item)) for item in islice(items, 1))
    finally:  # also where the caller stops early
        pool.shutdown(wait=False, cancel_futures=True)


def batches(
    paths: list[Path], size: int, prepare: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[np.ndarray, int, list[str]]]:
    """Prepared pictures in batches of one size, decoded in threads while the batch before is in use.

    Yields:
        float32 [size, 3, 299, 299], whose rows beyond the second value repeat the last picture;
        the number of pictures in it, 0 if none could be read;
        a message for each picture since the last batch that could not be read and is left out.
    """
    rows, bad = [], []
    for _, future in ahead(lambda path: prepare(decode(path)), paths, 2 * size):
        try:
            rows.append(future.result())
        except BadImageError as error:
            bad.append(str(error))
        if len(rows) == size:
            yield np.stack(rows), size, bad
            rows, bad = [], []
    if rows or bad:
        filled = rows + rows[-1:] * (size - len(rows))
        yield (np.stack(filled) if rows else np.empty((0,))), len(rows), bad
