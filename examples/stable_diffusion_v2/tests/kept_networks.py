"""Networks for the drawings of one process of tests: those of a shape are built and compiled once.

A drawing loads all weights anew, so it cannot see that its networks have drawn before. Scripts that run in processes of
their own build theirs, and so do drawings in a number type or mode of their own.
"""

from __future__ import annotations

import sys

import pytest
import text_to_image

from ldm.model import StableDiffusion
from ldm.parts import PARTS

KEPT: dict[str, Kept] = {}


def keep_networks(patch: pytest.MonkeyPatch) -> None:
    """Let text_to_image.py draw with kept networks."""
    patch.setattr(text_to_image, "StableDiffusion", kept)


def kept(config, parts: tuple[str, ...] = PARTS) -> StableDiffusion:
    """In the place of `StableDiffusion`."""
    if {"--dtype", "--mode"} & {*sys.argv}:
        return StableDiffusion(config, parts)
    key = repr((config.unet, config.vae, config.texts, config.scale_factor, parts))
    model = KEPT[key] if key in KEPT else KEPT.setdefault(key, Kept(config, parts))
    model.networks, model.views = model.built, {}
    return model


class Kept(StableDiffusion):
    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.built = self.networks

    def forget_text_encoder(self) -> None:
        """For this drawing alone."""
        self.networks = self.networks._replace(text=None)

    def compute_in(self, dtype: str, weights: bool = False) -> None:
        assert dtype == "float32" and not weights, "what is compiled would not change"

    def compile_blockwise(self) -> None:
        raise AssertionError("small networks are compiled whole")
