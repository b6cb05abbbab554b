"""Prompt files: where their lines end, and which negative prompt goes with which prompt."""

import pytest

from ldm.data.prompts import has_near_settings, own_settings, paired, read_lines
from ldm.errors import UserError


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_ends_alone(tmp_path, end):
    prompts = ["a fox\u2028in snow", "", "a\x0cb\x0bc\x1cd\x85e", "last"]
    for last in ("", end):
        (tmp_path / "prompts.txt").write_bytes((end.join(prompts) + last).encode("utf-8-sig"))
        assert read_lines(tmp_path / "prompts.txt") == prompts


def test_blank_lines_at_the_end_count_as_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text(" a \n\n\n")
    assert read_lines(tmp_path / "prompts.txt") == ["a", "", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: write one prompt per line"),
        (b" \n\n", "is empty"),
        ("a\nb".encode("utf-16"), "is UTF-16, not UTF-8 text: save it as UTF-8"),
        ("a\nb".encode("utf-16-be"), "holds a NUL in line 1"),
        (
            "one\ncaf\xe9".encode("cp1252"),
            "line 2 holds the byte 0xe9, as files of Windows do .cp1252.; save it as UTF-8",
        ),
    ],
)
def test_files_that_are_no_prompts(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"the prompt file .*prompts.txt .*{message}"):
        read_lines(tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("lines", "negatives", "pairs"),
    [
        (["a", "b", "c"], ["x", "", ""], [("a", "x"), ("b", ""), ("c", "")]),
        (["a", "", "b"], ["x", "", "y"], [("a", "x"), ("b", "y")]),
        (["a", "b", ""], ["", "x", ""], [("a", ""), ("b", "x")]),
        ([""], ["x"], [("", "x")]),
    ],
)
def test_a_line_of_the_negatives_belongs_to_the_same_line_of_the_prompts(lines, negatives, pairs):
    assert paired(lines, negatives) == pairs


@pytest.mark.parametrize(
    ("lines", "negatives"),
    [
        (["a", "b", "c"], ["x", "y"]),
        (["a", "", "b"], ["x", "y"]),
        (["a", "b"], ["x"]),
        ([""], ["x", "y"]),
        (["a"], ["x", ""]),
    ],
)
def test_unequal_numbers_of_lines_are_an_error_with_both_numbers(lines, negatives):
    said = f"{len(negatives)} lines of negative prompts for {len(lines)} lines of prompts, .*--negative_prompt"
    with pytest.raises(UserError, match=said):
        paired(lines, negatives)


@pytest.mark.parametrize(("lines", "number"), [(["a", "", "b"], 2), (["", "a", "b"], 1)])
def test_a_negative_prompt_beside_no_prompt_is_an_error(lines, number):
    with pytest.raises(UserError, match=f"line {number} has a negative prompt but no prompt"):
        paired(lines, ["x", "y", ""])


@pytest.mark.parametrize(
    ("line", "prompt", "own"),
    [
        ("a fox", "a fox", ()),
        ("a fox | seed=3", "a fox", (("seed", 3),)),
        (
            "a | b |  steps=30 scale=2.5 W=64 H=128 n=2 ",
            "a | b",
            (("H", 128), ("W", 64), ("n", 2), ("scale", 2.5), ("steps", 30)),
        ),
        ("a fox | red=1 blue", "a fox | red=1 blue", ()),
        ("| seed=3", "", (("seed", 3),)),
        ("seed=3", "seed=3", ()),
        ("a fox| seed=3", "a fox| seed=3", ()),
    ],
)
def test_settings_of_a_line(line, prompt, own):
    assert own_settings(line) == (prompt, own)


@pytest.mark.parametrize(
    ("tail", "word"),
    [
        ("seed=3 sede=4", "sede=4"),
        ("seed=", "seed="),
        ("seed=-1", "seed=-1"),
        ("steps=3.5", "steps=3.5"),
        ("scale=nan", "scale=nan"),
        ("seed=3 fast", "fast"),
        ("seed=3 seed=4", "seed=4"),
        ("W=0", "W=0"),
    ],
)
def test_settings_of_a_line_that_mean_nothing(tail, word):
    with pytest.raises(
        UserError, match=f"says {word} behind.*seed=, scale=, steps=, W=, H=, n=, .*hires_strength=, each once"
    ):
        own_settings(f"a fox | {tail}")


@pytest.mark.parametrize(
    "line", ["a fox |seed=3", "a fox| steps = 9", "a fox seed=3", "a fox | sed=3", "a fox | SEED=3"]
)
def test_words_that_were_perhaps_meant_for_settings(line):
    assert own_settings(line) == (line, ()) and has_near_settings(line)


@pytest.mark.parametrize("line", ["a fox", "a | b", "E=mc2 on a blackboard", "Steps: 20, Seed: 3", "n=2"])
def test_words_that_were_not(line):
    assert not has_near_settings(line)
