"""The only file that touches MindSpore's context: device, mode, compile options, and what a script does with errors.

Import it before anything that imports mindspore: it sets the environment that MindSpore reads when it is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import sys
from typing import Callable

os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings on a CPU are harmless and many
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle OpenMP threads would take the cores from MindSpore's own

import mindspore as ms  # noqa: E402
from mindspore import nn  # noqa: E402

from ldm.errors import UserError  # noqa: E402

DEVICES = ("Ascend", "GPU", "CPU")
DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
SLOW_ON_CPU = (2, 9)  # from this version on, CPU convolutions wider than 1×1 run some 300 times slower than in 2.8

log = logging.getLogger(__name__)


def default_device() -> str:
    """Ascend where there is one, CPU elsewhere."""
    return "Ascend" if ms.hal.is_available("Ascend") else "CPU"


def start(device_target: str | None = None, mode: int = 0) -> str:
    """Set device and mode (0 graph, 1 PyNative) before the first tensor; returns the device in use.

    Raises:
        UserError: this machine or this build of MindSpore does not have the device.
    """
    device = device_target or default_device()
    if device != "CPU" and not ms.hal.is_available(device):
        raise UserError(f"device_target {device} is not available here; use --device_target CPU, or leave it out")
    ms.set_device(device)
    ms.set_context(mode=mode)
    version = tuple(int(part) for part in ms.__version__.split(".")[:2])
    if device == "CPU" and version >= SLOW_ON_CPU:
        log.warning(
            "MindSpore %s runs convolutions on a CPU some 300 times slower than 2.8.0: pip install mindspore==2.8.0",
            ms.__version__,
        )
    return device


def default_dtype(device: str) -> str:
    """float16 on Ascend; float32 on a CPU, where half precision is slower for every operator."""
    return "float32" if device == "CPU" else "float16"


def set_compute_dtype(net: nn.Cell, dtype: str) -> None:
    """Let the layers that multiply matrices work in `dtype`; parameters, norms and softmax stay in float32."""
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")
    if dtype != "float32":
        for _, cell in net.cells_and_names():
            if getattr(cell, "multiplies", False):
                cell.to_float(DTYPES[dtype])


def give_back_memory() -> None:
    """Return to the system what is free: a deleted network's parameters, what compiling a graph has used."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's; without it memory is only returned later
        ctypes.CDLL(None).malloc_trim(0)


def run(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError becomes one line and exit code 1, an interrupt exit code 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
