"""The CPU's operators: C++, compiled once per machine by GCC or Clang, called as custom operators with gradients.

Without a compiler the plain definitions run, and one line says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.errors import UserError
from ldm.files import escaped, private_folder, replacing, sha256
from ldm.kernels.plain import cast

HEADERS, SOURCES = (sorted(Path(__file__).with_name("native").glob(f"*{kind}")) for kind in (".h", ".cc"))
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
)


@cache
def native_library() -> str | None:
    """The path of the compiled SOURCES, which are compiled now if need be; None where they cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return _no_native("no C++ compiler was found (install g++)")
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
    model = "".join(line for line in cpu.splitlines() if line.startswith(("flags", "Features", "model name")))
    content = [path.read_bytes() for path in (*HEADERS, *SOURCES)]
    key = hashlib.sha256(repr((content, compiler, COMPILE_FLAGS, model)).encode()).hexdigest()[:16]
    try:
        library = private_folder("ldm-kernels") / f"kernels_cpu-{key}.so"
        if not (_is_as_recorded(library) and _loads(library)):
            _compile(compiler, library)
            ctypes.CDLL(str(library))
    except UserError as error:
        return _no_native(str(error))
    except OSError as error:  # no room, or a disk that allows no programs
        return _no_native(f"{library.parent}: {error.strerror or error}")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return _no_native(lines[0] if lines else f"{compiler} failed")
    return str(library)


def _record(library: Path) -> Path:
    """The file beside a library with its size and sha256, by which a damaged or foreign library is recognised."""
    return library.with_suffix(".sha256")


def _is_as_recorded(library: Path) -> bool:
    """Whether the file is as the compiler made it: loading a truncated one would end the process by SIGBUS."""
    try:
        size, digest = _record(library).read_bytes()[:100].split()
        return library.stat().st_size == int(size) and sha256(library).hex().encode() == digest
    except (OSError, ValueError):
        return False


def _loads(library: Path) -> bool:
    """Whether this system can load it: the home folder may be shared with a system that has other libraries."""
    try:
        return bool(ctypes.CDLL(str(library)))
    except OSError:
        return False


def _compile(compiler: str, library: Path) -> None:
    def run(*words: Path | str) -> None:
        subprocess.run([compiler, *COMPILE_FLAGS, *map(str, words)], check=True, capture_output=True)

    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made, objects = Path(scratch) / library.name, [Path(scratch) / f"{source.stem}.o" for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for each in [pool.submit(run, "-c", source, "-o", to) for source, to in zip(SOURCES, objects)]:
                each.result()
        run("-shared", *objects, "-o", made)
        content = made.read_bytes()
    with replacing(library) as file:
        file.write(content)
    with replacing(_record(library)) as file:
        file.write(f"{len(content)} {hashlib.sha256(content).hexdigest()}".encode())


def _no_native(reason: str) -> None:
    line = "CPU kernels not compiled, the plain ones are several times slower, the next run tries again"
    print(f"warning: {line}: {escaped(reason, 400)}", file=sys.stderr)


def native(name: str, out) -> ops.Custom:
    """The operator `name` of the library; `out` maps the inputs' shapes (or types) to the outputs'."""
    return ops.Custom(f"{native_library()}:{name}", out_shape=out, out_dtype=out, func_type="aot")


class NativeNorm(nn.Cell):
    """The operator `name` of x, weight and bias, with the gradient `name`_grad; `settings` are its constants."""

    def __init__(self, name: str, *settings: float):
        super().__init__()
        self.settings = Tensor(np.array(settings, np.float32))
        self.forward = native(name, lambda x, w, b, s: x)
        self.backward = native(f"{name}_grad", lambda x, w, b, s, dy: (x, w, b))

    def construct(self, x, weight, bias):
        return self.forward(cast(x, ms.float32), weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        dx, dweight, dbias = self.backward(x.astype(ms.float32), weight, bias, self.settings, dout)
        return dx.astype(x.dtype), dweight, dbias


class NativeGroupNorm(NativeNorm):
    def __init__(self, groups: int, eps: float, silu: bool = False):
        super().__init__("group_norm", groups, eps, silu)


class NativeLayerNorm(NativeNorm):
    def __init__(self, eps: float):
        super().__init__("layer_norm", eps)


def _half_width(x):
    return x[:-1] + [x[-1] // 2] if isinstance(x, (list, tuple)) else x


def _twice_the_plane(x):
    return x[:2] + [2 * x[2], 2 * x[3]] if isinstance(x, (list, tuple)) else x


def _half_the_plane(x):
    return x[:2] + [x[2] // 2, x[3] // 2] if isinstance(x, (list, tuple)) else x


class NativeActivation(nn.Cell):
    """The operator `name` of one input, with the gradient `name`_grad."""

    def __init__(self, name: str, out):
        super().__init__()
        self.forward = native(name, out)
        self.backward = native(f"{name}_grad", lambda x, dy: x)

    def construct(self, x):
        return self.forward(cast(x, ms.float32))

    def bprop(self, x, out, dout):
        return (self.backward(x.astype(ms.float32), dout).astype(x.dtype),)


class NativeGEGLU(NativeActivation):
    def __init__(self):
        super().__init__("geglu", _half_width)


class NativeGELU(NativeActivation):
    def __init__(self):
        super().__init__("gelu", lambda x: x)


class NativeUpsample2(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = native("upsample2", _twice_the_plane)
        self.backward = native("upsample2_grad", _half_the_plane)

    def construct(self, x):
        return self.forward(cast(x, ms.float32))

    def bprop(self, x, out, dout):
        return (self.backward(dout).astype(x.dtype),)


class NativeHeads(nn.Cell):
    """`plain.Heads` without a matrix of all scores, in float32. The heads are read where they lie."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads  # read by `networks.blockwise.graph_key`
        self.attend, self.attend_masked = FlashAttention(heads), MaskedFlashAttention(heads)

    def in_bfloat16(self) -> None:
        """Multiply numbers rounded to bfloat16 from now on, with sums in float32. There are no gradients then."""
        self.attend.forward = native("attention_bfloat16", self.attend.outputs)
        self.attend_masked.forward = native("attention_masked_bfloat16", self.attend_masked.outputs)

    def construct(self, q, k, v, mask=None):
        inputs = cast(q, ms.float32), cast(k, ms.float32), cast(v, ms.float32)
        y, _ = self.attend(*inputs) if mask is None else self.attend_masked(*inputs, mask)
        return cast(y, v.dtype)


class FlashAttention(nn.Cell):
    """q [B, N, C], k and v [B, M, C] to (outputs [B, N, C], logarithms of the softmax's sums [B, heads, N])."""

    def __init__(self, heads: int):
        super().__init__()
        self.outputs = partial(_attended, heads)
        self.forward = native("attention", self.outputs)
        self.backward = native("attention_grad", lambda q, k, v, y, log_sums, dy: (q, k, v))

    def construct(self, q, k, v):
        return self.forward(q, k, v)

    def bprop(self, q, k, v, out, dout):
        return self.backward(q, k, v, *out, dout[0])


class MaskedFlashAttention(nn.Cell):
    """`FlashAttention` with a mask [N, M] that is added to the scores. The mask is a constant without a gradient."""

    def __init__(self, heads: int):
        super().__init__()
        self.outputs = partial(_attended, heads)
        self.forward = native("attention_masked", self.outputs)
        self.backward = native("attention_masked_grad", lambda q, k, v, mask, y, log_sums, dy: (q, k, v))

    def construct(self, q, k, v, mask):
        return self.forward(q, k, v, mask)

    def bprop(self, q, k, v, mask, out, dout):
        return (*self.backward(q, k, v, mask, *out, dout[0]), ops.zeros_like(mask))


def _attended(heads: int, q, *_):
    return q, [q[0], heads, q[1]] if isinstance(q, (list, tuple)) else q
