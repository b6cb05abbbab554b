"""What a drawing begins with: a picture, a mask, a depth map, two seeds, and the larger picture that follows."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import text_to_image
import train_text_to_image
from PIL import ExifTags, Image
from test_samplers import SD, ZERO, mixture
from test_scripts import CONFIG, call, place, refusal, sampling, training  # noqa: F401

from ldm import checkpoint, modes, runtime
from ldm.a1111 import parameters
from ldm.config.model import load_model_config, save_model_config
from ldm.data import inputs
from ldm.data.images import decode_grey
from ldm.data.inputs import Inputs
from ldm.diffusion.denoiser import Blend
from ldm.diffusion.samplers import SAMPLERS, get_sampler
from ldm.drawing import run_facts, ways_to_draw
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.parts import UNET
from ldm.pictures import pasted, read_facts, read_png, save_png
from ldm.pipeline import Pipeline, sampler_of, settings_for
from ldm.randomness import between, generator
from ldm.weights import words_of

WORDS = ["--n_iter", 1, "--skip_grid", "--prompt", "a red house"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with init.png and mask.png of 48 x 32 pixels, and depth.png, grey of 16 bits."""
    folder = tmp_path_factory.mktemp("files")
    rows, columns = np.mgrid[0:32, 0:48]
    picture = np.stack((rows * 8, columns * 5, 255 - rows * 4), 2).astype(np.uint8)
    save_png(picture, folder / "init.png")
    hole = np.zeros((32, 48), np.uint8)
    hole[9:20, 13:30] = 255
    Image.fromarray(hole).save(folder / "mask.png")
    Image.fromarray((1000 + rows[:, :32] * 10 + columns[:, :32]).astype(np.uint16)).save(folder / "depth.png")
    return folder


def beginning(files, *more):
    return [*WORDS, "--init_image", files / "init.png", *more]


def draw(monkeypatch, place, out, *words):  # noqa: F811
    """The pictures of a run, and the facts in the first one."""
    call(monkeypatch, text_to_image, sampling(place, out, *words))
    paths = sorted((out / "samples").glob("*.png"))
    return [read_png(path) for path in paths], read_facts(paths[0])


# ---- mathematics ----


def test_noise_between_two_seeds():
    one, other = (np.random.default_rng(seed).standard_normal((3, 4, 16, 16)) for seed in (1, 2))
    np.testing.assert_allclose(between(one, other, 0), one, rtol=1e-12)
    np.testing.assert_allclose(between(one, other, 1), other, rtol=1e-12)
    np.testing.assert_allclose(between(one, one, 0.3), one, rtol=1e-9)
    half = between(one, other, 0.5)
    assert np.abs(half.std((1, 2, 3)) - 1).max() < 0.06  # a mean of the two would have 0.71
    np.testing.assert_allclose(half[:1], between(one[:1], other[:1], 0.5), rtol=1e-12)


@pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero snr"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_known_part_comes_out_as_it_is_known(name, schedule):
    """With every sampler; the rest is drawn as without it, by a denoiser that sees each value alone."""
    sampler = get_sampler(name, schedule, final_sigma="zero")
    noise = [generator(0, "test", step).standard_normal((2, 1, 4, 4)) for step in range(8)]
    known, mask = np.linspace(-1, 1, 16).reshape(1, 1, 4, 4), np.zeros((1, 1, 4, 4), bool)
    mask[..., 1:3, 2:] = True

    def run(denoise):
        return sampler(denoise, noise[7], sampler.times(schedule, 6), schedule, lambda step: noise[step])

    plain, blended = run(mixture(schedule)), run(Blend(mixture(schedule), known, mask, schedule))
    inside = np.broadcast_to(mask, plain.shape)
    np.testing.assert_allclose(blended[inside], plain[inside], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(blended[~inside], np.broadcast_to(known, plain.shape)[~inside], atol=1e-9)


def test_the_soft_edge_lies_outside_the_hole():
    hole = np.zeros((40, 40), bool)
    hole[12:28, 12:28] = True
    drawn, known = np.full((1, 40, 40, 3), 200, np.uint8), np.full((40, 40, 3), 100, np.uint8)
    row = pasted(drawn, known, hole, 8)[0, 20, :, 0].astype(int)
    assert (row[12:28] == 200).all() and (row[:4] == 100).all() and (row[36:] == 100).all()
    assert (np.diff(row[3:13]) > 0).all()  # eight pixels between


# ---- files ----


def test_the_sides_of_a_drawing(files):
    given = Inputs(init_image=str(files / "init.png"))  # 48 x 32
    assert given.sides(None, None, 64, 8) == (64, 96)
    assert given.sides(40, None, 64, 8) == (40, 64)  # 60 is between 56 and 64
    assert given.sides(None, 96, 64, 8) == (64, 96)
    assert given.sides(24, 16, 64, 8) == (24, 16)
    assert Inputs().sides(None, 16, 64, 8) == (64, 16)


def test_a_file_covers_the_drawing(files):
    given = Inputs(str(files / "init.png"), str(files / "mask.png"), str(files / "depth.png"))
    np.testing.assert_array_equal(given.picture(32, 48), read_png(files / "init.png"))
    middle = given.picture(32, 32)
    np.testing.assert_array_equal(middle, read_png(files / "init.png")[:, 8:40])
    assert given.hole(32, 48).sum() == 11 * 17
    depth = given.depth(32, 32)
    assert (depth.min(), depth.max()) == (-1, 1) and len(np.unique(depth)) > 256  # 16 bits


def test_a_grey_picture_of_16_bits_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera's top is at the right
    values = np.arange(8, dtype=np.uint16).reshape(2, 4) * 9000
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_allclose(decode_grey(tmp_path / "turned.png") * 65535, np.rot90(values, -1), atol=0.01)


# ---- drawing ----


@pytest.fixture(scope="module")
def pipeline(place):  # noqa: F811
    model = StableDiffusion(CONFIG)
    model.load(checkpoint.load(place / "base.safetensors").tensors, "base", copy=True)
    return Pipeline(CONFIG, model)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_steps_of_every_sampler_begin_at_the_picture(name, pipeline, files):
    """One step of eight stays near the picture, all eight lead away; masked, the rest stays exactly."""
    inputs = Inputs(str(files / "init.png"))
    settings = settings_for(CONFIG, sampler_of(CONFIG, name), 1, steps=8, guidance_scale=1.0, height=32, width=48)
    own = read_png(files / "init.png").astype(float)
    errors = []
    for strength in (1 / 8, 1.0):
        chosen = replace(settings, inputs=inputs, strength=strength)
        assert len(chosen.times(pipeline.schedule)) == chosen.runs == round(8 * strength)
        given = pipeline.given(chosen)
        drawn = pipeline.latents(["a cat"], [""], [0], chosen, given)
        errors.append(np.sqrt(((drawn - given.x0) ** 2).mean()))
    assert 1.5 * errors[0] < errors[1]
    masked = replace(settings, inputs=replace(inputs, mask=str(files / "mask.png")))
    drawn = pipeline.draw(["a cat"], [""], [0], masked)[0]
    far = np.ones((32, 48), bool)
    far[6:23, 10:33] = False  # the hole, and a soft edge of a latent's two pixels
    np.testing.assert_array_equal(drawn[far], own[far])
    assert (drawn[9:20, 13:30] != own[9:20, 13:30]).mean() > 0.9


def test_a_picture_does_not_depend_on_its_batch(pipeline, files):
    settings = settings_for(CONFIG, sampler_of(CONFIG, "ddpm"), 1, steps=3, height=32, width=48)
    settings = replace(settings, inputs=Inputs(str(files / "init.png"), str(files / "mask.png")), variation=(7, 0.3))
    both = pipeline.draw(["a cat", "a dog"], ["", ""], [0, 1], settings).astype(int)
    alone = pipeline.draw(["a dog", "a dog"], ["", ""], [1, 1], settings).astype(int)
    assert np.abs(both[1] - alone[0]).max() <= 1


def test_masked_and_larger_pictures_are_drawn_again(files, place, tmp_path, monkeypatch, capsys):  # noqa: F811
    """By --from_image, with the files beside the picture or given; and --resume knows their settings."""
    for name, more in (
        ("masked", beginning(files, "--mask", files / "mask.png", "--n_samples", 2, "--strength", 0.7)),
        (
            "larger",
            [*WORDS, "--hires_scale", 1.5, "--n_samples", 2, "--variation_seed", 5, "--variation_strength", 0.4],
        ),
    ):
        (_, second), facts = draw(monkeypatch, place, tmp_path / name, *more)
        picture = tmp_path / name / "samples/00001.png"
        again = ["--ckpt_path", place / "base.safetensors", "--from_image", picture, "--output_path", tmp_path / "no"]
        if name == "masked":
            assert (facts["init_image"], facts["mask"], facts["strength"]) == ("init.png", "mask.png", 0.7)
            line = refusal(monkeypatch, capsys, text_to_image, again)
            assert "was drawn from init.png" in line and "give the file as --init_image" in line
            again += ["--init_image", files / "init.png", "--mask", files / "mask.png"]
            line = refusal(monkeypatch, capsys, text_to_image, [*again, "--mask", files / "init.png"])
            assert "it was drawn with mask_sha256" in line
        else:
            assert (facts["hires_scale"], facts["hires_strength"], facts["variation_seed"]) == (1.5, 0.5, 5)
            assert second.shape == (48, 48, 3) and "Hires upscale: 1.5, Hires upscaler: Lanczos" in parameters(facts)
        call(monkeypatch, text_to_image, [*again, "--output_path", tmp_path / f"{name} again", "--skip_grid"])
        repeated = tmp_path / f"{name} again/samples/00000.png"
        np.testing.assert_array_equal(read_png(repeated), second)
        assert read_facts(repeated) == read_facts(picture)
    resumed = sampling(place, tmp_path / "larger", *WORDS, "--hires_scale", 1.5, "--n_samples", 2, "--resume")
    assert "was drawn with variation_seed 5, not None" in refusal(monkeypatch, capsys, text_to_image, resumed)
    resumed = sampling(place, tmp_path / "larger", *WORDS, "--n_samples", 2, "--resume")
    assert "was drawn with " in refusal(monkeypatch, capsys, text_to_image, resumed)


def test_a_variation_ends_at_the_other_seed(place, tmp_path, monkeypatch):  # noqa: F811
    words = [*WORDS, "--n_samples", 1, "--ddpm"]
    wanted, _ = draw(monkeypatch, place, tmp_path / "wanted", *words, "--seed", 7)
    end, facts = draw(monkeypatch, place, tmp_path / "end", *words, "--variation_seed", 7, "--variation_strength", 1)
    assert np.abs(wanted[0].astype(int) - end[0]).max() <= 1
    assert (facts["seed"], facts["variation_seed"], facts["variation_strength"]) == (42, 7, 1.0)


def test_lines_begin_with_pictures_of_their_own(files, place, tmp_path, monkeypatch):  # noqa: F811
    lines = f"a red house | init_image={files / 'init.png'} strength=0.7 seed=42\na cat\n"
    (tmp_path / "prompts.txt").write_text(lines)
    words = ["--n_iter", 1, "--n_samples", 1, "--skip_grid", "--batch_size", 1]
    drawn, _ = draw(monkeypatch, place, tmp_path / "lines", *words, "--data_path", tmp_path / "prompts.txt")
    alone, _ = draw(monkeypatch, place, tmp_path / "alone", *beginning(files, "--n_samples", 1, "--strength", 0.7))
    np.testing.assert_array_equal(drawn[0], alone[0])
    assert drawn[0].shape == (32, 48, 3) and drawn[1].shape == (32, 32, 3)


def test_each_file_is_decoded_and_hashed_once_for_all_lines(files, tmp_path, monkeypatch):
    """Before drawing, by every line that names it; a file that has changed is read again."""
    init, mask = (Path(shutil.copy(files / name, tmp_path)) for name in ("init.png", "mask.png"))
    line = f"a red house | init_image={init} mask={mask} strength="
    (tmp_path / "prompts.txt").write_text("\n".join(f"{line}{0.4 + k / 100}" for k in range(20)))
    read = []

    def counted(function):
        return lambda path: read.append((function.__name__, Path(path).name)) or function(path)

    for module, name in ((inputs, "decode"), (inputs, "decode_grey"), (modes, "sha256")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    args = text_to_image.build_parser().parse_args(["--data_path", str(tmp_path / "prompts.txt")])

    def facts():
        ways = ways_to_draw(args, CONFIG, text_to_image.plan(args))
        assert len(ways) == 21
        return [run_facts(args, CONFIG, "base", way) for way in ways.values()]

    first = [facts(), facts()][0]
    both = [("sha256", "init.png"), ("sha256", "mask.png")]
    assert sorted(read) == [("decode", "init.png"), ("decode_grey", "mask.png"), *both]
    assert len({each["strength"] for each in first}) == 20
    Image.fromarray(255 - read_png(init)).save(init)
    assert facts()[0]["init_image_sha256"] != first[0]["init_image_sha256"]
    assert read[4:] == [("decode", "init.png"), ("sha256", "init.png")]


@pytest.fixture
def nowhere(place, tmp_path):  # noqa: F811
    """(options of a drawing, its folder)."""
    return sampling(place, tmp_path / "out", *WORDS), tmp_path / "out"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--strength", 0.5], "--strength goes with --init_image: give both, or neither"),
        (["--mask", "mask.png"], "--mask goes with --init_image"),
        (["--variation_seed", 5], "--variation_seed goes with --variation_strength"),
        (["--hires_strength", 0.5], "--hires_strength goes with --hires_scale"),
        (["--init_image", "none.png"], "cannot read the picture 'none.png'"),
        (["--init_image", "init.png", "--strength", 0], "--strength must be above 0, and at most 1, got 0"),
        (["--init_image", "init.png", "--strength", 1.5], "--strength must be above 0, and at most 1, got 1.5"),
        (["--init_image", "init.png", "--strength", 0.3], "--strength 0.3 of 3 steps is less than one step"),
        (["--init_image", "init.png", "--mask", "depth.png"], "has 32x32 pixels, --init_image 48x32"),
        (
            ["--init_image", "init.png", "--mask", "black.png"],
            "has no white in the drawn part: paint white what",
        ),
        (["--init_image", "init.png", "--W", 50], "50 is not divisible by 4"),
        (["--depth_map", "depth.png"], "--depth_map is for a depth model"),
        (["--variation_seed", 5, "--variation_strength", 2], "--variation_strength must be between 0 and 1"),
        (["--hires_scale", 1], "--hires_scale must be above 1"),
        (["--strength", "nan", "--init_image", "init.png"], "--strength must be above 0, and at most 1, got nan"),
        (["--scale", "nan"], "--scale must be a finite number, got nan"),
        (["--preview_interval", 4], "--preview_interval 4 shows nothing of 3 steps"),
        (["--H", 10**6], "image size 1000000 is too large: at most 16384"),
        (["--init_image", "a\0b"], "cannot read the picture 'a\\x00b': embedded null byte"),
        (["--hires_scale", 2, "--hires_strength", 0.1], "--hires_strength 0.1 of 3 steps is less than one step"),
        (["--init_image", "init.png", "--mask", "mask.png", "--hires_scale", 2], "does not go with a mask"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_drawn(more, said, files, nowhere, monkeypatch, capsys):
    Image.new("L", (48, 32)).save(files / "black.png")
    monkeypatch.setattr(runtime, "start", None)
    more = [files / word if word in ("init.png", "mask.png", "depth.png", "black.png") else word for word in more]
    words, out = nowhere
    line = refusal(monkeypatch, capsys, text_to_image, [*words, *map(str, more)])
    assert said in line and not out.exists()


# ---- networks that are told more ----


@pytest.fixture(scope="module")
def joined(place):  # noqa: F811
    """mask.safetensors and depth.safetensors: the model of `place` with more channels into its UNet."""
    own = checkpoint.load(place / "base.safetensors").tensors
    first = UNET + "input_blocks.0.0.weight"
    for kind, channels in (("mask", 9), ("depth", 5)):
        config = replace(CONFIG, unet=replace(CONFIG.unet, in_channels=channels))
        assert config.joined == kind
        shape = (own[first].shape[0], channels - 4, 3, 3)
        more = generator(0, kind).normal(0, 0.2, shape).astype(np.float32)
        tensors = {**own, first: np.concatenate((own[first], more), 1)}
        checkpoint.save(place / f"{kind}.safetensors", tensors, words_of(config), "safetensors")
        save_model_config(config, place / f"{kind}.yaml")
    return place


def from_joined(place, kind, out, *more):  # noqa: F811
    return ["--ckpt_path", place / f"{kind}.safetensors", "--output_path", out, "--sampling_steps", 3, *WORDS, *more]


def test_an_inpainting_model_sees_mask_and_picture(joined, files, tmp_path, monkeypatch, capsys):
    Image.fromarray(255 - read_png(files / "init.png")).save(tmp_path / "negative.png")
    Image.fromarray(255 - np.asarray(Image.open(files / "mask.png"))).save(tmp_path / "around.png")
    drawn = {}
    for name, init, mask in (
        ("own", files / "init.png", files / "mask.png"),
        ("picture", tmp_path / "negative.png", files / "mask.png"),
        ("mask", files / "init.png", tmp_path / "around.png"),
    ):
        words = from_joined(joined, "mask", tmp_path / name, "--n_samples", 1, "--init_image", init, "--mask", mask)
        call(monkeypatch, text_to_image, words)
        drawn[name] = read_png(tmp_path / name / "samples/00000.png")
    hole, own = np.s_[9:20, 13:30], read_png(files / "init.png")
    assert (drawn["own"][hole] != drawn["picture"][hole]).any()
    np.testing.assert_array_equal(drawn["own"][:4], own[:4])
    assert (drawn["mask"][:4] != own[:4]).mean() > 0.9
    for more in ([], ["--init_image", files / "init.png"]):
        line = refusal(monkeypatch, capsys, text_to_image, from_joined(joined, "mask", tmp_path / "no", *more))
        assert "this model paints a masked part of a picture anew: give --init_image and --mask" in line
    line = refusal(monkeypatch, capsys, train_text_to_image, [
        *training(joined, tmp_path / "no", "--model_config", joined / "mask.yaml"),
        *("--pretrained_model_path", joined / "mask.safetensors"),
    ])  # fmt: skip
    assert "which is not trained here" in line


def test_a_depth_model_draws_by_the_map(joined, files, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.ascontiguousarray(np.asarray(Image.open(files / "depth.png"))[::-1])).save(tmp_path / "down.png")
    drawn = {}
    for name, more in (
        ("up", ["--depth_map", files / "depth.png"]),
        ("down", ["--depth_map", tmp_path / "down.png"]),
        ("from", ["--depth_map", files / "depth.png", "--init_image", files / "init.png", "--strength", 0.5]),
    ):
        call(monkeypatch, text_to_image, from_joined(joined, "depth", tmp_path / name, "--n_samples", 1, *more))
        drawn[name] = read_png(tmp_path / name / "samples/00000.png")
    assert (drawn["up"] != drawn["down"]).mean() > 0.3 and drawn["from"].shape == (32, 48, 3)
    line = refusal(monkeypatch, capsys, text_to_image, from_joined(joined, "depth", tmp_path / "no"))
    assert "this model draws by a depth map: give --depth_map" in line
    line = refusal(monkeypatch, capsys, text_to_image, [
        *from_joined(joined, "depth", tmp_path / "no", "--depth_map", files / "black.png"),
    ])  # fmt: skip
    assert "has one brightness everywhere" in line


def test_models_of_other_inputs_are_told_apart(joined, files, tmp_path, monkeypatch, capsys):
    words = from_joined(joined, "mask", tmp_path, "--config", joined / "model.yaml")
    line = refusal(monkeypatch, capsys, text_to_image, words)
    assert (
        "is a model like Stable Diffusion with 5 channels beside the latents, the config is for Stable Diffusion 1"
        in line
    )
    words = sampling(joined, tmp_path, *WORDS, "--config", joined / "depth.yaml", "--depth_map", files / "depth.png")
    assert "the config is for a depth model" in refusal(monkeypatch, capsys, text_to_image, words)


def test_the_tiny_models_nine_channels_are_its_latents():
    assert load_model_config("configs/tiny-vpred.yaml").joined is None
    assert load_model_config("configs/v2-inpaint-inference.yaml").joined == "mask"
    assert load_model_config("configs/v2-depth-inference.yaml").joined == "depth"
    with pytest.raises(UserError, match="in_channels may have 1 more for a depth map"):
        replace(CONFIG, unet=replace(CONFIG.unet, in_channels=8))
