"""Drawn pictures as JPEG and WebP, whose text is EXIF data, and previews of what is being drawn."""

import numpy as np
import pytest
import text_to_image
from full_disk import files_of_at_most
from PIL import ExifTags, Image
from test_scripts import call, place, refusal, sampling  # noqa: F401

from ldm import runtime
from ldm.data.images import decode, to_float
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.parts import VAE
from ldm.pictures import GAP, find_drawn, grid, next_number, read_facts, read_png, read_record, save_drawn
from ldm.preview import Preview
from ldm.weights import choose_config, open_weights

TINY = "models/tiny-vpred.safetensors"
WORDS = ["--prompt", "ein grünes Haus, 緑の家", "--n_iter", 1, "--n_samples", 2, "--skip_grid"]


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_what_a_file_says(suffix, tmp_path):
    """Its facts, also beyond ASCII, and their line; A1111's words where its readers look for them."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[8:24, 8:24] = (200, 30, 90)
    facts = {"prompt": "ein grünes Haus, 緑の家", "seed": 3, "guidance_interval": None}
    path = tmp_path / f"00004.{suffix}"
    save_drawn(picture, path, facts, "ein grünes Haus, 緑の家\nSteps: 3")
    assert read_facts(path) == facts and next_number(tmp_path) == 5 and find_drawn(tmp_path, 4) == path
    assert read_record(tmp_path / "prompts.jsonl") == {path.name: {"file": path.name, **facts}}
    assert np.abs(read_png(path).astype(int) - picture).mean() < 4
    comment = Image.open(path).getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == "ein grünes Haus, 緑の家\nSteps: 3"


def test_a_jpeg_is_drawn_again_and_resumed(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    words = [*WORDS, "--image_format", "jpg", "--preview_interval", 2, "--sampling_steps", 4]
    words += ["--hires_scale", 1.5, "--heun"]
    call(monkeypatch, text_to_image, sampling(place, tmp_path / "run", *words))
    samples = tmp_path / "run/samples"
    assert sorted(path.name for path in samples.iterdir()) == ["00000.jpg", "00001.jpg", "prompts.jsonl"]
    previews = sorted((tmp_path / "run/previews").iterdir())
    assert [path.name for path in previews] == [f"{k:05}-{step:03}.png" for k in (0, 1) for step in (2, 4, 6)]
    assert read_png(previews[2]).shape == (48, 48, 3)

    again = ["--ckpt_path", place / "base.safetensors", "--output_path", tmp_path / "again", "--skip_grid"]
    call(monkeypatch, text_to_image, [*again, "--from_image", samples / "00001.jpg", "--image_format", "jpg"])
    repeated = tmp_path / "again/samples/00000.jpg"
    np.testing.assert_array_equal(read_png(repeated), read_png(samples / "00001.jpg"))
    assert read_facts(repeated) == read_facts(samples / "00001.jpg")
    assert not (tmp_path / "again/previews").exists()  # and previews have changed no picture

    line = refusal(monkeypatch, capsys, text_to_image, sampling(place, tmp_path / "run", *WORDS, "--resume", "--euler"))
    assert "00000.jpg was drawn with hires_scale 1.5, not None" in line


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_full_disk_leaves_no_half_picture(suffix, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="nothing is left behind; make room there"), files_of_at_most(500):
        save_drawn(noise, tmp_path / f"00000.{suffix}", {"prompt": "a cat"}, "a cat")
    assert not list(tmp_path.iterdir())
    (tmp_path / "prompts.jsonl").write_bytes(b"\n" * 100_000)  # no room for a line, but for a picture
    with pytest.raises(UserError, match="the picture itself is there"), files_of_at_most(100_010):
        save_drawn(noise, tmp_path / f"00000.{suffix}", {"prompt": "a cat"}, "a cat")
    assert read_facts(tmp_path / f"00000.{suffix}") == {"prompt": "a cat"}
    save_drawn(noise, tmp_path / f"00001.{suffix}", {"prompt": "a dog"})
    assert read_record(tmp_path / "prompts.jsonl").keys() == {f"00001.{suffix}"}


def test_a_text_that_a_jpeg_has_no_room_for(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    with pytest.raises(UserError, match="--image_format png or webp has"):
        save_drawn(np.zeros((8, 8, 3), np.uint8), tmp_path / "00000.jpg", {"prompt": "緑" * 20000}, "x")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(runtime, "start", None)
    words = sampling(place, tmp_path / "out", "--image_format", "jpg", "--prompt", "緑の家" * 3000)
    assert "a JPEG has no room for prompts of such length" in refusal(monkeypatch, capsys, text_to_image, words)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_previews_is_tried_before_anything_is_drawn(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(runtime, "start", None)
    (tmp_path / "previews").write_text("")
    line = refusal(monkeypatch, capsys, text_to_image, sampling(place, tmp_path, *WORDS, "--preview_interval", 1))
    assert "previews: File exists; choose another --output_path" in line


def test_a_grid_has_no_more_rows_than_pictures():
    assert grid(np.zeros((2, 4, 6, 3), np.uint8), 10**9).shape == (2 * 4 + 3 * GAP, 6 + 2 * GAP, 3)


def test_the_linear_map_shows_the_picture():
    """At the resolution of the latents, of real pictures."""
    weights = open_weights(TINY)
    model = StableDiffusion(choose_config(weights).config, (VAE,))
    model.load(weights.checkpoint.tensors, TINY, (VAE,), copy=True)
    names = ("house", "tomato", "banana", "brick")
    pictures = to_float([decode(f"datasets/emoji/noto/test/{name}.png") for name in names])  # [4, 3, 64, 64]
    latents, _ = model.encode_images(pictures)
    shown = Preview(model)(latents) / 127.5 - 1  # [4, 16, 16, 3]
    wanted = pictures.reshape(4, 3, 16, 4, 16, 4).mean((3, 5)).transpose(0, 2, 3, 1)
    explained = 1 - ((shown - wanted) ** 2).mean() / wanted.var()
    print(f"explained variance {explained:.3f}")
    assert explained > 0.6  # the best linear map of the test pictures has 0.76
