"""Drawing and training as on Ascend: MindSpore's own plugin on stand-ins for CANN's libraries (tools/ascend_dryrun).

A dry run shows which kernels are launched, with which types and shapes. It shows no number and no time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import mindspore
import pytest

from ldm.files import private_folder
from ldm.kernels.ascend import WIDEST
from tools.ascend_dryrun.summary import parse

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools/ascend_dryrun"
PLUGIN = Path(mindspore.__file__).parent / "lib/plugin"
DAY = 24 * 3600
MISSING = [tool for tool in ("g++", "nm", "readelf", "c++filt") if shutil.which(tool) is None]
ADAM = "AdamApplyOneWithDecayAssign"
OLDER = {"Conv2D", "Split", "AddN", "GatherV2", "ReduceMean", "RealDiv", "Pack", "Unpack", ADAM}
OLDER |= {"ArgMaxV2", "GatherNd", "StridedSlice"}  # of SDXL's pooled text
PRODUCTS = {"aclnnMm", "aclnnAddmm", "aclnnConvolution", "aclnnConvolutionBackward", "aclnnFlashAttentionScore"}

pytestmark = [
    pytest.mark.ascend,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the stand-ins are for x86-64"),
    pytest.mark.skipif(not [*PLUGIN.glob("libmindspore_ascend.so*")], reason="this MindSpore has no Ascend plugin"),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)} (packages g++ and binutils)"),
]


class Call(NamedTuple):
    interface: str
    kernel: str
    tensors: list[tuple[str, tuple[int, ...]]]
    line: str


@pytest.fixture(scope="session")
def stubs() -> Path:
    """The stand-ins for this MindSpore's libraries. They are built once per machine; those of another day go."""
    sources = b"".join((TOOL / name).read_bytes() for name in ("build.sh", "cann_stub.cc", "generate.py"))
    key = hashlib.sha256(sources + f"{PLUGIN} {mindspore.__version__}".encode()).hexdigest()[:16]
    home = private_folder("ldm-ascend-dryrun")
    folder = home / key
    for old in home.iterdir():
        if old != folder and time.time() - old.stat().st_mtime > DAY:
            shutil.rmtree(old, ignore_errors=True)
    if not folder.exists():
        made = tempfile.mkdtemp(dir=home)
        subprocess.run([TOOL / "build.sh", made, sys.executable], check=True, capture_output=True, timeout=500)
        with contextlib.suppress(OSError):  # another process has built them meanwhile
            os.rename(made, folder)
        shutil.rmtree(made, ignore_errors=True)
    os.utime(folder)
    return folder


def dry(stubs: Path, folder: Path, *command, chip: str = "Ascend910B2") -> tuple[dict[str, list[Call]], str]:
    """Run a command; returns (the launches of each part of its log, what it printed)."""
    log, path = folder / "log", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "STUB_SOC": chip, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LD_PRELOAD": ""}
    words = [TOOL / "run.sh", stubs, log, sys.executable, *map(str, command)]
    done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    parts, title = {}, "before"
    for line in log.read_text().splitlines():
        if line.startswith("==="):
            title = line.strip("= ")
        elif line.startswith(("aclnn", "aclop")):
            parts.setdefault(title, []).append(Call(*parse(line), line))
    return parts, done.stdout


def parts(stubs: Path, folder: Path, *names: str, **settings) -> tuple[dict[str, list[Call]], str]:
    found, printed = dry(stubs, folder, ROOT / "tests/ascend_parts.py", *names, **settings)
    for title, calls in found.items():
        check(title, calls)
    return found, printed


def check(title: str, calls: list[Call]) -> None:
    """What holds for every part."""
    types = {dtype for call in calls for dtype, _ in call.tensors}
    assert "f64" not in types, title
    assert {call.kernel for call in calls if call.interface == "aclop"} <= OLDER, title
    for call in calls:
        if call.kernel in PRODUCTS:  # some of its outputs may be float32
            assert call.tensors[0][0] in ("f16", "bf16", "f32"), call.line
            assert len({dtype for dtype, _ in call.tensors[:2]}) == 1, call.line
        if call.kernel == "aclnnFlashAttentionScore":
            (q, shape), (_, keys), _ = call.tensors[:3]
            width = shape[-1] // int(re.search(r'(\d+) "BSH"', call.line)[1]) if '"BSH"' in call.line else shape[-1]
            assert q in ("f16", "bf16") and shape == keys and width <= WIDEST and width % 16 == 0, call.line


def products(calls: list[Call]) -> set[str]:
    return {call.tensors[0][0] for call in calls if call.kernel in PRODUCTS}


def flash(calls: list[Call]) -> list[tuple[int, ...]]:
    return [call.tensors[0][1] for call in calls if call.kernel == "aclnnFlashAttentionScore"]


# Launches, measured with MindSpore 2.8.0; other versions differ by a few.
LIMITS = {
    "sd2": {"unet": 850, "text": 95, "encode": 75, "decode": 100},
    "sd1": {"unet": 575, "text": 110, "encode": 75, "decode": 100},
    "sdxl": {"unet": 265, "text": 85, "encode": 60, "decode": 70},
}


@pytest.mark.parametrize("kind", LIMITS)
def test_drawing_launches_few_kernels_in_half_precision(stubs, tmp_path, kind):
    found, _ = parts(stubs, tmp_path, kind)
    for part, limit in LIMITS[kind].items():
        calls = found[f"{kind} {part}"]
        assert limit * 0.8 < len(calls) <= limit, (part, len(calls))
        in_float32 = kind == "sdxl" and part in ("encode", "decode")  # its autoencoder must be
        assert products(calls) == {"f32" if in_float32 else "f16"}, part
        weights = [c for c in calls if c.kernel == "aclnnCast" and [t for t, _ in c.tensors] == ["f32", "f16"]]
        assert len(weights) <= 40, (part, len(weights))  # the inputs, and probabilities of attention
    shapes = flash(found[f"{kind} unet"])
    if kind == "sd2":
        assert len(shapes) == 16
    if kind == "sd1":  # 40 channels a head become 48; 160 are too many
        assert {shape[-1] for shape in shapes} == {48, 320}


def test_sd1_is_trained_in_bfloat16_where_it_is_asked_for(stubs, tmp_path):
    found, _ = parts(stubs, tmp_path, "short-sd1-bfloat16-train")
    gradients = found["short-sd1 train gradients"]
    assert products(gradients) == {"bf16"} and {shape[-1] for shape in flash(gradients)} == {48, 320}
    assert "f16" not in {dtype for calls in found.values() for call in calls for dtype, _ in call.tensors}


@pytest.mark.parametrize(("kind", "limit"), [("short-train", 1780), ("sdxl-train", 1350), ("short-lora", 2600)])
def test_training_launches_few_kernels(stubs, tmp_path, kind, limit):
    found, printed = parts(stubs, tmp_path, kind)
    title, *counts = re.search(r"^(.*): (\d+) parameters, (\d+) updates$", printed, re.M).groups()
    gradients, norm, update = (found[f"{title} {part}"] for part in ("gradients", "norm", "update"))
    assert products(gradients) == {"f16"} and flash(gradients)
    assert limit * 0.8 < len(gradients) <= limit, len(gradients)
    parameters, updates = map(int, counts)
    assert len(norm) <= updates + 5
    assert sum(call.kernel == ADAM for call in update) == updates
    # Each scales a gradient, updates, averages, and copies the average; the small ones are copied back.
    assert len(update) <= 4 * updates + (parameters - updates) + 12, len(update)


def test_a_chip_without_flash_attention_gets_none(stubs, tmp_path):
    found, _ = parts(stubs, tmp_path, "short", chip="Ascend310P3")
    assert found["short unet"] and not flash([call for calls in found.values() for call in calls])


def test_the_script_draws_and_flash_attention_can_be_switched_off(stubs, tmp_path):
    words = [ROOT / "text_to_image.py", "--version", "tiny", "--n_iter", 1, "--n_samples", 1, "--sampling_steps", 1]
    words += ["--output_path", tmp_path / "o", "--enable_flash_attention", "False"]
    found, _ = dry(stubs, tmp_path, *words)
    assert products(found["before"]) == {"f16"} and not flash(found["before"])
    assert len([*(tmp_path / "o/samples").glob("*.png")]) == 1
