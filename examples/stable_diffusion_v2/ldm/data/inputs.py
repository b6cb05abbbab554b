"""The picture files that a picture is drawn from: what is painted over, where, and how far away things are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ldm.data.images import LONGEST, decode, decode_grey, measure
from ldm.errors import UserError
from ldm.files import escaped


@dataclass(frozen=True)
class Inputs:
    """Paths of picture files, None where there is none.

    A file whose proportions are not those of the drawn picture is scaled until it covers it; its middle is used.

    init_image: the picture to start from.
    mask: white where the picture is painted anew, black where it is kept; of the size of init_image.
    depth_map: bright where things are near.
    """

    init_image: str | None = None
    mask: str | None = None
    depth_map: str | None = None

    def sides(self, height: int | None, width: int | None, short: int, step: int) -> tuple[int, int]:
        """(height, width) of the drawn picture, from what is asked for.

        Where a side is not asked for, the proportions are those of init_image or depth_map, and the short side is
        `short`. Sides that are found so are multiples of `step`.
        """
        file = self.init_image or self.depth_map
        if file is None or (height and width):
            return height or short, width or short
        own = measure(file, short).original
        by = short / min(own)
        if height or width:
            by = height / own[0] if height else width / own[1]
        found = (max(step, round(min(side * by, LONGEST * short) / step) * step) for side in own)
        return tuple(asked or side for asked, side in zip((height, width), found))

    def check(self) -> None:
        """UserError where a file cannot be read, or says nothing; all of them are decoded."""
        own = decode(self.init_image).shape[:2] if self.init_image else None
        if self.mask:
            other = decode_grey(self.mask).shape
            if own != other:
                raise UserError(
                    f"--mask {escaped(self.mask, 200)} has {other[1]}x{other[0]} pixels, --init_image "
                    f"{own[1]}x{own[0]}: give a mask of the same size"
                )
            if not self.hole(*own).any():
                raise UserError(f"--mask {escaped(self.mask, 200)} is black: paint white what is to be drawn anew")
        if self.depth_map:
            self.depth(*decode_grey(self.depth_map).shape)

    def picture(self, height: int, width: int) -> np.ndarray:
        """init_image, uint8 [H, W, 3]."""
        return _fitted(self.init_image, decode, height, width, Image.LANCZOS)

    def hole(self, height: int, width: int) -> np.ndarray:
        """Where the mask is white, truth values [H, W]."""
        return _fitted(self.mask, decode_grey, height, width, Image.NEAREST) >= 0.5

    def depth(self, height: int, width: int) -> np.ndarray:
        """The depth map, float32 [H, W], from -1, the farthest, to 1; UserError where all is equally far away."""
        grey = _fitted(self.depth_map, decode_grey, height, width, Image.BICUBIC)
        far, near = grey.min(), grey.max()
        if far == near:
            raise UserError(
                f"--depth_map {escaped(self.depth_map, 200)} has one brightness everywhere: it says nothing"
            )
        return 2 * (grey - far) / (near - far) - 1


def _fitted(file: str, read: Callable, height: int, width: int, method: int) -> np.ndarray:
    """The middle of a picture, scaled until it covers these sides."""
    return np.asarray(ImageOps.fit(Image.fromarray(read(file)), (width, height), method))
