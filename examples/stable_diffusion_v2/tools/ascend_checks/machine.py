"""Devices, driver and CANN, as far as they can be seen without MindSpore."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

from ldm import npu

NODES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
DRIVER = "/usr/local/Ascend/driver"
VARIABLES = ("ASCEND_", "HCCL_", "RANK", "MS_", "LDM_", "GLOG_v", "LD_LIBRARY_PATH", "PYTHONPATH")


class Finding(NamedTuple):
    """A line of the report. ok: None where it was not checked. mend: a command or advice, where it failed."""

    what: str
    ok: bool | None
    said: str
    mend: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[self.ok]
        return f"{mark}  {self.what}: {self.said}" + (f"; {self.mend}" if self.mend and self.ok is False else "")


def guarded(what: str, check: Callable[[], Finding], mend: str = "paste the whole report") -> Finding:
    """The check's finding; an exception is one."""
    try:
        return check()
    except Exception as error:  # whatever a broken installation throws
        first = str(error).strip().split("\n")[0] or "no message"
        return Finding(what, False, f"{type(error).__name__}: {first}", mend)


def devices() -> Finding:
    found, missing = glob(npu.DEVICES), [node for node in NODES if not os.path.exists(node)]
    if found and not missing:
        return Finding("devices", True, f"{len(found)} under /dev")
    lacking = missing if found else ["/dev/davinci0", *missing]
    flags = " ".join(f"--device={node}" for node in lacking)
    return Finding("devices", False, f"missing {', '.join(lacking)}", f"in a container: docker run {flags} ...")


def driver() -> Finding:
    mount = f"install the driver; in a container: docker run -v {DRIVER}:{DRIVER} -v /usr/local/bin/npu-smi:..."
    if not os.path.isdir(DRIVER):
        return Finding("driver", False, f"there is no {DRIVER}", mount)
    if shutil.which("npu-smi") is None:
        return Finding("driver", False, "there is no npu-smi on the PATH", mount)
    done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=60, check=False)
    last = (done.stderr or done.stdout).strip().split("\n")[-1]
    return Finding(
        "driver", done.returncode == 0, version(f"{DRIVER}/version.info") if not done.returncode else last, mount
    )


def version(file: str) -> str:
    """The version that a version.info names, or "unknown version"."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition("=")[2] for line in lines if line.startswith("Version=")), "unknown version")


def cann() -> Finding:
    home = os.environ.get("ASCEND_HOME_PATH", "")
    source = " or ".join(path for path in npu.SET_ENV if os.path.exists(os.path.expanduser(path))) or npu.SET_ENV[0]
    if not home:
        return Finding("CANN", False, "ASCEND_HOME_PATH is not set", f"source {source}")
    if npu.cann_version() is None:
        return Finding("CANN", False, f"no version in {home}/compiler/version.info", "install the toolkit")
    return Finding("CANN", True, f"{npu.cann_version()} in {home}")


def kernels() -> Finding:
    folder = Path(os.environ.get("ASCEND_OPP_PATH") or "none") / "built-in/op_impl/ai_core/tbe"
    good = (folder / "kernel").is_dir()
    mend = "install CANN's kernels (ops) package for this chip, of the toolkit's version"
    return Finding("kernels package", good, str(folder / "kernel") + ("" if good else " is not there"), mend)


def wheel(name: str) -> Finding:
    found, home = importlib.util.find_spec(name), os.environ.get("ASCEND_HOME_PATH") or "$ASCEND_HOME_PATH"
    mend = f"pip install {home}/lib64/{name}-*-py3-none-any.whl"
    return Finding(f"package {name}", bool(found), found.origin or "there" if found else "not importable", mend)


def rank_table() -> Finding:
    stray = os.environ.get("RANK_TABLE_FILE")
    return Finding("rank table", not stray, f"RANK_TABLE_FILE={stray}" if stray else "none", "unset RANK_TABLE_FILE")


def findings() -> Iterator[Finding]:
    checks = {"devices": devices, "driver": driver, "CANN": cann, "kernels package": kernels, "rank table": rank_table}
    checks.update({f"package {name}": lambda name=name: wheel(name) for name in ("te", "hccl")})
    for what, check in checks.items():
        yield guarded(what, check)


def facts() -> Iterator[str]:
    """Lines to paste into a report."""
    yield f"Python {platform.python_version()}, {platform.platform()}, driver {version(f'{DRIVER}/version.info')}"
    for name in sorted(os.environ):
        if name.startswith(VARIABLES) and "TOKEN" not in name:
            yield f"{name}={os.environ[name]}"
