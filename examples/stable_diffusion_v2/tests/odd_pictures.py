"""Pictures of every kind that has gone wrong somewhere, for the tests of the evaluation."""

import numpy as np
from PIL import Image


def save(path, mode="RGB", size=(40, 30), **options):
    rng = np.random.default_rng(len(str(path.name)))
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(rng.integers(0, 65536, size[::-1], np.uint16)) if mode == "I;16" else picture.convert(mode)).save(
        path, **options
    )
    return path


def odd_pictures(folder):
    """One picture of every kind that has gone wrong somewhere."""
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera's top is at the right
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    save(folder / "grey.png", "L")
    save(folder / "cmyk.jpg", "CMYK")
    save(folder / "sixteen.png", "I;16")
    save(folder / "turned.JPG", exif=turned)
    save(folder / "palette.gif", "P")
    save(folder / "clear.webp", "RGBA")
    save(folder / "bit.tiff", "1")
    save(folder / "deeper" / "large.png", size=(700, 400))
    save(folder / "dot.bmp", size=(1, 1))
    for name in ("moving.png", "moving.gif", "moving.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    return folder
