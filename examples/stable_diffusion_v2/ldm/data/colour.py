"""Colours as sRGB: by a picture's own profile, or by the gamma and the primaries of a PNG.

A picture with none of them is in sRGB already. A profile that cannot be used is passed over, as viewers do.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # of Pillow, by what a profile says it is for
GREY = ("1", "L", "LA")
NEAR = 2  # of 255; a profile that moves no colour further is one of the many of sRGB, which differ in rounding
GRID = np.linspace(0, 255, 18).round().astype(np.uint8)
POWER, TOLERANCE = 1 / 2.2, 0.05  # how a PNG states the curve of sRGB, and the share by which it may miss it
CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # the curve itself, IEC 61966-2-1
PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green and blue in sRGB
D50 = np.array([0.9642, 1.0, 0.8249])  # the white of all profiles
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_srgb(image: Image.Image) -> Image.Image:
    """A picture with 8 bits in sRGB: the same one where nothing is to be done, otherwise RGB or RGBA."""
    profile = image.info.get("icc_profile") or _profile_of_png(image.info)
    mode = MODES.get(profile[16:20]) if profile else None
    pixels = "L" if image.mode in GREY else "CMYK" if image.mode == "CMYK" else "RGB"
    if mode != pixels and (mode, pixels) != ("RGB", "L"):  # no profile, or not of such pixels
        return image
    transform = _transform(profile, mode)
    if transform is None:
        return image
    converted = transform.apply(image.convert(mode))
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB, for pixels of `mode`; None where the profile is damaged or hardly differs from sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    channels = np.meshgrid(*[GRID] * len(mode), indexing="ij")
    colours = Image.fromarray(np.stack(channels, -1).reshape(-1, len(GRID), *([3] if mode == "RGB" else [])))
    moved = np.asarray(transform.apply(colours)).astype(int) - np.asarray(colours.convert("RGB"))
    return None if np.abs(moved).max() <= NEAR else transform


def _profile_of_png(info: dict) -> bytes | None:
    """A profile from the gamma and the primaries (where given) of a PNG; None where it says no gamma, or sRGB."""
    gamma, primaries = info.get("gamma"), info.get("chromaticity", PRIMARIES)
    if gamma is None or "srgb" in info or not 0.1 < gamma < 10:
        return None
    curve = CURVE if abs(gamma / POWER - 1) < TOLERANCE else (1 / gamma,)
    return rgb_profile(curve, tuple(primaries))


@lru_cache(maxsize=8)
def rgb_profile(curve: tuple[float, ...], primaries: tuple[float, ...]) -> bytes | None:
    """An ICC profile (version 4) of an RGB display; None where the primaries are none.

    Args:
        curve: an exponent, or (g, a, b, c, d) for linear = (a x + b)^g where x >= d, c x below.
        primaries: x and y of white, red, green and blue, as in a PNG's cHRM.
    """
    try:
        white, *colours = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(primaries[::2], primaries[1::2]))
        colours = np.stack(colours, 1)
        adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD
        columns = (adapt @ colours * np.linalg.solve(colours, white)).T
        points = [b"XYZ \0\0\0\0" + _fixed(*column) for column in columns]
        tone = b"para\0\0\0\0" + struct.pack(">HH", 3 if len(curve) == 5 else 0, 0) + _fixed(*curve)
    except (ZeroDivisionError, ValueError, np.linalg.LinAlgError, struct.error):
        return None
    names = [b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"]
    body, places = b"".join([*points, tone]), [0, 20, 40, 60, 60, 60]
    start = 128 + 4 + 12 * len(names)
    tags = [
        struct.pack(">4sII", name, start + place, 20 if place < 60 else len(tone)) for name, place in zip(names, places)
    ]
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head += _fixed(*D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(names)) + b"".join(tags) + body


def _fixed(*values: float) -> bytes:
    """Numbers as profiles write them: 16 bits before the point, 16 behind it."""
    return struct.pack(f">{len(values)}i", *(round(65536 * float(value)) for value in values))
