"""Lines of a prompt file with settings of their own, and prompts of several lengths in one run."""

import numpy as np
import pytest
import text_to_image
from test_scripts import call, place, refusal, sampling  # noqa: F401

from ldm.drawing import batches
from ldm.pictures import read_facts, read_png

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
