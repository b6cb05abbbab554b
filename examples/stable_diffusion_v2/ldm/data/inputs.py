"""The picture files that a picture is drawn from: what is painted over, where, and how far away things are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ldm.data.images import LONGEST, decode, decode_grey
from ldm.errors import UserError
from ldm.files import escaped, once_for_each_file

WHITE = 0.5  # the brightness from which a mask is white


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
        own = _sides(file)
        by = short / min(own)
        if height or width:
            by = height / own[0] if height else width / own[1]
        found = (max(step, round(min(side * by, LONGEST * short) / step) * step) for side in own)
        return tuple(asked or side for asked, side in zip((height, width), found))

    def check(self, height: int, width: int) -> None:
        """UserError where a file cannot be read, or says nothing in a drawing of these sides. All files are decoded."""
        own = _sides(self.init_image) if self.init_image else None
        if self.mask:
            other, _, most = _brightness(self.mask, height, width)
            if own != other:
                raise UserError(
                    f"--mask {escaped(self.mask, 200)} has {other[1]}x{other[0]} pixels, --init_image "
                    f"{own[1]}x{own[0]}: give a mask of the same size"
                )
            if most < WHITE:
                raise UserError(
                    f"--mask {escaped(self.mask, 200)} has no white in the drawn part: paint white what is drawn anew"
                )
        if self.depth_map:
            _, far, near = _brightness(self.depth_map, height, width)
            if far == near:
                raise UserError(
                    f"--depth_map {escaped(self.depth_map, 200)} has one brightness everywhere: it says nothing"
                )

    def picture(self, height: int, width: int) -> np.ndarray:
        """init_image, uint8 [H, W, 3]."""
        return _fitted(decode(self.init_image), height, width, Image.LANCZOS)

    def hole(self, height: int, width: int) -> np.ndarray:
        """Where the mask is white, truth values [H, W]."""
        return _fitted(decode_grey(self.mask), height, width, Image.NEAREST) >= WHITE

    def depth(self, height: int, width: int) -> np.ndarray:
        """The depth map, float32 [H, W], from -1, the farthest, to 1."""
        grey = _fitted(decode_grey(self.depth_map), height, width, Image.BICUBIC)
        far, near = grey.min(), grey.max()
        return 2 * (grey - far) / max(near - far, np.finfo(np.float32).tiny) - 1


@once_for_each_file
def _sides(file: str) -> tuple[int, int]:
    """(height, width) of a picture that was decoded to its end."""
    return decode(file).shape[:2]


@once_for_each_file
def _brightness(file: str, height: int, width: int) -> tuple[tuple[int, int], float, float]:
    """(height, width) of a picture in grey, and its least and greatest brightness in a drawing of these sides."""
    grey = decode_grey(file)
    shown = _fitted(grey, height, width, Image.NEAREST)
    return grey.shape, float(shown.min()), float(shown.max())


def _fitted(picture: np.ndarray, height: int, width: int, method: int) -> np.ndarray:
    """The middle of a picture, scaled until it covers these sides."""
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), method))
