"""The CPU kernels called without MindSpore, as this machine compiles them and as a machine with AVX2 alone would."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

AVX2 = "-march=x86-64-v3"
FOLDER = tempfile.TemporaryDirectory()


def builds() -> tuple[str, ...]:
    """The names of the libraries that can be tried here."""
    info = Path("/proc/cpuinfo")
    has_avx2 = platform.machine() == "x86_64" and info.exists() and " avx2 " in info.read_text()
    return ("native", "AVX2") if has_avx2 else ("native",)


@cache
def library(build: str) -> str:
    """The path of the library of that name; the one with AVX2 is compiled into a folder that lasts as long as it."""
    from ldm.kernels import cpu  # here, because `call` serves processes without MindSpore

    if build == "native":
        return cpu.native_library()
    flags = [AVX2 if flag == "-march=native" else flag for flag in cpu.COMPILE_FLAGS]
    subprocess.run(["g++", "-shared", *flags, *map(str, cpu.SOURCES), "-o", f"{FOLDER.name}/avx2.so"], check=True)
    return f"{FOLDER.name}/avx2.so"


def call(path: str, name: str, inputs: list[np.ndarray], outputs: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The outputs, of these shapes, of an operator. They are full of NaN before."""
    arrays = [np.ascontiguousarray(each, np.float32) for each in inputs]
    arrays += [np.full(shape, np.nan, np.float32) for shape in outputs]
    pointers = (ctypes.c_void_p * len(arrays))(*(each.ctypes.data for each in arrays))
    ranks = (ctypes.c_int * len(arrays))(*(each.ndim for each in arrays))
    shapes = [(ctypes.c_int64 * each.ndim)(*each.shape) for each in arrays]
    of_shapes = (ctypes.POINTER(ctypes.c_int64) * len(arrays))(
        *(ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)) for shape in shapes)
    )
    function = getattr(ctypes.CDLL(path), name)
    assert function(len(arrays), pointers, ranks, of_shapes, None, None, None) == 0
    return arrays[len(inputs) :]


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(np.square(wanted))))


def said_by_threads(code: str, path: str) -> set[bytes]:
    """What Python code prints about the library at `path`, with one, two and three threads."""
    env, command = {**os.environ, "GLOG_v": "3"}, [sys.executable, "-c", code, path]
    return {
        subprocess.run(command, env={**env, "OMP_NUM_THREADS": n}, capture_output=True, check=True).stdout
        for n in "123"
    }
