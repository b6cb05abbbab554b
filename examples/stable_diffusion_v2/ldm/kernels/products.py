"""Matrix products of CPUs: x Wᵀ + bias in one pass, and products in bfloat16 for CPUs that have the instruction."""

from __future__ import annotations

import ctypes

import mindspore as ms
from mindspore import nn, ops

from ldm.kernels import plain
from ldm.kernels.cpu import native, native_library


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers itself (AVX-512 BF16)."""
    library = native_library()
    return library is not None and hasattr(ctypes.CDLL(library), "affine_bfloat16")


class NativeAffine(nn.Cell):
    """`plain.Affine` in one pass, in float32. Half precision takes the plain way."""

    def __init__(self):
        super().__init__()
        self.affine, self.plain = _Affine(), plain.Affine()

    def construct(self, x, weight, bias):
        return self.affine(x, weight, bias) if x.dtype == ms.float32 else self.plain(x, weight, bias)

    def in_bfloat16(self) -> None:
        """Multiply numbers rounded to bfloat16 from now on, with sums in float32. There are no gradients then."""
        self.affine = native("affine_bfloat16", _rows)


class NativeMatMul(nn.Cell):
    """`plain.matmul`, in float32. Half precision takes the plain way."""

    def __init__(self):
        super().__init__()
        self.matmul, self.plain = _MatMul(), plain.matmul()

    def construct(self, x, weight):
        return self.matmul(x, weight) if x.dtype == ms.float32 else self.plain(x, weight)

    def in_bfloat16(self) -> None:
        """As in `NativeAffine`."""
        self.matmul = native("matmul_bfloat16", _rows)


class _MatMul(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = native("matmul", _rows)
        self.to_x, self.to_weight = ops.MatMul(), ops.MatMul(transpose_a=True)

    def construct(self, x, weight):
        return self.forward(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.to_x(dout, weight), self.to_weight(dout, x)


class _Affine(_MatMul):
    def __init__(self):
        super().__init__()
        self.forward = native("affine", _rows)
        self.to_bias = native("affine_bias_grad", lambda dy, bias: bias)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return self.to_x(dout, weight), self.to_weight(dout, x), self.to_bias(dout, bias)


def _rows(x, weight, *_):
    return [x[0], weight[0]] if isinstance(x, (list, tuple)) else x
