"""Captions, pictures, batches and the embedded emoji: every refusal, every conversion, and the order of the stream."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from ldm.data import images
from ldm.data.batches import Augment, Batches, epoch_order
from ldm.data.captions import Sample, caption_warnings, read_captions
from ldm.data.colour import CURVE, PRIMARIES, rgb_profile, to_srgb
from ldm.data.dataset import CaptionedImages
from ldm.data.images import (
    LONGEST,
    BadImageError,
    Room,
    check_image,
    crop,
    decode,
    fingerprint,
    load_image,
    measure,
    to_float,
)
from ldm.errors import UserError
from ldm.pictures import ENTRY, read_facts
from ldm.text.tokenizer import Tokenizer
from tools import emoji_concepts, prepare_emoji

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "datasets" / "emoji"


def write_csv(folder: Path, text: str, encoding: str = "utf-8") -> None:
    (folder / "img_txt.csv").write_bytes(text.encode(encoding))


def noise_image(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five noisy pictures of different shapes, captioned "caption 0" to "caption 4"."""
    for index in range(5):
        noise_image(index, 16 + 4 * index, 20).save(tmp_path / f"{index}.png")
    write_csv(tmp_path, "dir,text\n" + "".join(f"{index}.png,caption {index}\n" for index in range(5)))
    return tmp_path


def refusal(*args, **kwargs) -> str:
    """The message with which a data set is refused: one line."""
    with pytest.raises(UserError) as error:
        CaptionedImages(*args, image_size=16, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- captions ---


def test_captions_stay_as_written(tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    write_csv(
        tmp_path,
        'id,text,dir\r\n1,"a ""red"" fox, sitting\r\nin snow",a.png\r\n\r\n2,007,a.png\r\n3,NA,a.png\r\n4,,a.png\r\n',
        "utf-8-sig",
    )
    texts = [sample.text for sample in read_captions(tmp_path)]
    assert texts == ['a "red" fox, sitting\r\nin snow', "007", "NA", ""]


def test_absolute_paths_and_links_within_the_folder_are_accepted(tmp_path):
    (tmp_path / "sub").mkdir()
    noise_image(0).save(tmp_path / "sub" / "a.png")
    (tmp_path / "link.png").symlink_to("sub/a.png")
    write_csv(tmp_path, f"dir,text\n{tmp_path}/sub/a.png,one\nsub/../link.png,two\n")
    assert {sample.path for sample in read_captions(tmp_path)} == {str((tmp_path / "sub" / "a.png").resolve())}


def test_missing_folder_and_missing_csv(tmp_path):
    assert "'/no/such/folder' does not exist" in refusal("/no/such/folder")
    assert "no img_txt.csv" in refusal(tmp_path)
    (tmp_path / "captions.csv").write_text("dir,text\n")
    assert "captions.csv' has no rows" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "captions.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lacks the column dir and text: it has none"),
        ("file,text\na.png,x\n", "lacks the column dir: it has file,text; rename 'file' to dir"),
        ("Dir,Text\na.png,x\n", "it has Dir,Text; rename 'Dir' to dir; rename 'Text' to text"),
        ("dir;text\na.png;x\n", "has its columns separated by semicolons, 'dir;text': save it with commas"),
        ("dir\ttext\na.png\tx\n", "separated by tabs"),
        ("sep=;\ndir;text\na.png;x\n", "begins with the line 'sep=;': delete that line"),
        ('"sep=,"\ndir,text\na.png,x\n', "begins with the line 'sep=,': delete that line"),
        ("dir,text\na.png,x\n\0.png,x\n", "holds a NUL in line 3"),
        ("dir,text\nA.PNG,x\n", "line 2: 'A.PNG' is not a file in the data folder: did you mean 'a.png'?"),
        ("dir,text\na,x\n", "did you mean 'a.png'?"),
        ("dir,text\nsub\\b.png,x\n", "'sub\\\\b.png' is not a file in the data folder: did you mean 'sub/b.png'?"),
        ("dir,text\nC:\\pictures\\b.png,x\n", "did you mean 'sub/b.png'?"),
        ("dir,text\nmu\u0308ll.png,x\n", "did you mean 'm\xfcll.png'?"),
        ('dir,text\n"a\nb.png",x\n', "line 2: 'a\\nb.png' is not a file"),
        ("dir,text\n", "no rows"),
        (
            "dir,text\na.png,x\nmissing.png,x\ngone.png,x\n",
            "line 3: 'missing.png' is not a file in the data folder (2 of",
        ),
        ('dir,text\na.png,"two\nlines"\nmissing.png,x\n', "line 4: 'missing.png'"),
        ("dir,text\n,x\n", "line 2: ''"),
        ("dir,text\nsub,x\n", "line 2: 'sub' is not a file"),
        ("dir,text\n../outside.png,x\n", "line 2: '../outside.png' lies outside"),
        ("dir,text\nlink.png,x\n", "line 2: 'link.png' lies outside the data folder, for it is a link to '"),
        ("dir,text\nlinked/outside.png,x\n", "line 2: 'linked/outside.png' lies outside"),
        ("dir,text\n/etc/passwd,x\n", "line 2: '/etc/passwd' lies outside"),
        ("dir,text\na.png,a fox, sitting\n", "line 2 has 3 fields for 2 columns: put a caption with a comma"),
        ('dir,text\na.png,"never closed\n', "is not CSV"),
        ('dir,text\na.png,x\na.png,"a"b\n', "line 3 is not CSV"),
        ('dir,text\n"a\nb.png",x\na.png,a fox, sitting\n', "line 4 has 3 fields for 2 columns"),
        ("dir,text,,\na.png,x,,,\n\nmissing.png,x\n", "line 4: 'missing.png'"),
    ],
)
def test_broken_csv_is_refused(tmp_path, content, message):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "m\xfcll.png"):
        noise_image(0).save(data / name)
    noise_image(0).save(tmp_path / "outside.png")
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    (data / "linked").symlink_to(tmp_path)
    write_csv(data, content)
    assert message in refusal(data)


def test_csv_in_another_encoding_is_refused(folder):
    write_csv(folder, "dir,text\n0.png,café\n", "latin-1")
    assert "not UTF-8 text: line 2 holds the byte 0xe9" in refusal(folder)
    write_csv(folder, "dir,text\n0.png,café\n", "utf-16")
    assert "is UTF-16, not UTF-8 text: save it as UTF-8" in refusal(folder)
    write_csv(folder, "dir,text\n0.png,café\n", "utf-16-le")
    assert "holds a NUL in line 1, so it is UTF-16 or no text" in refusal(folder)


def test_the_empty_rows_and_columns_of_spreadsheets_are_passed_over(folder):
    write_csv(folder, "dir,text,,\r\n0.png,one,,,\r\n,,,\r\n , \r\n1.png,two\r\n,,,\r\n")
    assert [sample.text for sample in read_captions(folder)] == ["one", "two"]


def test_all_caption_files_of_a_folder_are_read(folder, caplog):
    caplog.set_level("INFO", "ldm.data.captions")
    read_captions(folder)
    assert not caplog.records
    (folder / "more.csv").write_text("text,dir\nmore,3.png\n")
    (folder / "metadata.csv").write_bytes("file_name,text\n0.png,caf\xe9\n".encode("latin-1"))
    (folder / "._img_txt.csv").write_bytes(b"\0\5\x16\7")
    assert [sample.text for sample in read_captions(folder)][4:] == ["caption 4", "more"]
    (line,) = caplog.messages
    assert "img_txt.csv (5 rows), more.csv (1 rows); not read, for lack of the columns dir,text: metadata.csv" in line
    assert len(read_captions(folder, "img_txt.csv")) == 5
    (folder / "more.csv").write_text("dir,text\ngone.png,x\n")
    assert "more.csv' line 2: 'gone.png' is not a file" in refusal(folder)
    (folder / "img_txt.csv").write_text("file_name,text\n0.png,x\n")
    assert "img_txt.csv' lacks the column dir" in refusal(folder)
    (folder / "img_txt.csv").unlink()
    (folder / "more.csv").unlink()
    assert "metadata.csv is not UTF-8" in refusal(folder)


def write_jsonl(folder: Path, *rows: object) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.mark.parametrize("name", ["dir", "file_name"])
def test_json_lines_are_read_as_they_are_written(folder, name):
    (folder / "img_txt.csv").unlink()
    texts = ["007", "NA", 'a "red" fox,\r\nin\u2028snow', "", None, float("nan"), 7, 7.5, 2**2000]
    write_jsonl(folder, *({name: "0.png", "text": text, "more": [1]} for text in texts), {name: "1.png"})
    read = [sample.text for sample in read_captions(folder)]
    assert read == ["007", "NA", 'a "red" fox,\r\nin\u2028snow', "", "", "", "7", "7.5", str(2**2000), ""]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "metadata.jsonl' has no rows"),
        ("\n{}\n", "lacks the column dir and text: it has none"),
        ('{"image": "0.png", "caption": "x"}', "rename 'image' to dir; rename 'caption' to text"),
        (
            '{"file_name": "0.png", "caption": "x"}',
            "lacks the column text: it has file_name,caption; rename 'caption' to text",
        ),
        ('{"dir": "0.png", "text": "x"}\n\n{"dir": "0.png", "text"}', "line 3 is not JSON: Expecting ':' delimiter"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"dir": "0.png", "text": "x"}\n["0.png", "x"]', "line 2 is not a JSON object"),
        ('\n{"dir": "9.png", "text": "x"}', "line 2: '9.png' is not a file in the data folder"),
        ('{"dir": null, "text": "x"}', "line 1: '' is not a file in the data folder"),
        ('{"dir": "0.png", "text": "x"}\n{"dir": "0.png", "text": ["x"]}', "line 2: text is ['x'], which is not text"),
        ('{"dir": "0.png", "text": true}', "line 1: text is True, which is not text"),
        ('{"dir": "0\\u0000.png", "text": "x"}', "line 1: dir is 0\\x00.png, which is not text"),
        ('{"dir": "0.png", "text": "\\ud800"}', "line 1: text is \\ud800, which is not text"),
    ],
)
def test_broken_json_lines_are_refused(folder, lines, message):
    (folder / "img_txt.csv").unlink()
    (folder / "metadata.jsonl").write_text(lines)
    assert message in refusal(folder)


def test_json_lines_are_read_where_no_csv_has_the_columns(folder, caplog):
    caplog.set_level("INFO", "ldm.data.captions")
    write_jsonl(folder, {"file_name": "0.png", "text": "from JSON"})
    (folder / "prompts.jsonl").write_text('{"file": "0.png", "prompt": "x"}\n')
    assert len(read_captions(folder)) == 5
    assert caplog.messages[-1].endswith("img_txt.csv (5 rows); not read beside .csv: metadata.jsonl, prompts.jsonl")
    (folder / "img_txt.csv").rename(folder / "other.csv")
    (folder / "other.csv").write_text("a,b\n")
    assert [sample.text for sample in read_captions(folder)] == ["from JSON"]
    assert caplog.messages[-1].endswith(
        "metadata.jsonl (1 rows); not read, for lack of the columns dir,text: other.csv, prompts.jsonl"
    )
    assert [sample.text for sample in read_captions(folder, "metadata.jsonl")] == ["from JSON"]


def test_parquet_is_read_as_it_is_written(folder):
    pytest.importorskip("pyarrow", reason="writes Parquet")
    (folder / "img_txt.csv").unlink()
    for name, texts, expected in (
        ("dir", ["007", None, "a,\nb", "NA"], ["007", "", "a,\nb", "NA"]),
        ("file_name", [7, None, 8, 2**60], ["7", "", "8", str(2**60)]),
    ):
        table = pandas.DataFrame({name: ["0.png"] * 4, "more": [1.5] * 4, "text": pandas.array(texts)})
        table.to_parquet(folder / "train.parquet")
        assert [sample.text for sample in read_captions(folder)] == expected


def test_broken_parquet_is_refused(folder):
    pytest.importorskip("pyarrow", reason="writes Parquet")
    (folder / "img_txt.csv").unlink()
    path = folder / "train.parquet"
    for rows, message in (
        ({"dir": ["0.png", "9.png"], "text": ["x", "y"]}, "row 2: '9.png' is not a file"),
        ({"image": ["0.png"], "text": ["x"]}, "lacks the column dir: it has image,text; rename 'image' to dir"),
        ({"dir": ["0.png"], "text": [b"x"]}, "row 1: text is b'x', which is not text"),
        ({"dir": [], "text": []}, "train.parquet' has no rows"),
    ):
        pandas.DataFrame(rows).to_parquet(path)
        assert message in refusal(folder)
    path.write_bytes(b"PAR1" * 10)
    assert "train.parquet' cannot be read as Parquet: " in refusal(folder)


def test_without_pyarrow_one_line_says_what_to_do(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "train.parquet").write_bytes(b"PAR1")
    assert len(read_captions(folder)) == 5
    (folder / "img_txt.csv").unlink()
    assert 'needs pyarrow: `pip install "pyarrow<22"`, or save the captions as CSV' in refusal(folder)


def test_captions_that_are_cut_or_all_empty_are_told_once():
    tokenizer = Tokenizer(context_length=10)  # room for 8
    texts = ["a", "a b c d e f g h", "", "a b c d e f g h i", "a b c d e\nf g h i", "ab" * 5, "a b c d e f g h i"]
    samples = [Sample("a.png", text) for text in texts]
    (line,) = caption_warnings(samples, tokenizer)
    cut = "3 of 7 captions have more than 8 tokens; the rest is not seen without a larger --text_chunks"
    assert line == f"{cut}: 'a b c d e f g h i'"
    assert caption_warnings(samples, tokenizer, 2) == []
    assert caption_warnings(samples[:3], tokenizer) == []
    assert "all captions are empty" in caption_warnings([Sample("a.png", ""), Sample("b.png", " ")], tokenizer)[0]


# --- pictures ---


def save(image: Image.Image, path: Path, **options) -> str:
    image.save(path, **options)
    return str(path)


def test_transparency_lies_on_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 255), (0, 0, 4, 8))
    rgba.paste((0, 0, 0, 128), (4, 4, 8, 8))
    picture = load_image(save(rgba, tmp_path / "a.png"), 8)
    assert picture[0, 0].tolist() == [0, 0, 255]
    assert picture[0, 7].tolist() == [255, 255, 255]
    assert picture[7, 7].tolist() == [127, 127, 127]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_transparent_colour_lies_on_white(tmp_path, mode):
    image = noise_image(0).convert(mode)
    image.paste(0, (0, 0, 8, 16))
    picture = load_image(save(image, tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0), 16)
    assert (picture[:, :8] == 255).all()
    assert (picture[:, 8:] < 255).any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "RGBA"])
def test_opaque_modes_keep_their_colours(tmp_path, mode):
    image = Image.new("RGB", (8, 8), "white" if mode in ("1", "L", "LA") else (200, 40, 80))
    stored = image.quantize(4) if mode == "P" else image.convert(mode)
    path = save(stored, tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    picture = load_image(path, 8)
    assert picture.dtype == np.uint8
    assert picture.shape == (8, 8, 3)
    assert np.abs(picture.astype(int) - np.asarray(image)).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([0, 128, 129, 300, 25700, 32768, 65407, 65535], dtype=np.uint16)
    picture = load_image(save(Image.fromarray(values.repeat(8).reshape(8, 8)), tmp_path / f"a.{suffix}"), 8)
    assert picture[:, 0, 1].tolist() == [0, 0, 1, 1, 100, 128, 255, 255]


def test_pixels_without_a_known_range_are_refused(tmp_path):
    for name, values in (("f", np.ones((8, 8), np.float32)), ("i", np.full((8, 8), 70000, np.int32))):
        with pytest.raises(BadImageError, match="8 or 16 bits"):
            load_image(save(Image.fromarray(values), tmp_path / f"{name}.tif"), 8)


P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def in_srgb(pixels: np.ndarray, primaries: tuple, gamma: float | None = None) -> np.ndarray:
    """The definition: 8-bit colours of other primaries (white D65) and curve as sRGB, not rounded."""
    x = pixels / 255
    linear = x ** (1 / gamma) if gamma else np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    spaces = []
    for place in (PRIMARIES, primaries):
        white, *colours = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(place[::2], place[1::2]))
        spaces.append(np.stack(colours, 1) * np.linalg.solve(np.stack(colours, 1), white))
    x = np.clip(linear @ (np.linalg.inv(spaces[0]) @ spaces[1]).T, 0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def png_chunks(**values: tuple[int, ...]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for name, numbers in values.items():
        info.add(name.encode(), struct.pack(f">{len(numbers)}I", *numbers))
    return info


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_colour_profile_is_applied_and_the_evaluation_sees_the_same(tmp_path, suffix):
    image = noise_image(0)
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(image, tmp_path / f"a.{suffix}", icc_profile=rgb_profile(CURVE, P3), **options)
    expected = in_srgb(np.asarray(image), P3)
    assert np.abs(expected - np.asarray(image)).max() > 20
    assert np.abs(load_image(path, 16) - expected).max() < 1.1
    np.testing.assert_array_equal(decode(path), load_image(path, 16))


def test_a_colour_profile_leaves_transparency_and_palettes_as_they_are(tmp_path):
    profile = rgb_profile(CURVE, P3)
    alpha = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    image = noise_image(0)
    image.putalpha(alpha)
    expected = in_srgb(np.asarray(image)[..., :3], P3)
    share = np.asarray(alpha)[..., None] / 255
    picture = load_image(save(image, tmp_path / "a.png", icc_profile=profile), 16)
    assert np.abs(picture - (expected * share + 255 * (1 - share))).max() < 2
    palette = noise_image(0).quantize(16)
    picture = load_image(save(palette, tmp_path / "b.png", icc_profile=profile), 16)
    assert np.abs(picture - in_srgb(np.asarray(palette.convert("RGB")), P3)).max() < 1.1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_pixels_take_a_curve_from_a_grey_or_an_rgb_profile(tmp_path, mode):
    profile = rgb_profile((1.8,), PRIMARIES)
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = np.where(values > 99, 255, 0).astype(np.uint8) if mode == "1" else values
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    expected = in_srgb(np.stack([values] * 3, -1), PRIMARIES, 1 / 1.8)
    assert mode == "1" or np.abs(expected - values[..., None]).max() > 15
    grey = profile[:16] + b"GRAY" + profile[20:].replace(b"rTRC", b"kTRC")
    for kind, tolerance in ((profile, 1.1), (grey, 2.1)):
        picture = load_image(save(image, tmp_path / "a.png", icc_profile=kind), 16)
        assert np.abs(picture - expected).max() < tolerance


def test_pngs_without_a_profile_may_state_gamma_and_primaries(tmp_path):
    image, primaries = noise_image(0), tuple(round(100000 * x) for x in P3)
    for chunks, expected in (
        ({"gAMA": (100000,)}, in_srgb(np.asarray(image), PRIMARIES, 1.0)),
        ({"gAMA": (55556,), "cHRM": primaries}, in_srgb(np.asarray(image), P3, 1 / 1.8)),
        ({"gAMA": (45455,), "cHRM": primaries}, in_srgb(np.asarray(image), P3)),
    ):
        picture = load_image(save(image, tmp_path / "a.png", pnginfo=png_chunks(**chunks)), 16)
        assert np.abs(picture - expected).max() < 1.1


def test_pictures_in_srgb_keep_their_bits(tmp_path):
    image = noise_image(0)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    standard = tuple(round(100000 * x) for x in PRIMARIES)
    for options in (
        {"icc_profile": srgb},
        {"icc_profile": rgb_profile(CURVE, PRIMARIES)},
        {"icc_profile": b"damaged" * 100},
        {"icc_profile": rgb_profile(CURVE, P3)[:200]},
        {"icc_profile": rgb_profile(CURVE, P3).replace(b"RGB ", b"CMYK", 1)},  # of other pixels than these
        {"icc_profile": rgb_profile(CURVE, P3).replace(b"RGB ", b"GRAY", 1)},
        {"pnginfo": png_chunks(gAMA=(45455,), cHRM=standard)},
        {"pnginfo": png_chunks(gAMA=(45455,))},
        {"pnginfo": png_chunks(gAMA=(0,))},
        {"pnginfo": png_chunks(gAMA=(100000,), cHRM=(0,) * 8)},
        {"pnginfo": png_chunks(gAMA=(100000,), cHRM=(31270, 32900) * 4)},
        {"pnginfo": png_chunks(gAMA=(100000,), cHRM=(2**32 - 1, 1) * 4)},
    ):
        picture = load_image(save(image, tmp_path / "a.png", **options), 16)
        np.testing.assert_array_equal(picture, image, str(options))
    assert to_srgb(image) is image


def cmyk_profile() -> bytes:
    """Of a printer whose black alone is even in lightness, and whose colours all are black."""
    table = [(255 if not (c or m or y or k) else 0, 128, 128) for c, m, y, k in product((0, 1), repeat=4)]
    even = bytes(range(256))
    lut = b"mft1" + struct.pack(">4x4B9i", 4, 3, 2, 0, *(65536 * (i % 4 == 0) for i in range(9)))
    lut += 4 * even + bytes(sum(table, ())) + 3 * even
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut
    head = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(tags), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    return (head + rgb_profile(CURVE, P3)[68:80]).ljust(128, b"\0") + tags


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_pixels_take_the_colours_of_their_profile(tmp_path, suffix):
    black = np.zeros((16, 16, 4), np.uint8)
    black[..., 3] = np.arange(0, 256, 16)
    image = Image.fromarray(black, "CMYK")
    options = {"quality": 100} if suffix == "jpg" else {}
    picture = load_image(save(image, tmp_path / f"a.{suffix}", icc_profile=cmyk_profile(), **options), 16)
    lightness = 100 - black[..., 3] / 2.55
    y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    expected = 255 * np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)
    assert np.abs(expected - (255 - black[..., 3])).max() > 8
    assert np.abs(picture - expected[..., None]).max() < 3


def test_a_profile_of_other_pixels_is_passed_over(tmp_path):
    image = noise_image(0).convert("CMYK")
    plain = load_image(save(image, tmp_path / "a.tif"), 16)
    np.testing.assert_array_equal(
        load_image(save(image, tmp_path / "b.tif", icc_profile=rgb_profile(CURVE, P3)), 16), plain
    )
    path = save(noise_image(0), tmp_path / "c.png", icc_profile=cmyk_profile())
    np.testing.assert_array_equal(load_image(path, 16), noise_image(0))


def test_much_text_and_a_large_profile_are_no_reason_to_refuse_a_picture(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "{}" * (1 << 20), zip=True)
    text.add_itxt("workflow", "{}" * (1 << 20), zip=True)
    profile = rgb_profile(CURVE, P3) + bytes(4 << 20)
    image = noise_image(0)
    path = save(image, tmp_path / "a.png", pnginfo=text, icc_profile=profile)
    assert check_image(path) == (16, 16)
    assert np.abs(load_image(path, 16) - in_srgb(np.asarray(image), P3)).max() < 1.1
    assert read_facts(Path(path)) == {}


def test_a_packed_text_beyond_all_measure_is_refused(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(32 << 20)))
    with pytest.raises(BadImageError, match="a.png': "):
        check_image(save(noise_image(0), tmp_path / "a.png", pnginfo=text))


@pytest.mark.parametrize("words", ["[" * 100_000, '{"a":' * 100_000, "null", "1" * 5000, "[]"])
def test_text_in_a_picture_that_is_not_ours_is_no_fact(tmp_path, words):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(ENTRY, words)
    assert read_facts(Path(save(noise_image(0), tmp_path / "a.png", pnginfo=info))) == {}


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (check_image, decode, lambda path: load_image(path, 16)):
        with pytest.raises(BadImageError, match="not a regular file"):
            read(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="not a regular file.*remove it"):
        read_facts(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        decode("/dev/zero")


def test_threads_wait_for_room_and_a_larger_picture_has_it_alone():
    room, held, most, together = Room(10), [], [], []

    def work(pixels: int) -> None:
        with room.take(pixels):
            held.append(pixels)
            most.append(sum(held))
            together.append(len(held))
            entered.wait(0.05)
            held.remove(pixels)

    entered = threading.Event()
    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in (4, 6, 4, 25, 6, 4, 25, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 8 and room.taken == 0
    assert max(together) > 1
    assert all(total <= 10 or (total == 25 and count == 1) for total, count in zip(most, together))


def test_whatever_decodes_a_picture_takes_room_for_it(tmp_path, monkeypatch):
    taken = []

    class Counting(Room):
        def take(self, pixels):
            taken.append(pixels)
            return super().take(pixels)

    monkeypatch.setattr(images, "_room", Counting(10))
    png, bmp = (save(noise_image(0, 20, 30), tmp_path / name) for name in ("a.png", "a.bmp"))
    jpg = save(noise_image(0, 800, 800), tmp_path / "a.jpg")
    check_image(png)
    assert taken == []
    for read in (check_image, decode, lambda path: load_image(path, 16)):
        read(bmp)
    load_image(jpg, 16)  # which is decoded at a fraction
    assert taken == [600, 600, 600, 100 * 100]
    assert images._room.taken == 0


def test_room_is_given_back_after_an_error():
    room = Room(10)
    with pytest.raises(ValueError), room.take(8):
        raise ValueError
    assert room.taken == 0


def test_camera_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    picture = load_image(save(image, tmp_path / "a.png", exif=exif), 16)
    assert picture.shape == (32, 16, 3)
    assert picture[0, 0].tolist() == [255, 0, 0]
    assert picture[-1, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_measures_are_those_of_the_upright_file(tmp_path, suffix, orientation):
    """Also of a JPEG that is decoded at a fraction: half of 2001 pixels is 1001."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = save(Image.new("RGB", (301, 2001)), tmp_path / f"a.{suffix}", exif=exif)
    turned = orientation in (6, 8)
    for size in (16, 64, 150):
        original, scaled = measure(path, size)
        assert original == ((301, 2001) if turned else (2001, 301))
        assert scaled == load_image(path, size).shape[:2]


def test_measures_of_a_ribbon_are_those_of_its_middle(tmp_path):
    path = save(Image.new("L", (6000, 10)), tmp_path / "a.png")
    assert measure(path, 64) == ((10, 6000), (64, 64 * LONGEST))


def test_a_damaged_camera_record_is_ignored(tmp_path):
    for suffix, exif in (("png", b"no record"), ("jpg", b"Exif\0\0no record")):
        assert load_image(save(noise_image(0), tmp_path / f"a.{suffix}", exif=exif), 16).shape == (16, 16, 3)


def test_the_short_side_is_scaled_without_aliasing(tmp_path):
    checkers = (np.indices((512, 768)).sum(axis=0) % 2 * 255).astype(np.uint8)
    picture = load_image(save(Image.fromarray(checkers), tmp_path / "a.png"), 64)
    assert picture.shape == (64, 96, 3)
    assert abs(picture[8:-8, 8:-8].astype(float) - 127.5).max() < 8
    assert load_image(save(noise_image(0, 10, 7), tmp_path / "b.png"), 64).shape == (64, 91, 3)


def test_a_large_jpeg_read_at_a_fraction_looks_the_same(tmp_path):
    smooth = noise_image(0, 12, 8).resize((1200, 800), Image.BICUBIC)
    jpeg = load_image(save(smooth, tmp_path / "a.jpg", quality=95), 64)
    png = load_image(save(smooth, tmp_path / "a.png"), 64)
    assert np.abs(jpeg.astype(int) - png).max() <= 8


def test_a_ribbon_does_not_exhaust_the_memory(tmp_path):
    path = save(Image.new("L", (60_000, 1)), tmp_path / "a.png")
    assert load_image(path, 64).shape == (64, 64 * LONGEST, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_truncated_files_are_found_by_both_checks(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise_image(0, 64, 48).save(path)
    assert check_image(str(path)) == (64, 48)
    path.write_bytes(path.read_bytes()[:-200])
    for read in (check_image, lambda name: load_image(name, 16)):
        with pytest.raises(BadImageError, match=f"a.{suffix}'"):
            read(str(path))


def test_bytes_behind_the_end_do_no_harm(tmp_path):
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        noise_image(0).save(path)
        path.write_bytes(path.read_bytes() + b"\0" * 1000)
        assert check_image(str(path)) == (16, 16)


def test_what_is_no_picture_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("<html>404</html>")
    with pytest.raises(BadImageError, match="a.png'.*not a complete picture of a known format"):
        check_image(str(tmp_path / "a.png"))
    with pytest.raises(BadImageError, match="No such file"):
        load_image(str(tmp_path / "gone.png"), 16)
    path = save(noise_image(0, 64, 64), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImageError, match="more than 2,000 pixels"):
        check_image(path)


@pytest.mark.parametrize(
    ("error", "words"),
    [(ValueError(), "ValueError"), (KeyError(""), "''"), (OSError("a\n\x1b[31m" + "b" * 9000), ": a$")],
)
def test_whatever_a_reader_of_pictures_raises_is_one_line(tmp_path, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadImageError, match=words) as found:
        check_image(save(noise_image(0), tmp_path / "a.png"))
    assert str(found.value).isprintable() and len(str(found.value)) < 500


def test_crop_geometry():
    picture = np.arange(10 * 16 * 3, dtype=np.uint8).reshape(10, 16, 3)
    np.testing.assert_array_equal(crop(picture, 8), picture[1:9, 4:12])
    rng = np.random.default_rng(0)
    corners = {tuple(crop(picture, 8, rng)[0, 0]) for _ in range(500)}
    assert corners == {tuple(picture[y, x]) for y in range(3) for x in range(9)}
    np.testing.assert_array_equal(crop(picture[:8, :8], 8, rng), picture[:8, :8])


def test_to_float_maps_the_ends_to_one():
    floats = to_float([np.array([[[0, 255, 51]]], dtype=np.uint8)] * 2)
    assert floats.dtype == np.float32
    assert floats.flags.c_contiguous
    np.testing.assert_allclose(floats, np.array([-1, 1, -0.6]).reshape(1, 3, 1, 1).repeat(2, axis=0), atol=1e-6)


# --- the data set ---


def damage(path: Path) -> None:
    """Zero the middle of a file: its header and end stay sound."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path.write_bytes(data)


def test_a_bad_picture_stops_or_is_skipped(folder, caplog):
    damage(folder / "3.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    assert "1.png" in refusal(folder)
    assert "--on_bad_image skip" in refusal(folder)
    dataset = CaptionedImages(folder, 16, on_bad_image="skip")
    assert [dataset[index][1] for index in range(len(dataset))] == ["caption 0", "caption 2", "caption 4"]
    assert "3 captioned pictures; 2 unreadable skipped" in dataset.summary()
    assert len(caplog.records) == 2  # once after the headers, once after decoding


def test_damage_found_late_follows_the_same_policy(folder, caplog):
    damage(folder / "3.png")
    dataset = CaptionedImages(folder, 16, cache_bytes=0)
    with pytest.raises(UserError, match=r"3\.png.*--on_bad_image skip"):
        dataset[3]
    dataset = CaptionedImages(folder, 16, cache_bytes=0, on_bad_image="skip")
    for _ in range(3):
        picture, text = dataset[3]
        assert text == "caption 4"
        np.testing.assert_array_equal(picture, load_image(str(folder / "4.png"), 16))
    noise_image(3).save(folder / "3.png")
    assert dataset[3][1] == "caption 4"  # what was skipped once stays so, or the stream would change within a run
    assert list(dataset.bad) == [str(folder / "3.png")]
    assert len(caplog.records) == 1


def test_small_pictures_are_left_out_and_counted(folder):
    dataset = CaptionedImages(folder, 16, image_filter_size=20)
    assert [sample.text for sample in dataset.samples] == ["caption 1", "caption 2", "caption 3", "caption 4"]
    assert "1 smaller than image_filter_size" in dataset.summary()
    assert "5 are smaller than image_filter_size 99" in refusal(folder, image_filter_size=99)


def test_a_changed_picture_changes_the_facts_and_a_copied_one_does_not(folder, tmp_path_factory):
    facts = CaptionedImages(folder, 16).facts()
    copy = tmp_path_factory.mktemp("elsewhere") / "data"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert CaptionedImages(copy, 16).facts() == facts and facts["pictures"] == 5
    for suffix, options in (("png", {}), ("jpg", {"quality": 90}), ("webp", {"lossless": True})):
        picture = noise_image(9, 300, 200).resize((1200, 800))
        before = fingerprint(save(picture, copy / f"a.{suffix}", **options))
        picture.putpixel((700, 90), tuple(255 - value for value in picture.getpixel((700, 90))))
        assert fingerprint(save(picture, copy / f"b.{suffix}", **options)) != before
    noise_image(99, 16, 20).save(copy / "0.png")
    changed = CaptionedImages(copy, 16).facts()
    assert [key for key in facts if changed[key] != facts[key]] == ["picture_contents"]
    (copy / "0.png").unlink()
    with pytest.raises(BadImageError, match="0.png': No such file"):
        fingerprint(str(copy / "0.png"))


def test_nothing_readable_and_unknown_policy(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    assert "5 are unreadable" in refusal(folder, on_bad_image="skip")
    assert "choose from error, skip" in refusal(folder, on_bad_image="ignore")


def test_cached_and_uncached_pictures_are_equal(folder):
    cached, uncached = CaptionedImages(folder, 16), CaptionedImages(folder, 16, cache_bytes=0)
    assert len(list(cached)) == 5
    for (one, _), (other, _) in zip(cached, uncached):
        np.testing.assert_array_equal(one, other)
    (folder / "0.png").unlink()
    assert cached[0][0].shape == (20, 16, 3)
    with pytest.raises(UserError, match="0.png"):
        uncached[0]


# --- the stream ---

AUGMENT = Augment(random_crop=True, flip=True, caption_dropout=0.3)


def stream(batches: Batches, steps: int) -> list[tuple[int, bytes, str]]:
    """(ordinal, pixels, caption) of every sample in the first `steps` batches."""
    return [
        (int(ordinal), image.tobytes(), text)
        for batch in islice(batches, steps)
        for ordinal, image, text in zip(batch.ordinals, batch.images, batch.texts)
    ]


def test_batches_have_the_promised_form(folder):
    batch = next(iter(Batches(CaptionedImages(folder, 16), 3, seed=0)))
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.images.dtype == np.float32
    assert -1 <= batch.images.min() < -0.9 < 0.9 < batch.images.max() <= 1
    assert batch.ordinals.dtype == np.int64
    assert all(text.startswith("caption ") for text in batch.texts)


def test_every_sample_comes_once_per_pass(folder):
    samples = stream(Batches(CaptionedImages(folder, 16), 3, seed=1), 10)  # 6 passes over 5 pictures
    passes = [[text for _, _, text in samples[first : first + 5]] for first in range(0, 30, 5)]
    assert all(sorted(texts) == [f"caption {index}" for index in range(5)] for texts in passes)
    assert len({tuple(texts) for texts in passes}) > 1
    assert [ordinal for ordinal, _, _ in samples] == list(range(30))
    assert not np.array_equal(epoch_order(1, 100, 0), epoch_order(2, 100, 0))


def test_the_stream_does_not_depend_on_batch_size_ranks_or_restarts(folder):
    dataset = CaptionedImages(folder, 16)
    whole = stream(Batches(dataset, 1, 7, AUGMENT), 24)
    assert stream(Batches(dataset, 8, 7, AUGMENT), 3) == whole  # a batch larger than the data set
    assert stream(Batches(dataset, 4, 7, AUGMENT, start_step=3), 3) == whole[12:]
    shares = [stream(Batches(dataset, 3, 7, AUGMENT, rank=rank, ranks=2), 4) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == whole
    assert stream(Batches(CaptionedImages(folder, 16, cache_bytes=0), 8, 7, AUGMENT), 3) == whole
    assert stream(Batches(dataset, 1, 8, AUGMENT), 24) != whole


def test_random_changes_happen_as_often_as_asked(folder):
    dataset = CaptionedImages(folder, 16)
    plain, flipped = Batches(dataset, 1, 0), Batches(dataset, 1, 0, Augment(flip=True))
    flips = 0
    for ordinal in range(400):
        before, after = plain.sample(ordinal)[0], flipped.sample(ordinal)[0]
        if not np.array_equal(before, after):
            np.testing.assert_array_equal(before[:, ::-1], after)
            flips += 1
    assert 160 < flips < 240
    dropping = Batches(dataset, 1, 0, Augment(caption_dropout=0.25))
    assert 70 < sum(dropping.sample(ordinal)[1] == "" for ordinal in range(400)) < 130
    always, never = (Batches(dataset, 1, 0, Augment(caption_dropout=p)) for p in (1.0, 0.0))
    assert all(always.sample(ordinal)[1] == "" != never.sample(ordinal)[1] for ordinal in range(50))


@pytest.mark.parametrize("augment", [Augment(), Augment(random_crop=True, flip=True)])
def test_cuts_say_where_pictures_come_from(tmp_path, augment):
    """The caption is the picture's number, and a pixel says its place in the file: red the column, green the row."""
    rows = []
    for n, (width, height, orientation) in enumerate([(40, 20, 1), (20, 40, 6), (30, 20, 3), (20, 20, 1)]):
        exif, pixels = Image.Exif(), np.zeros((height, width, 3), np.uint8)
        exif[0x0112] = orientation
        pixels[..., 0], pixels[..., 1] = 4 * np.arange(width), 4 * np.arange(height)[:, None]
        Image.fromarray(pixels).save(tmp_path / f"{n}.png", exif=exif)
        rows.append(f"{n}.png,{n}")
    write_csv(tmp_path, "dir,text\n" + "\n".join(rows))
    data = CaptionedImages(tmp_path, 20, keep_squares=False)
    assert not data.square
    whole = [data[n][0] for n in range(4)]  # no side is scaled
    seen = {}
    for batch in islice(Batches(data, 4, 5, augment, cuts=True), 30):
        for image, text, mirrored, (original, (top, left), target) in zip(
            batch.images, batch.texts, batch.mirrored, batch.cuts
        ):
            picture = whole[int(text)]
            assert original == picture.shape[:2] and target == (20, 20)
            picture = picture[:, ::-1] if mirrored else picture
            cut = picture[top : top + 20, left : left + 20]
            np.testing.assert_array_equal(to_float([cut])[0], image)
            seen.setdefault(int(text), set()).add((mirrored, top, left))
    if augment.flip:
        assert all({mirrored for mirrored, _, _ in places} == {False, True} for places in seen.values())
        assert len({left for _, _, left in seen[0]}) > 5 and {top for _, top, _ in seen[0]} == {0}
    else:
        assert seen == {0: {(False, 0, 10)}, 1: {(False, 0, 10)}, 2: {(False, 0, 5)}, 3: {(False, 0, 0)}}


def test_cuts_without_pictures_are_the_same(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "0.png")
    write_csv(tmp_path, "dir,text\n0.png,a\n")
    data, flip = CaptionedImages(tmp_path, 10), Augment(flip=True)
    with_them, without = (
        [batch.cuts for batch in islice(Batches(data, 2, 3, flip, pictures=pictures, cuts=True), 5)]
        for pictures in (True, False)
    )
    assert with_them == without
    assert next(iter(Batches(data, 2, 3, flip))).cuts is None


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_caption_dropout_is_a_probability(dropout):
    with pytest.raises(UserError, match="from 0 to 1"):
        Augment(caption_dropout=dropout)


def test_epochs_are_whole_batches_and_at_least_one_step(folder):
    dataset = CaptionedImages(folder, 16)
    steps = {
        (size, ranks): Batches(dataset, size, 0, ranks=ranks).steps_per_epoch for size in (1, 2, 9) for ranks in (1, 2)
    }
    assert steps == {(1, 1): 5, (1, 2): 2, (2, 1): 2, (2, 2): 1, (9, 1): 1, (9, 2): 1}


def test_an_error_while_reading_ahead_reaches_the_loop(folder):
    damage(folder / "3.png")
    dataset = CaptionedImages(folder, 16, cache_bytes=0)
    with pytest.raises(UserError, match="3.png"):
        list(islice(Batches(dataset, 2, seed=0), 3))


def test_a_script_that_leaves_the_stream_ends(folder):
    script = (
        "import sys; from ldm.data.batches import Batches; from ldm.data.dataset import CaptionedImages\n"
        f"stream = iter(Batches(CaptionedImages({str(folder)!r}, 16, cache_bytes=0), 4, 0)); next(stream); sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=30, check=False).returncode == 7


def test_data_code_does_not_wait_for_mindspore():
    script = "import sys, ldm.data.batches; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=30, check=False).returncode == 0


# --- the embedded emoji ---


@pytest.mark.parametrize("style", ["noto", "twemoji", "fluent", "openmoji"])
def test_embedded_sets_are_whole(style):
    train, test = (read_captions(EMOJI / style / part) for part in ("train", "test"))
    names = [{Path(sample.path).name for sample in part} for part in (train, test)]
    assert [len(part) for part in names] == [1156 if style == "openmoji" else 1277, 121]
    assert names[0].isdisjoint(names[1]) if style == "openmoji" else names[0] > names[1]
    for part in ("train", "test"):
        files = {path.name for path in (EMOJI / style / part).glob("*.png")}
        assert files == names[part == "test"]
    assert all(sample.text.startswith("a drawing of ") for sample in train + test)
    assert all(check_image(sample.path) == (64, 64) for sample in test)


def test_the_base_csv_joins_the_three_base_sets():
    joined = {(sample.path, sample.text) for sample in read_captions(EMOJI)}
    parts = [read_captions(EMOJI / style / "train") for style in ("noto", "twemoji", "fluent")]
    assert joined == {(sample.path, sample.text) for part in parts for sample in part}
    assert len(joined) == 3 * 1277


def test_every_set_carries_its_licence():
    for style, words in {
        "noto": ("Apache License", "Version 2.0"),
        "twemoji": ("Attribution 4.0 International", "Section 3"),
        "fluent": ("MIT License", "Microsoft"),
        "openmoji": ("Attribution-ShareAlike 4.0 International", "Section 3"),
    }.items():
        licence, notice = ((EMOJI / style / name).read_text(encoding="utf-8") for name in ("LICENSE", "NOTICE.md"))
        assert all(word in licence for word in words)
        assert "Changes made" in notice
        assert "https://" in notice
    assert "MIT License" in (EMOJI / "LICENSE-emojibase").read_text(encoding="utf-8")


def test_the_preparing_tool_captions_and_draws_as_the_files_show():
    labels = ["red apple", "umbrella with rain drops", "unicorn", "glasses", "octopus", "two hearts", "Aries"]
    articled = [emoji_concepts.with_article(label) for label in labels]
    assert articled == [
        "a red apple",
        "an umbrella with rain drops",
        "a unicorn",
        "glasses",
        "an octopus",
        "two hearts",
        "Aries",
    ]
    assert emoji_concepts.caption("red apple", "red", "noto") == "a drawing of a red apple, noto style"
    assert emoji_concepts.main_colour(Image.new("RGBA", (64, 64), (250, 10, 10, 255))) == "red"
    drawing = Image.new("RGBA", (256, 256))
    drawing.paste("blue", (100, 100, 150, 150))
    picture = np.asarray(Image.open(io.BytesIO(prepare_emoji.to_png(drawing))).convert("RGB"))
    assert picture.shape == (64, 64, 3)
    assert picture[32, 32].tolist() == [0, 0, 255]
    assert (picture[0] > 250).all()
    with open(EMOJI / "openmoji" / "test" / "img_txt.csv", encoding="utf-8", newline="") as file:
        held_out = {row["dir"] for row in csv.DictReader(file)}
    concepts = {"1F602": "face with tears of joy", "1F923": "rolling on the floor laughing"}
    for code, label in concepts.items():
        concept = emoji_concepts.Concept(code, label)
        assert concept.is_test == (concept.file_name in held_out)
