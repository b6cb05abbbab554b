"""The operators that decide the speed: a plain definition of each, and one table of implementations per device.

`PLAIN` is the documentation and what the tests compare with. `NATIVE` is the CPU's: the kernels of kernels_cpu.cc,
compiled once per machine (GCC or Clang; without a compiler the plain ones run, and one line says so), and attention
in slices. `ASCEND` has the NPU's fused attention. Networks take what `select()` returns in their `__init__`. Each
entry is a class: its arguments are constants of the network, its call is the operator.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from ldm.errors import UserError
from ldm.files import escaped, private_folder, replacing, sha256

SCORE_BYTES = 64 * 2**20  # the most attention scores held at once on a CPU ...
MOST_SLICES = 32  # ... but for very large pictures: more slices take longer to compile
SOURCE = Path(__file__).with_name("kernels_cpu.cc")
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)


# Operators as they are: tensor methods and the functions of mindspore.ops are Python, which graph mode parses and
# infers wherever they are called, and that was a third of the time that compiling a UNet took.
add, cast, concat_channels, multiply, reshape = ops.Add(), ops.Cast(), ops.Concat(1), ops.Mul(), ops.Reshape()
transpose = ops.Transpose()


# ---- plain definitions ----


class Attention(nn.Cell):
    """softmax(q kᵀ + mask) v with the scores in float32 (arXiv 1706.03762, equation 1; q comes already scaled).

    q: [B, H, N, D]; k, v: [B, H, M, D]; mask: [N, M], added to the scores, or None. Returns [B, H, N, D].
    """

    def __init__(self):
        super().__init__()
        self.score, self.softmax, self.mix = ops.BatchMatMul(transpose_b=True), ops.Softmax(-1), ops.BatchMatMul()

    def construct(self, q, k, v, mask=None):
        scores = self.score(cast(q, ms.float32), cast(k, ms.float32))
        if mask is not None:
            scores = add(scores, mask)
        return self.mix(cast(self.softmax(scores), v.dtype), v)


class GroupNorm(nn.Cell):
    """Group normalization (arXiv 1803.08494) of x [B, C, ...] with weight and bias [C], then SiLU if asked; float32."""

    def __init__(self, groups: int, eps: float, silu: bool = False):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.act = SiLU() if silu else nn.Identity()

    def construct(self, x, weight, bias):
        grouped = x.astype(ms.float32).reshape(x.shape[0], self.groups, -1)
        centred = grouped - grouped.mean(-1, keep_dims=True)
        normal = (centred * ops.rsqrt((centred * centred).mean(-1, keep_dims=True) + self.eps)).reshape(x.shape)
        per_channel = (1, -1) + (1,) * (x.ndim - 2)
        return self.act(normal * weight.reshape(per_channel) + bias.reshape(per_channel))


class LayerNorm(nn.Cell):
    """Layer normalization (arXiv 1607.06450) over the last axis of x [..., C] with weight and bias [C]; float32."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def construct(self, x, weight, bias):
        x = x.astype(ms.float32)
        centred = x - x.mean(-1, keep_dims=True)
        return centred * ops.rsqrt((centred * centred).mean(-1, keep_dims=True) + self.eps) * weight + bias


class GELU(nn.Cell):
    """x Φ(x) with the exact Φ (arXiv 1606.08415)."""

    def construct(self, x):
        return 0.5 * x * (1.0 + ops.erf(x * math.sqrt(0.5)))


class QuickGELU(nn.Cell):
    """x sigmoid(1.702 x) (arXiv 1606.08415, section 2), what OpenAI's CLIP was trained with."""

    def construct(self, x):
        return x * ops.sigmoid(1.702 * x)


class SiLU(nn.Cell):
    """x sigmoid(x)."""

    def construct(self, x):
        return x * ops.sigmoid(x)


class GEGLU(nn.Cell):
    """value * GELU(gate) for x [..., 2C] = (value, gate) (arXiv 2002.05202, equation 6); returns [..., C]."""

    def __init__(self):
        super().__init__()
        self.gelu = GELU()

    def construct(self, x):
        value, gate = ops.split(x, x.shape[-1] // 2, -1)
        return value * self.gelu(gate)


class AddBias(nn.Cell):
    """x + bias for x [..., C] and bias [C]."""

    def construct(self, x, bias):
        return add(x, bias)


class Upsample2(nn.Cell):
    """Nearest neighbour, [B, C, H, W] to [B, C, 2H, 2W]."""

    def construct(self, x):
        b, c, h, w = x.shape
        return ops.broadcast_to(x.reshape(b, c, h, 1, w, 1), (b, c, h, 2, w, 2)).reshape(b, c, 2 * h, 2 * w)


# ---- CPU ----


class SlicedAttention(nn.Cell):
    """`Attention` over slices of the queries, so that at most SCORE_BYTES of scores exist at once."""

    def __init__(self):
        super().__init__()
        self.attend, self.slice_by_slice = Attention(), SliceBySlice()

    def construct(self, q, k, v, mask=None):
        if mask is not None or len(slices(q.shape, k.shape)) == 1:
            return self.attend(q, k, v, mask)
        return self.slice_by_slice(q, k, v)


class SliceBySlice(nn.Cell):
    """Unmasked `Attention`; the backward pass computes the scores of each slice again (arXiv 2205.14135, section 3.1).

    Every slice waits for the one before: MindSpore would run them side by side, and all scores would exist at once.
    """

    def __init__(self):
        super().__init__()
        self.attend, self.wait, self.join, self.softmax = Attention(), ops.Depend(), ops.Concat(2), ops.Softmax(-1)
        self.matmul, self.cut = ops.BatchMatMul(), ops.Slice()
        self.matmul_a, self.matmul_b = ops.BatchMatMul(transpose_a=True), ops.BatchMatMul(transpose_b=True)

    def construct(self, q, k, v):
        out = ()
        for first, rows in slices(q.shape, k.shape):
            part = self.rows(q, first, rows)
            if out:
                part = self.wait(part, out[-1])
            out += (self.attend(part, k, v),)
        return self.join(out)

    def bprop(self, q, k, v, out, dout):
        """dS = P (dout vᵀ - D) with D = the row sums of dout out, which goes into the product as one more column."""
        join, q32, k32 = ops.Concat(-1), cast(q, ms.float32), cast(k, ms.float32)
        v32, dout32 = cast(v, ms.float32), cast(dout, ms.float32)
        minus_d = multiply(dout32, cast(out, ms.float32)).sum(-1, keepdims=True) * -1.0
        douts, wide = join((dout32, minus_d)), join((v32, ops.ones_like(v32[..., :1])))
        dq, dk, dv = (), 0.0, 0.0
        for first, rows in slices(q.shape, k.shape):
            part, dpart = self.rows(q32, first, rows), self.rows(douts, first, rows)
            if dq:
                part, dpart = self.wait(part, dk), self.wait(dpart, dk)
            p = self.softmax(self.matmul_b(part, k32))
            ds = multiply(p, self.matmul_b(dpart, wide))
            dv = self.matmul_a(p, dpart[..., :-1]) + dv
            dq += (self.matmul(ds, k32),)
            dk = self.wait(self.matmul_a(ds, part), (dq, dv)) + dk
        return cast(self.join(dq), q.dtype), cast(dk, k.dtype), cast(dv, v.dtype)

    def rows(self, x, first, count):
        """x[:, :, first : first + count]."""
        return self.cut(x, (0, 0, first, 0), (x.shape[0], x.shape[1], count, x.shape[3]))


@constexpr
def slices(q: tuple[int, ...], k: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(first, number) of the queries of each part, by the shapes of q and k, so that its scores fit SCORE_BYTES.

    The parts are equal where less than twice as many as are needed can be, or the last one is smaller.
    """
    rows, row_bytes = q[2], 4 * q[0] * q[1] * k[2]
    fewest = min(rows, MOST_SLICES, -(-rows * row_bytes // SCORE_BYTES))
    count = next((count for count in range(fewest, 2 * fewest) if rows % count == 0), fewest)
    size = -(-rows // count)
    return tuple((first, min(size, rows - first)) for first in range(0, rows, size))


@cache
def native_library() -> str | None:
    """The path of the compiled kernels_cpu.cc, made now if this machine has none yet; None where it cannot be made."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return _no_native("no C++ compiler was found (install g++)")
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
    model = "".join(line for line in cpu.splitlines() if line.startswith(("flags", "Features", "model name")))
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, COMPILE_FLAGS, model)).encode()).hexdigest()[:16]
    try:
        library = private_folder("ldm-kernels") / f"kernels_cpu-{key}.so"
        if not (_is_as_recorded(library) and _loads(library)):
            _compile(compiler, library)
            ctypes.CDLL(str(library))
    except UserError as error:
        return _no_native(str(error))
    except OSError as error:  # no room, a disk from which nothing may be run
        return _no_native(f"{library.parent}: {error.strerror or error}")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return _no_native(lines[0] if lines else f"{compiler} failed")
    return str(library)


def _record(library: Path) -> Path:
    """The file beside a library that has its size and sha256, of which a damaged or foreign one has others."""
    return library.with_suffix(".sha256")


def _is_as_recorded(library: Path) -> bool:
    """Whether the file is what the compiler made: one that was cut off would end the process by SIGBUS when loaded."""
    try:
        size, digest = _record(library).read_bytes()[:100].split()
        return library.stat().st_size == int(size) and sha256(library).hex().encode() == digest
    except (OSError, ValueError):
        return False


def _loads(library: Path) -> bool:
    """Whether this system can load it: a home folder may be shared with one that has other libraries."""
    try:
        return bool(ctypes.CDLL(str(library)))
    except OSError:
        return False


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *COMPILE_FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        content = made.read_bytes()
    with replacing(library) as file:
        file.write(content)
    with replacing(_record(library)) as file:
        file.write(f"{len(content)} {hashlib.sha256(content).hexdigest()}".encode())


def _no_native(reason: str) -> None:
    line = "CPU kernels not compiled, the plain ones are several times slower, the next run tries again"
    print(f"warning: {line}: {escaped(reason, 400)}", file=sys.stderr)


def _native(name: str, out) -> ops.Custom:
    """The operator `name` of the library; `out` maps the inputs' shapes (or types) to the outputs'."""
    return ops.Custom(f"{native_library()}:{name}", out_shape=out, out_dtype=out, func_type="aot")


class NativeGroupNorm(nn.Cell):
    def __init__(self, groups: int, eps: float, silu: bool = False):
        super().__init__()
        self.settings = Tensor(np.array([groups, eps, silu], np.float32))
        self.forward = _native("group_norm", lambda x, w, b, s: x)
        self.backward = _native("group_norm_grad", lambda x, w, b, s, dy: (x, w, b))

    def construct(self, x, weight, bias):
        return self.forward(cast(x, ms.float32), weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        dx, dweight, dbias = self.backward(x.astype(ms.float32), weight, bias, self.settings, dout)
        return dx.astype(x.dtype), dweight, dbias


class NativeLayerNorm(nn.Cell):
    def __init__(self, eps: float):
        super().__init__()
        self.settings = Tensor(np.array([eps], np.float32))
        self.forward = _native("layer_norm", lambda x, w, b, s: x)
        self.backward = _native("layer_norm_grad", lambda x, w, b, s, dy: (x, w, b))

    def construct(self, x, weight, bias):
        return self.forward(cast(x, ms.float32), weight, bias, self.settings)

    def bprop(self, x, weight, bias, out, dout):
        dx, dweight, dbias = self.backward(x.astype(ms.float32), weight, bias, self.settings, dout)
        return dx.astype(x.dtype), dweight, dbias


def _half_width(x):
    return x[:-1] + [x[-1] // 2] if isinstance(x, (list, tuple)) else x


def _twice_the_plane(x):
    return x[:2] + [2 * x[2], 2 * x[3]] if isinstance(x, (list, tuple)) else x


def _half_the_plane(x):
    return x[:2] + [x[2] // 2, x[3] // 2] if isinstance(x, (list, tuple)) else x


class NativeActivation(nn.Cell):
    """The operator `name` with the gradient `name`_grad, of one input."""

    def __init__(self, name: str, out):
        super().__init__()
        self.forward = _native(name, out)
        self.backward = _native(f"{name}_grad", lambda x, dy: x)

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


class NativeAddBias(nn.Cell):
    """In float32 by a kernel: MindSpore's broadcast takes twice the time, and memory for several copies of x."""

    def __init__(self):
        super().__init__()
        self.add_bias = BiasKernel()

    def construct(self, x, bias):
        return self.add_bias(x, bias) if x.dtype == ms.float32 else add(x, bias)


class BiasKernel(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = _native("add_bias", lambda x, b: x)
        self.backward = _native("add_bias_grad", lambda dy, b: b)

    def construct(self, x, bias):
        return self.forward(x, bias)

    def bprop(self, x, bias, out, dout):
        return dout, self.backward(dout, bias)


class NativeUpsample2(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = _native("upsample2", _twice_the_plane)
        self.backward = _native("upsample2_grad", _half_the_plane)

    def construct(self, x):
        return self.forward(cast(x, ms.float32))

    def bprop(self, x, out, dout):
        return (self.backward(dout).astype(x.dtype),)


# ---- Ascend ----


class FlashAttention(nn.Cell):
    """`ops.flash_attention_score` (arXiv 2205.14135): half precision in and out, sums in float32 inside."""

    def __init__(self):
        super().__init__()
        self.attend = SlicedAttention()

    def construct(self, q, k, v, mask=None):
        width = q.shape[-1]
        if mask is not None or q.dtype == ms.float32 or width > 512:  # what the operator does not take
            return self.attend(q, k, v, mask)
        if width % 16 != 0:  # it wants multiples of 16, SD 1.x has 40; zeros change nothing
            pad = (0, 16 - width % 16)
            q, k, v = ops.pad(q, pad), ops.pad(k, pad), ops.pad(v, pad)
        return self.flash(q, k, v)[..., :width]

    def flash(self, q, k, v):
        return ops.flash_attention_score(q, k, v, head_num=q.shape[1], scalar_value=1.0, input_layout="BNSD")


# ---- the tables ----


class Kernels(NamedTuple):
    """One implementation of each operator; see the plain classes for their meaning."""

    Attention: type = Attention
    GroupNorm: type = GroupNorm
    LayerNorm: type = LayerNorm
    GELU: type = GELU
    QuickGELU: type = QuickGELU
    SiLU: type = SiLU
    GEGLU: type = GEGLU
    AddBias: type = AddBias
    Upsample2: type = Upsample2


PLAIN = Kernels()
SLICED = Kernels(Attention=SlicedAttention)
NATIVE = Kernels(
    SlicedAttention,
    NativeGroupNorm,
    NativeLayerNorm,
    NativeGELU,
    GEGLU=NativeGEGLU,
    AddBias=NativeAddBias,
    Upsample2=NativeUpsample2,
)
ASCEND = Kernels(Attention=FlashAttention)


@cache
def select() -> Kernels:
    """The table for the device that `runtime.start` has set."""
    device = ms.get_context("device_target")
    if device == "CPU" and native_library():
        return NATIVE
    return ASCEND if device == "Ascend" else SLICED
