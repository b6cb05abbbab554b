"""The captioned pictures of a data folder, checked before the first step and kept in memory where they fit."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from ldm.data.captions import Sample, read_captions
from ldm.data.images import LONGEST, BadImageError, Measures, check_image, fingerprint, load_image, measure
from ldm.errors import UserError
from ldm.files import quoted

ON_BAD_IMAGE = ("error", "skip")
CACHE_BYTES = 2 << 30
T = TypeVar("T")
_log = logging.getLogger(__name__)


class CaptionedImages:
    """A sequence of (picture, caption) pairs; see `__getitem__`.

    The constructor checks every picture's header and end. If the scaled pictures fit into `cache_bytes`, it decodes and
    keeps them too: all damage is known before training, and later epochs decode nothing. The pictures of a larger set
    are decoded one by one during training. Damage in the middle of a file is found then, under the same policy.

    Args:
        data_path: folder with the caption files and the pictures.
        image_size: length of the short side in pixels.
        image_filter_size: pictures with a shorter side than this are left out.
        on_bad_image: "error" stops at an unreadable picture, "skip" counts it and goes on without it.
        cache_bytes: memory that decoded pictures may take.
        keep_squares: whether decoded pictures are kept where all files are square.

    Attributes:
        square: whether all files are square, so that no crop can move.

    Raises:
        UserError: as `read_captions`; a picture is unreadable; no picture remains.
    """

    def __init__(
        self,
        data_path: str | Path,
        image_size: int,
        image_filter_size: int = 0,
        on_bad_image: str = "error",
        cache_bytes: int = CACHE_BYTES,
        keep_squares: bool = True,
    ):
        if on_bad_image not in ON_BAD_IMAGE:
            raise UserError(f"unknown on_bad_image '{on_bad_image}': choose from {', '.join(ON_BAD_IMAGE)}")
        self.image_size = image_size
        self.skips_bad = on_bad_image == "skip"
        self.bad: dict[str, BadImageError] = {}
        self._pictures: dict[str, np.ndarray] = {}
        self._measures: dict[str, Measures] = {}

        samples = read_captions(data_path)
        paths = list(dict.fromkeys(sample.path for sample in samples))  # captions may share a picture
        sizes = self._attempt(check_image, paths, "checking pictures")
        fitting = {path: size for path, size in sizes.items() if min(size) >= image_filter_size}
        self.square = all(width == height for width, height in fitting.values())
        room = 0 if self.square and not keep_squares else cache_bytes
        if sum(_scaled_bytes(size, image_size) for size in fitting.values()) <= room:
            self._pictures = self._attempt(lambda path: load_image(path, image_size), list(fitting), "reading pictures")
        self.samples = [sample for sample in samples if sample.path in fitting and sample.path not in self.bad]
        self.small = len(sizes) - len(fitting)
        if not self.samples:
            raise UserError(
                f"no picture of '{data_path}' is left: {self.small} are smaller than image_filter_size "
                f"{image_filter_size}, {len(self.bad)} are unreadable"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        """The picture and the caption of `read_at`."""
        picture, sample = self.read_at(index)
        return picture, sample.text

    def read_at(self, index: int) -> tuple[np.ndarray, Sample]:
        """The picture, uint8 [height, width, 3] with min(height, width) == image_size, and its sample.

        If unreadable pictures are skipped, the next readable picture takes the place of an unreadable one. The result
        therefore depends on the data alone, and batches keep their size.

        Raises:
            IndexError: there is no sample of that index.
            UserError: the picture is unreadable and is not skipped; all pictures are unreadable.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        for step in range(len(self)):
            sample = self.samples[(index + step) % len(self)]
            try:
                return self._picture(sample.path), sample
            except BadImageError as error:
                self._record_bad({sample.path: error})
        raise UserError("all pictures of the data folder are unreadable")

    def read(self, path: str) -> np.ndarray | None:
        """The scaled picture of a path, uint8 [height, width, 3]; None where it is unreadable and is skipped."""
        try:
            return self._picture(path)
        except BadImageError as error:
            self._record_bad({path: error})
            return None

    def measures(self, path: str) -> Measures:
        """The measures of a picture that can be read."""
        if path not in self._measures:
            self._measures[path] = measure(path, self.image_size)
        return self._measures[path]

    def leave_out(self, paths: set[str]) -> None:
        """Go on without these pictures. UserError where no picture remains."""
        self.samples = [sample for sample in self.samples if sample.path not in paths]
        if not self.samples:
            raise UserError("all pictures of the data folder are unreadable")

    def summary(self) -> str:
        """One line: the number of captioned pictures, and of those left out with the reason."""
        left_out = [f"{self.small} smaller than image_filter_size left out"] if self.small else []
        if self.bad:
            left_out.append(f"{len(self.bad)} unreadable skipped, the first is {quoted(next(iter(self.bad)), 200)}")
        return "; ".join([f"{len(self):,} captioned pictures", *left_out])

    def facts(self) -> dict[str, object]:
        """The facts that a resumed run must find again: the pictures' number, names, captions and contents."""
        return {"pictures": len(self), "data": self.digest(), "picture_contents": self._contents()}

    def digest(self) -> str:
        """16 hexadecimal digits for the pictures' file names and the captions, in their order."""
        lines = "".join(f"{Path(sample.path).name}\t{sample.text}\n" for sample in self.samples)
        return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _contents(self) -> str:
        """16 hexadecimal digits for the contents of the pictures' files."""
        paths = list(dict.fromkeys(sample.path for sample in self.samples))
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            parts = b"".join(pool.map(fingerprint, paths))
        return hashlib.sha256(parts).hexdigest()[:16]

    def _picture(self, path: str) -> np.ndarray:
        """The scaled picture, from memory or decoded. BadImageError where it is unreadable, now or earlier."""
        if path in self.bad:
            raise self.bad[path]
        if path in self._pictures:
            return self._pictures[path]
        return load_image(path, self.image_size)

    def _attempt(self, read: Callable[[str], T], paths: list[str], title: str) -> dict[str, T]:
        """Apply `read` to all paths in threads: path -> result of the readable pictures. The others are recorded."""

        def read_or_error(path: str) -> T | BadImageError:
            try:
                return read(path)
            except BadImageError as error:
                return error

        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            progress = tqdm(pool.map(read_or_error, paths), title, len(paths), leave=False, delay=1, unit=" files")
            results = dict(zip(paths, progress))
        finally:
            pool.shutdown(cancel_futures=True)  # without it an interrupt would wait for all files
        self._record_bad({path: result for path, result in results.items() if isinstance(result, BadImageError)})
        return {path: result for path, result in results.items() if path not in self.bad}

    def _record_bad(self, bad: dict[str, BadImageError]) -> None:
        """Apply the policy for unreadable pictures: raise an error for the first, or log once that it is skipped."""
        new = {path: error for path, error in bad.items() if path not in self.bad}
        if not new:
            return
        first = next(iter(new.values()))
        more = f" ({len(new)} pictures are unreadable)" if len(new) > 1 else ""
        if not self.skips_bad:
            raise UserError(f"{first}{more}; mend or remove it, or use --on_bad_image skip") from first
        self.bad.update(new)
        _log.warning("skipped: %s%s", first, more)


def _scaled_bytes(size: tuple[int, int], image_size: int) -> int:
    """The bytes of a picture of this (width, height) after scaling."""
    ratio = min(max(size) / min(size), LONGEST)
    return round(3 * image_size**2 * ratio)
