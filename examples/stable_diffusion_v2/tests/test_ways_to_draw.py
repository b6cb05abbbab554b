"""Lines of a prompt file with settings of their own, prompts of several lengths, and pictures drawn again."""

import json

import numpy as np
import pytest
import text_to_image
from test_scripts import call, place, refusal, sampling  # noqa: F401

from ldm import checkpoint
from ldm.a1111 import parameters
from ldm.drawing import batches
from ldm.errors import UserError
from ldm.pictures import ENTRY, read_facts, read_png, save_png
from ldm.repeat import LARGEST_BATCH, take_facts

LINES = "a cat\na dog | seed=7 steps=2 n=2\na cow | W=64 scale=1\n"


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(LINES)
    return tmp_path / "prompts.txt"


def test_plan(prompts):
    words = ["--data_path", str(prompts), "--n_iter", "1", "--n_samples", "3"]
    pictures = text_to_image.plan(text_to_image.build_parser().parse_args(words))
    assert [picture.number for picture in pictures] == list(range(8))
    assert [picture.prompt for picture in pictures] == ["a cat"] * 3 + ["a dog"] * 2 + ["a cow"] * 3
    assert pictures[4].own == (("seed", 7), ("steps", 2)) and pictures[4].index == 1
    rows = list(batches(pictures, 2, lambda picture: picture.own))
    assert [[picture.number for picture in row] for row, _ in rows] == [[0, 1], [2], [3, 4], [5, 6], [7]]
    assert all(len(filled) == 2 and len({each.own for each in filled}) == 1 for _, filled in rows)


def test_lines_are_drawn_as_alone(place, tmp_path, prompts, monkeypatch):  # noqa: F811
    """A line with a seed of its own is the run of its prompt with that seed; all in batches of two."""
    words = ["--n_iter", 1, "--n_samples", 2, "--batch_size", 2, "--euler", "--skip_grid"]
    call(monkeypatch, text_to_image, sampling(place, tmp_path / "lines", *words, "--data_path", prompts))
    alone = [*words, "--prompt", "a dog", "--seed", 7, "--sampling_steps", 2]
    call(monkeypatch, text_to_image, sampling(place, tmp_path / "alone", *alone))
    for number in (0, 1):
        mine, other = (tmp_path / run / f"samples/{k:05}.png" for run, k in (("lines", 2 + number), ("alone", number)))
        np.testing.assert_array_equal(read_png(mine), read_png(other))
        assert read_facts(mine) == read_facts(other)
    assert read_png(tmp_path / "lines/samples/00004.png").shape == (32, 64, 3)
    facts = read_facts(tmp_path / "lines/samples/00004.png")
    assert (facts["W"], facts["scale"], facts["seed"], facts["number"]) == (64, 1.0, 42, 4)


def test_wrong_sizes_of_a_line_are_told_before_anything_is_drawn(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a cat\na dog | W=30\n")
    words = sampling(place, tmp_path / "out", "--data_path", tmp_path / "prompts.txt")
    assert "30 is not divisible by 4" in refusal(monkeypatch, capsys, text_to_image, words)
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_changes_no_other_picture(place, tmp_path, monkeypatch, caplog):  # noqa: F811
    long = "a dog, " + "and a cat, " * 40
    words = ["--n_iter", 1, "--n_samples", 1, "--batch_size", 1, "--euler", "--skip_grid", "--support_long_prompts"]
    for name, lines, whole in (("cut", [long, "a cat"], "False"), ("whole", [long, "a cat"], "True")):
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        more = [*words, whole, "--data_path", tmp_path / "prompts.txt"]
        caplog.clear()
        call(monkeypatch, text_to_image, sampling(place, tmp_path / name, *more))
        assert ("are not seen without --support_long_prompts" in caplog.text) == (whole == "False")
    drawn = {name: [read_png(tmp_path / name / f"samples/{k:05}.png") for k in (0, 1)] for name in ("cut", "whole")}
    np.testing.assert_array_equal(drawn["cut"][1], drawn["whole"][1])
    assert (drawn["cut"][0] != drawn["whole"][0]).any()


@pytest.fixture(scope="module")
def drawn(place, tmp_path_factory):  # noqa: F811
    """The second picture of a run, of a prompt with weights."""
    output = tmp_path_factory.mktemp("drawn")
    words = ["--prompt", "a (cat:1.3)", "--n_iter", 1, "--n_samples", 2, "--heun", "--skip_grid", "--seed", 5]
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, text_to_image, sampling(place, output, *words, "--guidance_interval", 0.3, "inf"))
    return output / "samples/00001.png"


def again(place, out, picture, *more):  # noqa: F811
    words = ["--ckpt_path", place / "base.safetensors", "--from_image", picture, "--output_path", out, "--skip_grid"]
    return list(map(str, [*words, *more]))


def test_a_picture_is_drawn_again_from_what_its_file_says(drawn, place, tmp_path, monkeypatch, capsys):  # noqa: F811
    call(monkeypatch, text_to_image, again(place, tmp_path / "again", drawn))
    repeated = tmp_path / "again/samples/00000.png"
    np.testing.assert_array_equal(read_png(repeated), read_png(drawn))
    assert read_facts(repeated) == read_facts(drawn)
    other = checkpoint.load(place / "base.safetensors")
    checkpoint.save(tmp_path / "base.safetensors", other.tensors, {**other.meta, "x": "1"}, "safetensors")
    for more, said in (
        (["--ckpt_path", tmp_path / "base.safetensors"], "checkpoint_sha256"),
        (["--data_path", "x.txt"], "--from_image and --data_path exclude each other"),
        (["--from_image", place / "no.png"], "no.png does not exist"),
    ):
        assert said in refusal(monkeypatch, capsys, text_to_image, again(place, tmp_path / "no", drawn, *more))
        assert not (tmp_path / "no").exists()
    save_png(read_png(drawn), tmp_path / "plain.png")
    line = refusal(monkeypatch, capsys, text_to_image, again(place, tmp_path / "no", tmp_path / "plain.png"))
    assert "does not say how it was made" in line


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        *[("number", -1), ("number", 1.0), ("batch_size", 0), ("seed", "x"), ("seed", [1]), ("sampler", "sgd")],
        *[("prompt", None), ("prompt_weights", 1), ("H", 2.5), ("scale", {}), ("dtype", "int8")],
        *[("guidance_interval", [1]), ("guidance_interval", "ab"), ("hires_scale", "x"), ("sizes", 5)],
        *[("refiner", [1]), ("init_image", 3), ("long_prompts", None)],
    ],
)
def test_a_picture_whose_text_was_changed(fact, value, place, tmp_path):  # noqa: F811
    facts = {"prompt": "a cat", "number": 0, "seed": 1, "sampler": "ddim", "checkpoint": "base.safetensors"}
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "x.png", {ENTRY: json.dumps({**facts, fact: value})})
    parser = text_to_image.build_parser()
    args = parser.parse_args(["--from_image", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match=r"x\.png: it says \w+ .*, so its text was changed"):
        take_facts(args, parser)


def test_a_picture_asks_for_a_batch_of_some_size_at_most(tmp_path):
    facts = {"prompt": "a \ud800", "number": 0, "seed": 1, "sampler": "ddim", "checkpoint": "../x", "batch_size": 10**9}
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "x.png", {ENTRY: json.dumps(facts)})
    parser = text_to_image.build_parser()
    args = parser.parse_args(["--from_image", str(tmp_path / "x.png")])
    take_facts(args, parser)
    assert args.batch_size == LARGEST_BATCH and not args.ckpt_path
    with pytest.raises(UserError, match="is not UTF-8"):
        text_to_image.plan(args)


@pytest.mark.parametrize("tail", ["n=99999999999", "n=600000"])
def test_more_pictures_than_a_list_can_hold(tail, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"a cat | {tail}\n" * 2)
    args = text_to_image.build_parser().parse_args(["--data_path", str(tmp_path / "prompts.txt")])
    with pytest.raises(UserError, match="more than 1,000,000 pictures are asked for"):
        text_to_image.plan(args)


def test_near_settings_are_told(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a cat |seed=3\na dog | seed=3\n")
    text_to_image.plan(text_to_image.build_parser().parse_args(["--data_path", str(tmp_path / "prompts.txt")]))
    assert caplog.messages == [
        "1 prompts such as a cat |seed=3 are read as words alone: settings stand behind ' | ', as in a fox | seed=3 "
        "steps=30"
    ]


def test_what_the_options_change_of_a_picture(drawn, place):  # noqa: F811
    parser = text_to_image.build_parser()
    args = parser.parse_args(again(place, "out", drawn, "--sampling_steps", 9, "--euler", "--prompt", "a (dog)"))
    take_facts(args, parser)
    assert (args.sampling_steps, args.sampler, args.spacing, args.seed) == (9, None, None, 5)
    assert (args.prompt, args.prompt_weights, args.guidance_interval) == ("a (dog)", True, [0.3, float("inf")])
    (picture,) = text_to_image.plan(args)
    assert (picture.number, picture.index) == (0, 1) and args.batch_size == 2


def test_the_words_of_a1111(drawn):
    facts = {**read_facts(drawn), "negative_prompt": "dark, [blue]", "spacing": "karras"}
    lines = parameters(facts).split("\n")
    assert lines[:2] == ["a (cat:1.3)", "Negative prompt: dark, [blue]"]
    settings = "Steps: 3, Sampler: Heun, Schedule type: Karras, CFG scale: 9, Seed: 5, Size: 32x32, Model hash: "
    assert lines[2].startswith(settings) and lines[2].endswith(", Model: base")
    assert parameters({**facts, "prompt_weights": False}).startswith(r"a \(cat:1.3\)")
