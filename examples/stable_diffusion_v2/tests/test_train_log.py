"""The table of a run and its picture."""

import time

import numpy as np
import pytest
from full_disk import files_of_at_most
from PIL import Image

from ldm.errors import UserError
from ldm.train.log import ResultLog, loss_curve, read_log

COLUMNS = ("step", "loss", "learning_rate")


def fill(path, steps, last_step=0, columns=COLUMNS):
    log = ResultLog(path, columns, last_step)
    for step in steps:
        log.write(step=step, loss=1 / step, learning_rate=1e-5 * step)
    return log


def test_every_line_is_there_at_once(tmp_path):
    path = tmp_path / "result.log"
    fill(path, [1, 2, 3])  # neither closed nor flushed by us
    log = read_log(path)
    assert list(log) == list(COLUMNS)
    assert log["step"].tolist() == [1, 2, 3]
    assert log["loss"] == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-6)
    assert path.read_text().split("\n")[1] == "1\t1\t1e-05"


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    log = ResultLog(tmp_path / "log", ("step", "loss"))
    log.write(step=1, loss=1)
    with files_of_at_most((tmp_path / "log").stat().st_size):
        for step in (2, 3):
            log.write(step=step, loss=1)
    assert len(caplog.messages) == 1 and "make room" in caplog.text
    log.write(step=4, loss=1)
    assert read_log(tmp_path / "log")["step"][[0, -1]].tolist() == [1, 4]


def test_resuming_cuts_off_what_will_be_done_again(tmp_path):
    path = tmp_path / "result.log"
    fill(path, range(1, 9))
    with open(path, "a") as file:
        file.write("9\t0.1")  # killed in the middle of a line
    fill(path, range(6, 8), last_step=5)
    assert read_log(path)["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_half_a_line_that_looks_whole_is_not_read(tmp_path):
    path = tmp_path / "result.log"
    path.write_text("step\tloss\n1\t0.5\n2\t0.25")  # of 0.2512
    assert read_log(path)["step"].tolist() == [1]


def test_a_new_run_begins_a_new_table(tmp_path):
    path = tmp_path / "result.log"
    fill(path, [1, 2, 3])
    fill(path, [1])
    assert read_log(path)["step"].tolist() == [1]


def test_resuming_with_another_column(tmp_path):
    path = tmp_path / "result.log"
    fill(path, [1, 2])
    ResultLog(path, ("step", "grad_norm", "loss"), 2).write(step=3, grad_norm=7.0, loss=0.1)
    log = read_log(path)
    assert log["loss"].tolist() == [1, 0.5, 0.1]
    assert np.isnan(log["grad_norm"][:2]).all() and log["grad_norm"][2] == 7


def test_a_value_without_a_column_is_a_mistake(tmp_path):
    log = fill(tmp_path / "result.log", [])
    with pytest.raises(KeyError):
        log.write(step=1, loss=1.0)
    with pytest.raises(AssertionError):
        log.write(step=1, loss=1.0, learning_rate=1.0, extra=1.0)


def test_something_else_in_its_place_is_named(tmp_path):
    path = tmp_path / "result.log"
    path.write_text("step\tloss\nnot\ta table\n")
    with pytest.raises(UserError, match=r"result\.log"):
        ResultLog(path, COLUMNS, last_step=5)


def near(picture, color):
    """How many pixels have about this colour."""
    return (np.abs(picture.astype(int) - color).max(-1) < 80).sum()


@pytest.mark.parametrize("n", [1, 2, 3, 400])
def test_curve_is_drawn_for_any_length(tmp_path, n):
    rng = np.random.default_rng(0)
    step = np.arange(1.0, n + 1)
    loss_curve(
        tmp_path / "curve.png", {"step": step, "loss": 1 / step + rng.random(n) / 9, "learning_rate": step * 1e-5}
    )
    picture = np.array(Image.open(tmp_path / "curve.png"))
    assert picture.shape == (640, 1200, 3)
    for color in ((31, 99, 181), (224, 138, 46)):
        inside = near(picture[80:570, 90:1110], color)
        assert inside > (20 if n == 1 else 800), color


def test_curve_falls_from_left_to_right(tmp_path):
    step = np.arange(1.0, 101)
    loss_curve(tmp_path / "curve.png", {"step": step, "loss": 1 - step / 200, "learning_rate": np.full(100, 1e-4)})
    picture = np.array(Image.open(tmp_path / "curve.png"))[80:570, 100:1100].astype(int)
    rows, columns = np.nonzero(np.abs(picture - (31, 99, 181)).max(-1) < 40)
    heights = [rows[(columns >= start) & (columns < start + 50)].mean() for start in range(0, 1000, 50)]
    assert all(a < b for a, b in zip(heights, heights[1:]))


def test_a_long_run_is_drawn_as_fast_as_a_short_one(tmp_path):
    """And the table is there without reading the file again."""
    n = 300_000
    step = np.arange(1.0, n + 1)
    table = {"step": step, "loss": 1 - step / n, "learning_rate": np.full(n, 1e-4)}
    table["loss"][n // 2] = 0.95  # a single step
    began = time.process_time()
    loss_curve(tmp_path / "curve.png", table)
    assert time.process_time() - began < 5  # 28 s where every step took part in every mean
    picture = np.array(Image.open(tmp_path / "curve.png"))[80:570, 100:1100].astype(int)
    rows, columns = np.nonzero(np.abs(picture - (31, 99, 181)).max(-1) < 40)
    heights = [rows[(columns >= start) & (columns < start + 50)].mean() for start in range(0, 1000, 50)]
    assert all(a < b for a, b in zip(heights, heights[1:]))
    assert near(picture[:120, 490:510], (188, 214, 242)) > 10  # it can be seen


def test_the_table_is_that_of_the_file(tmp_path):
    path = tmp_path / "result.log"
    fill(path, [1, 2, 3])
    log = fill(path, [3, 4], last_step=2)
    read = read_log(path)
    assert log.table().keys() == read.keys()
    assert all(log.table()[name] == pytest.approx(read[name], rel=1e-6) for name in read)


def test_values_that_cannot_be_drawn(tmp_path):
    nothing = {column: np.array([np.nan, np.inf]) for column in COLUMNS}
    loss_curve(tmp_path / "none.png", nothing)
    assert not (tmp_path / "none.png").exists()
    flat = {"step": np.arange(5.0), "loss": np.array([0, 0, np.nan, 0, 0]), "learning_rate": np.zeros(5)}
    loss_curve(tmp_path / "flat.png", flat)
    assert (tmp_path / "flat.png").exists()
