"""Learning-rate schedules at their borders and between."""

import math

import pytest

from ldm.errors import UserError
from ldm.train.learning_rate import SCHEDULES, LearningRate

DECAYING = [name for name in SCHEDULES if name != "constant"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_in_equal_parts_to_the_start(name):
    rate = LearningRate(name, 1e-4, 1e-6, warmup_steps=4, decay_steps=0, total_steps=20)
    assert [rate(step) for step in range(4)] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4], rel=1e-12)
    assert rate(3) == rate(4) == 1e-4


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("warmup, decay, total", [(0, 0, 11), (5, 0, 30), (5, 7, 30), (0, 2, 9)])
def test_first_and_last_step_of_the_decay_have_exactly_start_and_end(name, warmup, decay, total):
    rate = LearningRate(name, 3e-4, 7e-6, warmup, decay, total)
    last = warmup + (decay or total - warmup) - 1
    assert rate(warmup) == 3e-4
    assert rate(last) == pytest.approx(7e-6, rel=1e-12)
    assert all(rate(step) == rate(last) for step in range(last, total + 5))
    falling = [rate(step) for step in range(warmup, last + 1)]
    assert all(a > b for a, b in zip(falling, falling[1:]))


def test_shapes_halfway():
    def middle(name):
        return LearningRate(name, 1.0, 0.0, warmup_steps=0, decay_steps=5, total_steps=5)

    assert middle("linear_decay")(2) == 0.5
    assert middle("linear_decay")(1) == 0.75
    assert middle("cosine_decay")(2) == pytest.approx(0.5)
    assert middle("cosine_decay")(1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert middle("polynomial_decay")(2) == pytest.approx(0.5**0.9)
    assert middle("constant")(4) == 1.0


def test_a_rate_may_rise():
    rate = LearningRate("linear_decay", 1e-6, 1e-4, warmup_steps=0, decay_steps=0, total_steps=3)
    assert [rate(step) for step in range(3)] == pytest.approx([1e-6, 5.05e-5, 1e-4])


def test_runs_shorter_than_their_schedule():
    assert LearningRate("cosine_decay", 1e-4, 0, warmup_steps=1000, decay_steps=0, total_steps=10)(9) == 1e-6
    assert LearningRate("cosine_decay", 1e-4, 1e-6, warmup_steps=0, decay_steps=0, total_steps=1)(0) == 1e-4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "cosin"}, ["cosin", *SCHEDULES]),
        ({"start": -1e-5}, ["-1e-05"]),
        ({"end": float("nan")}, ["nan"]),
        ({"warmup_steps": -1}, ["warmup_steps"]),
        ({"decay_steps": -1}, ["decay_steps"]),
    ],
)
def test_mistakes_are_named(change, words):
    good = {"name": "constant", "start": 1e-5, "end": 0.0, "warmup_steps": 0, "decay_steps": 0, "total_steps": 9}
    with pytest.raises(UserError) as error:
        LearningRate(**{**good, **change})
    assert all(word in str(error.value) for word in words)
