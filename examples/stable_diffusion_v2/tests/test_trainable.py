"""The choice of what is trained."""

import pytest

from ldm.errors import UserError
from ldm.train.trainable import trainable

NAMES = ["input_blocks.0.0.weight", "input_blocks.1.1.to_out.0.bias", "middle_block.1.norm.weight", "out.2.weight"]


def test_patterns_choose_by_name():
    assert trainable(NAMES, []) == NAMES
    assert trainable(NAMES, ["out"]) == [NAMES[1], NAMES[3]]
    assert trainable(NAMES, [r"^out\."]) == [NAMES[3]]
    assert trainable(iter(NAMES), [r"^out\.", r"^input_blocks\.[01]\.0\."]) == [NAMES[0], NAMES[3]]


@pytest.mark.parametrize(
    "patterns, words",
    [
        (["out", "attn3"], ["'attn3'", "none of the 4 names", "middle_block.1.norm.weight"]),
        (["out", "attn["], ["'attn['", "not a regular expression"]),
    ],
)
def test_patterns_that_choose_nothing_are_refused(patterns, words):
    with pytest.raises(UserError) as refused:
        trainable(NAMES, patterns)
    assert all(word in str(refused.value) for word in ["trainable_modules", *words])
