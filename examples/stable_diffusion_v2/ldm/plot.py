"""Plots of a few curves, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.pictures import save_png

_SIZE = (1200, 640)
_SHARPNESS = 2  # the picture is drawn so many times larger, then reduced, for smooth lines
_MARGINS = (92, 72, 96, 62)  # left, top, right, bottom
_TEXT, _GRID, _FRAME = "#333a44", "#e6e9ee", "#9aa3b0"


def ticks(low: float, high: float, count: int) -> np.ndarray:
    """About ``count`` round numbers from low to high."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    distance = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw)
    return np.arange(math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9) + 1) * distance


class Plot:
    """A frame with axes, in the units of the data: from `first` to `last`, and from `low` to `high`."""

    def __init__(self, first: float, last: float, low: float, high: float):
        self.first, self.last, self.low, self.height = first, last, low, high - low
        self.image = Image.new("RGB", tuple(_SHARPNESS * n for n in _SIZE), "white")
        self.draw = ImageDraw.Draw(self.image)
        left, top, right, bottom = _MARGINS
        self.box = np.array([left, top, _SIZE[0] - right, _SIZE[1] - bottom]) * _SHARPNESS

    def pixels(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Positions in pixels [N, 2]; points outside the frame are moved onto it."""
        left, top, right, bottom = self.box
        across = left + (np.asarray(x) - self.first) / (self.last - self.first) * (right - left)
        down = bottom - (np.asarray(y) - self.low) / self.height * (bottom - top)
        return np.stack([np.clip(across, left, right), np.clip(down, top, bottom)], -1)

    def curve(self, x: np.ndarray, y: np.ndarray, color: str, width: float) -> None:
        points = [tuple(point) for point in self.pixels(x, y)]
        if len(points) == 1:
            (x, y), r = points[0], 4 * _SHARPNESS
            self.draw.ellipse((x - r, y - r, x + r, y + r), color)
        self.draw.line(points, color, round(width * _SHARPNESS), joint="curve")

    def text(self, place: Sequence[float], text: str, anchor: str, size: int = 17, color: str = _TEXT) -> None:
        self.draw.text(tuple(place), text, color, ImageFont.load_default(size * _SHARPNESS), anchor)

    def axes(
        self, below: Mapping[float, str], name: str, right: Mapping[float, str] | None = None, color: str = _TEXT
    ) -> None:
        """Draw the frame, its grid, and labels by their place on the axis: below it, and at the right in a colour.

        Args:
            name: of the axis below.
        """
        left, _, edge, bottom = self.box
        gap = 10 * _SHARPNESS
        for y in ticks(self.low, self.low + self.height, 6):
            _, down = self.pixels(self.first, y)
            self.draw.line([(left, down), (edge, down)], _GRID, _SHARPNESS)
            self.text((left - gap, down), f"{y:.4g}", "rm")
        for x, label in below.items():
            across, _ = self.pixels(x, self.low)
            self.draw.line([(across, bottom), (across, bottom + gap // 2)], _FRAME, _SHARPNESS)
            self.text((across, bottom + gap), label, "mt")
        for y, label in (right or {}).items():
            _, down = self.pixels(self.first, y)
            self.text((edge + gap, down), label, "lm", color=color)
        self.draw.rectangle(tuple(self.box), outline=_FRAME, width=_SHARPNESS)
        self.text(((left + edge) / 2, bottom + 3.4 * gap), name, "mt")

    def legend(self, title: str, names: Mapping[str, str]) -> None:
        """Write a title above the frame, and the curves' names by their colours behind it."""
        left, top, *_ = self.box
        self.text((left, top - 44 * _SHARPNESS), title, "lm", 22)
        across, down = left + 200 * _SHARPNESS, top - 43 * _SHARPNESS
        for color, text in names.items():
            self.draw.line([(across, down), (across + 34 * _SHARPNESS, down)], color, 4 * _SHARPNESS)
            self.text((across + 44 * _SHARPNESS, down), text, "lm")
            across += 90 * _SHARPNESS + self.draw.textlength(text, ImageFont.load_default(17 * _SHARPNESS))

    def save(self, path: str | Path) -> None:
        """Write the PNG file; replaced as a whole."""
        save_png(self.image.resize(_SIZE, Image.LANCZOS), Path(path))
