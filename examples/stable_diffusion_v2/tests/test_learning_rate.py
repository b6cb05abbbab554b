"""Learning-rate schedules at their borders and between."""

import math

import pytest

from ldm.config.yaml_file import save_yaml
from ldm.errors import UserError
from ldm.train.learning_rate import MULTI_STEP, SCHEDULES, LearningRate, tell_changes

DECAYING = [name for name in SCHEDULES if name not in ("constant", MULTI_STEP)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_in_equal_parts_to_the_start(name):
    rate = LearningRate(name, 1e-4, 1e-6, warmup_steps=4, decay_steps=0, total_steps=20, milestones=(9,))
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


def test_the_rate_falls_at_each_milestone_counted_after_the_warm_up():
    rate = LearningRate(MULTI_STEP, 1.0, 0.0, warmup_steps=2, decay_steps=0, total_steps=9, milestones=(3, 5))
    assert [rate(step) for step in range(9)] == pytest.approx([0.5, 1, 1, 1, 1, 0.9, 0.9, 0.81, 0.81])
    halves = LearningRate(MULTI_STEP, 1.0, 0.0, 0, 0, 4, milestones=(1, 2, 3), decay_rate=0.5)
    assert [halves(step) for step in range(4)] == [1, 0.5, 0.25, 0.125]


def test_a_warm_up_below_1_is_a_share_of_the_run():
    assert LearningRate("cosine", 1e-4, 0.0, 0.1, 0, 50) == LearningRate("cosine", 1e-4, 0.0, 5, 0, 50)
    assert LearningRate("cosine", 1e-4, 0.0, 0.01, 0, 6).warmup_steps == 1
    assert LearningRate("cosine", 1e-4, 0.0, 1, 0, 50).warmup_steps == 1


def test_a_run_that_is_shorter_than_its_warm_up_is_told(caplog):
    LearningRate("cosine_decay", 1e-5, 1e-7, warmup_steps=1000, decay_steps=0, total_steps=6).warn()
    assert ["reaches 6e-08" in text and "never its 1e-05" in text for text in caplog.messages] == [True]
    assert "1000" in caplog.text and "--warmup_steps 0.1" in caplog.text
    caplog.clear()
    LearningRate("constant", 0.0, 0.0, 0, 0, 6).warn()
    assert ["raise start_learning_rate" in text for text in caplog.messages] == [True]
    caplog.clear()
    for warmup in (0, 6, 0.9):
        LearningRate("cosine_decay", 1e-5, 1e-7, warmup, 0, 6).warn()
    LearningRate("cosine_decay", 0.0, 1e-7, 0, 0, 6).warn()  # it rises
    assert not caplog.messages


def test_a_resumed_run_with_another_plan_is_told(tmp_path, caplog):
    options = {"scheduler": "cosine", "start_learning_rate": 1e-5, "epochs": 3, "milestones": [], "seed": 1}
    path = tmp_path / "args.yaml"
    save_yaml(options, path)
    tell_changes({**options, "seed": 2, "decay_rate": 0.5}, path)  # an option that did not exist then
    tell_changes(options, tmp_path / "none.yaml")
    assert not caplog.messages
    tell_changes({**options, "epochs": 5, "start_learning_rate": 1e-4}, path)
    assert len(caplog.messages) == 1
    for words in ("start_learning_rate was 1e-05 and is now 0.0001", "epochs was 3 and is now 5"):
        assert words in caplog.text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "cosin"}, ["cosin", *SCHEDULES]),
        ({"start": -1e-5}, ["-1e-05"]),
        ({"end": float("nan")}, ["nan"]),
        ({"warmup_steps": -1}, ["warmup_steps"]),
        ({"decay_steps": -1}, ["decay_steps"]),
        ({"name": MULTI_STEP}, ["--milestones", "[]"]),
        ({"name": MULTI_STEP, "milestones": (4, 2)}, ["--milestones", "[4, 2]"]),
        ({"name": MULTI_STEP, "milestones": (2,), "decay_rate": 0.0}, ["decay_rate"]),
    ],
)
def test_mistakes_are_named(change, words):
    good = {"name": "constant", "start": 1e-5, "end": 0.0, "warmup_steps": 0, "decay_steps": 0, "total_steps": 9}
    with pytest.raises(UserError) as error:
        LearningRate(**{**good, **change})
    assert all(word in str(error.value) for word in words)
