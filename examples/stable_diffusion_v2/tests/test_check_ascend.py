"""tools/check_ascend.py: what it says of a machine, of wrong kernels, and of a CPU as its own reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import nn, ops

from ldm import npu
from ldm.config.model import changed
from tools import check_ascend
from tools.ascend_checks import machine, model, operators

ROOT = Path(__file__).parents[1]


@pytest.fixture
def box(monkeypatch, tmp_path) -> Path:
    """A machine with an NPU whose CANN is complete, as far as files go."""
    for name in ("davinci0", "davinci_manager", "devmm_svm", "hisi_hdc"):
        (tmp_path / name).touch()
    cann, driver = tmp_path / "cann", tmp_path / "driver"
    (cann / "compiler").mkdir(parents=True)
    (cann / "compiler/version.info").write_text("Version=8.5.0\n")
    (cann / "opp/built-in/op_impl/ai_core/tbe/kernel").mkdir(parents=True)
    driver.mkdir()
    (driver / "version.info").write_text("Version=25.5.0\n")
    smi = tmp_path / "npu-smi"
    smi.write_text("#!/bin/sh\necho fine\n")
    smi.chmod(0o755)
    monkeypatch.setattr(npu, "DEVICES", str(tmp_path / "davinci[0-9]*"))
    monkeypatch.setattr(
        machine, "NODES", tuple(str(tmp_path / n) for n in ("davinci_manager", "devmm_svm", "hisi_hdc"))
    )
    monkeypatch.setattr(machine, "DRIVER", str(driver))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(cann))
    monkeypatch.setenv("ASCEND_OPP_PATH", str(cann / "opp"))
    monkeypatch.delenv("RANK_TABLE_FILE", raising=False)
    return tmp_path


def said() -> dict[str, machine.Finding]:
    return {finding.what: finding for finding in machine.findings()}


def test_a_complete_machine_is_ok(box):
    found = said()
    assert [what for what, finding in found.items() if not finding.ok] == ["package te", "package hccl"]
    assert "8.5" in found["CANN"].said and found["driver"].said == "25.5.0" and found["devices"].said == "1 under /dev"


@pytest.mark.parametrize(
    ("what", "damage", "mend"),
    [
        ("devices", lambda box, patch: (box / "hisi_hdc").unlink(), "--device="),
        ("driver", lambda box, patch: (box / "npu-smi").write_text("#!/bin/sh\necho no card >&2; exit 1\n"), "docker"),
        ("CANN", lambda box, patch: patch.delenv("ASCEND_HOME_PATH"), "source "),
        ("CANN", lambda box, patch: (box / "cann/compiler/version.info").unlink(), "toolkit"),
        ("kernels package", lambda box, patch: patch.setenv("ASCEND_OPP_PATH", "/none"), "ops"),
        ("rank table", lambda box, patch: patch.setenv("RANK_TABLE_FILE", "x.json"), "unset RANK_TABLE_FILE"),
    ],
)
def test_each_fault_is_named_with_its_remedy(box, monkeypatch, what, damage, mend):
    damage(box, monkeypatch)
    found = said()[what]
    assert found.ok is False and mend in found.mend and str(found).startswith(f"FAIL  {what}: ")


def test_an_exception_is_a_finding():
    found = machine.guarded("chip", lambda: 1 / 0)
    assert found.ok is False and found.said.startswith("ZeroDivisionError")


class Stopped(nn.Cell):
    """The right output of an operator, and no gradient."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def construct(self, x):
        return ops.stop_gradient(self.operator(x))


def test_operators_of_this_device_pass_and_wrong_ones_fail():
    cases = {case.name: case for case in operators.cases((40,), (77,))}
    names = "GroupNorm, SiLU", "GEGLU", "Conv2d 3x3, stride 2, padding (0, 1, 0, 1)", "attention, width 40, 77 keys"
    for name in names:
        found = operators.check(cases[name], "float32")
        assert found.ok, found
    case = cases["SiLU"]
    assert not operators.check(case._replace(define=lambda x: 1.001 * case.define(x)), "float32").ok
    assert not operators.check(case._replace(define=lambda x: x * np.nan), "float32").ok
    with np.errstate(all="ignore"):
        found = operators.check(case._replace(build=lambda: Stopped(case.build())), "float32")
    assert found.ok is False and str(found).endswith("this kernel is wrong here")
    assert operators.adamw().ok and operators.overflow().ok
    saturated = operators.overflow(ops.Minimum())
    assert not saturated.ok and saturated.said == "60000 x 2 is 2"


def test_the_losses_are_those_that_are_stored(monkeypatch):
    found = model.check_losses("float32")
    assert found.ok and len(model.reference()["losses"]) == 5 and len(model.reference()["picture"]) == 3 * 8 * 8
    monkeypatch.setattr(model, "losses", lambda dtype: [1.02 * loss for loss in model.reference()["losses"]])
    assert not model.check_losses("float32").ok


@pytest.mark.parametrize("part", model.SPEEDS)
def test_speed_is_measured(monkeypatch, part):
    shallow = ["model.unet.channel_mult=[1]", "model.unet.attention_resolutions=[1]", "model.unet.num_res_blocks=1"]
    monkeypatch.setattr(model, "changed", lambda config, changes: changed(config, [*changes, *shallow]))
    said = model.SPEEDS[part](64, 8, "float32", 1)
    assert re.fullmatch(r"first call [\d.]+ s, then [\d.]+ ms, peak \d\.\d GiB", said), said


def test_a_part_that_fails_is_a_finding_and_a_wrong_width_one_line():
    found = check_ascend.speed("drawing", ["--part", "drawing", "--width", "32"])
    assert found.ok is False and "expected a multiple of 64" in found.said


def test_two_ranks_have_the_same_sum():
    found = check_ascend.sums(SimpleNamespace(device_target="CPU", ranks=2))
    assert found.ok and re.match(r"sum of 2 ranks is right, [\d.]+ GB/s", found.said), found


def test_without_an_npu_it_says_so_and_ends_with_a_block_to_paste(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("ASCEND")}
    words = [sys.executable, ROOT / "tools/check_ascend.py"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stderr
    lines, _, block = done.stdout.partition("---- to be pasted into a report ----")
    assert "FAIL  devices: missing" in lines and "FAIL  MindSpore takes the device: lib" in lines
    assert "Python 3." in block and "ok    MindSpore: " in block
