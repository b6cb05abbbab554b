"""What is said where Ascend cannot be used, and what chips can do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm import npu, runtime
from ldm.errors import UserError

ROOT = Path(__file__).parents[1]
WORDS = (
    "Unsupported device target Ascend. This process only supports one of the ['CPU']. Please check.\n\n"
    "- Device load error message:\n"
    "Load dynamic library: libmindspore_ascend.so.2 failed. {}\n"
    "Load dynamic library: libmindspore_ops_ascend.so failed. lib_other.so: cannot open\n"
)
MISSING = "libge_runner.so: cannot open shared object file: No such file or directory"


@pytest.fixture(autouse=True)
def no_cann(monkeypatch, tmp_path):
    """A machine that shows no NPU and no CANN."""
    for name in ("ASCEND_HOME_PATH", npu.OVERFLOW_MODE, npu.FLASH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(npu, "DEVICES", str(tmp_path / "davinci[0-9]*"))
    monkeypatch.setattr(npu, "SET_ENV", (str(tmp_path / "old/set_env.sh"), str(tmp_path / "new/set_env.sh")))
    monkeypatch.setenv("PATH", str(tmp_path))


def cann(folder: Path, version: str) -> str:
    """A folder as CANN's of that version; returns its path."""
    (folder / "compiler").mkdir(parents=True)
    (folder / "compiler/version.info").write_text(f"Version={version}\nversion_dir={version}\n")
    return str(folder)


def why(reason: str = MISSING, devices: int = 0) -> str:
    return npu.cause(WORDS.format(reason), devices, "2.8.0", ["8.2", "8.5"])


@pytest.mark.parametrize("sign", ["device", "npu-smi", "CANN"])
def test_each_sign_of_an_npu_forbids_the_silent_cpu(monkeypatch, tmp_path, sign):
    assert not npu.signs() and runtime.default_device() == "CPU"
    if sign == "device":
        (tmp_path / "davinci3").touch()
    elif sign == "npu-smi":
        (tmp_path / "npu-smi").touch(mode=0o755)
    else:
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    with pytest.raises(UserError) as raised:
        runtime.default_device()
    said = str(raised.value)
    assert "\n" not in said and "--device_target CPU" in said and ".so" in said
    assert runtime.find_device("CPU") == "CPU"


def test_an_explicit_ascend_gives_its_cause():
    with pytest.raises(UserError, match=r"Ascend cannot be used: lib\w+\.so.*source .*set_env.sh.* works with CANN 8"):
        runtime.compute_dtype(None, "Ascend")


def test_the_remedy_follows_the_cause(monkeypatch, tmp_path):
    assert "old/set_env.sh or" in why() and "CANN 8.2 or 8.5" in why() and MISSING in why()
    cann(tmp_path / "new", "8.5.0")
    (tmp_path / "new/set_env.sh").touch()
    assert "source" in why() and "old" not in why()
    assert "driver" in why("libascend_hal.so: cannot open shared object file")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "new"))
    assert "incomplete or of another version" in why()
    monkeypatch.setenv("ASCEND_HOME_PATH", cann(tmp_path / "none", "7.0.RC1"))
    assert "CANN 7.0 is set in this shell, but MindSpore 2.8.0 works with CANN 8.2 or 8.5" in why()
    assert "built without Ascend" in npu.cause("Unsupported device target Ascend.\nmore", 0, "2.8.0", [])
    assert "npu-smi info" in npu.cause("", 0, "2.8.0", ["8.5"])


def test_the_wheels_own_list_of_cann_is_read():
    assert all(float(version) >= 8 for version in runtime.supported_cann())
    assert len(runtime.supported_cann()) > 0


def test_a_script_ends_with_one_line_and_writes_nothing(tmp_path):
    env = {**os.environ, "PATH": os.defpath, "ASCEND_HOME_PATH": str(tmp_path)}
    words = ["text_to_image.py", "--version", "tiny", "--output_path", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: this machine has ASCEND_HOME_PATH, but Ascend cannot be used: lib")


def test_a_mindspore_without_set_device_is_refused_in_one_line(tmp_path):
    (tmp_path / "mindspore").mkdir()
    (tmp_path / "mindspore/__init__.py").write_text("__version__ = '2.4.10'\ncommunication = nn = None\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "LD_PRELOAD": ""}
    done = subprocess.run([sys.executable, "-c", "from ldm import runtime"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: MindSpore 2.4.10 is too old")


@pytest.mark.parametrize(
    ("name", "saturates", "flash"),
    [
        ("Ascend910B2", False, True),
        ("Ascend910B4-1", False, True),
        ("Ascend910_9382", False, True),
        ("Ascend910B", True, False),
        ("Ascend910A", True, False),
        ("Ascend910ProA", True, False),
        ("Ascend310P3", True, False),
        ("Ascend999", False, False),
    ],
)
def test_chips(monkeypatch, name, saturates, flash):
    assert (npu.chip(name).saturates, npu.flash_attention(name)) == (saturates, flash)
    monkeypatch.setenv(npu.OVERFLOW_MODE, "SATURATION_MODE")
    assert npu.chip(name).saturates
    npu.allow_flash_attention(False)
    assert not npu.flash_attention(name)


@pytest.fixture
def on_chip(monkeypatch):
    """Calls `compute_dtype` as on a machine with that chip."""

    def dtype(name: str, wanted: str | None, training: bool) -> str:
        monkeypatch.setattr(runtime, "find_device", lambda wanted: "Ascend")
        monkeypatch.setattr(runtime, "chip", lambda: npu.chip(name))
        return runtime.compute_dtype(wanted, None, training)

    return dtype


def test_training_in_float16_needs_a_chip_that_shows_overflows(on_chip, monkeypatch):
    assert on_chip("Ascend910B2", None, True) == "float16" == on_chip("Ascend310P3", None, False)
    assert on_chip("Ascend310P3", None, True) == "float32" and on_chip("Ascend910B2", "bfloat16", True) == "bfloat16"
    with pytest.raises(UserError, match="overflow.*--dtype float32$"):
        on_chip("Ascend910A", "float16", True)
    with pytest.raises(UserError, match="no bfloat16"):
        on_chip("Ascend310P3", "bfloat16", False)
    monkeypatch.setenv(npu.OVERFLOW_MODE, "SATURATION_MODE")
    with pytest.raises(UserError, match="overflow.*unset MS_ASCEND_CHECK_OVERFLOW_MODE"):
        on_chip("Ascend910B2", "float16", True)
