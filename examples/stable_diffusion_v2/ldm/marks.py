"""What happens to pictures between the autoencoder and their file, where it is asked for: a check and a mark.

Neither is proof. The check's network judges photographs of people, by a threshold. The mark stands in the frequencies
of a picture, where most viewers see nothing; scaling, cropping or strong compression removes it.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.open_nsfw import OpenNsfw

log = logging.getLogger(__name__)

UNSAFE = 0.8  # the score above which its authors call a picture unsafe
WORDS = b"StableDiffusionV1"  # the mark of Stability's scripts, which detectors look for
SMALLEST = 256 * 256  # pixels; the package marks no smaller picture


class Marks(NamedTuple):
    """The networks of what is asked for; None where it is not.

    safety: judges pictures.
    encoder: `imwatermark.WatermarkEncoder`.
    """

    safety: OpenNsfw | None = None
    encoder: object | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The pictures as they are saved, uint8 [B, H, W, 3]: unsafe ones are black, all have the mark."""
        if self.safety:
            images = self._checked(images)
        if self.encoder:
            images = np.stack([self.encoder.encode(image[..., ::-1], "dwtDct")[..., ::-1] for image in images])
        return images

    def _checked(self, images: np.ndarray) -> np.ndarray:
        scores = self.safety.scores([Image.fromarray(image) for image in images])
        bad = scores > UNSAFE
        if bad.any():
            log.warning("%d of %d pictures may not be safe for work: they are black", bad.sum(), len(images))
        return np.where(bad[:, None, None, None], np.uint8(0), images)


def marks_of(check_safety: bool, add_watermark: bool, sizes: set[tuple[int, int]]) -> Marks:
    """What is asked for, for pictures of these (height, width).

    Raises:
        UserError: a package is missing, or a picture is too small for the mark.
    """
    encoder = None
    if add_watermark:
        for height, width in sorted(sizes):
            if height * width < SMALLEST:
                raise UserError(
                    f"--add_watermark needs pictures of 256×256 pixels or more, not {height}×{width}: leave it out"
                )
        encoder = _encoder()
    return Marks(OpenNsfw() if check_safety else None, encoder)


def _encoder():
    try:
        from imwatermark import WatermarkEncoder
    except ImportError as error:
        raise UserError(
            f"--add_watermark needs {error.name}: pip install invisible-watermark, or leave the option out"
        ) from None
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", WORDS)
    return encoder
