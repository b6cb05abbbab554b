"""The plain definition of every operator: the documentation, and the reference in tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import mindspore as ms
from mindspore import nn, ops

# Operators, because tensor methods and the functions of mindspore.ops are Python. Graph mode parses and infers them
# wherever they are called, which took a third of the time to compile a UNet.
add, cast, concat_channels, multiply, reshape = ops.Add(), ops.Cast(), ops.Concat(1), ops.Mul(), ops.Reshape()
transpose = ops.Transpose()


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


class Heads(nn.Cell):
    """`attend` over `heads` heads; q [B, N, C], k and v [B, M, C] to [B, N, C]."""

    def __init__(self, heads: int, attend: Callable[[], nn.Cell] = Attention):
        super().__init__()
        self.heads, self.attend = heads, attend()

    def construct(self, q, k, v, mask=None):
        q = multiply(q, (q.shape[-1] // self.heads) ** -0.5)
        out = self.attend(self.split(q), self.split(k), self.split(v), mask)  # [B, H, N, D]
        return reshape(transpose(out, (0, 2, 1, 3)), q.shape)

    def split(self, x):
        b, n, c = x.shape
        return transpose(reshape(x, (b, n, self.heads, c // self.heads)), (0, 2, 1, 3))  # [B, H, N, D]


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
    """x sigmoid(1.702 x) (arXiv 1606.08415, section 2), as in OpenAI's CLIP."""

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


class Upsample2(nn.Cell):
    """Nearest neighbour, [B, C, H, W] to [B, C, 2H, 2W]."""

    def construct(self, x):
        b, c, h, w = x.shape
        return ops.broadcast_to(x.reshape(b, c, h, 1, w, 1), (b, c, h, 2, w, 2)).reshape(b, c, 2 * h, 2 * w)


class Affine(nn.Cell):
    """x Wᵀ + bias for x [N, in], W [out, in] and bias [out]."""

    def __init__(self):
        super().__init__()
        self.matmul = matmul()

    def construct(self, x, weight, bias):
        return add(self.matmul(x, weight), bias)


def conv2d(outputs: int, kernel: int, stride: int, padding: int | tuple[int, int, int, int]) -> ops.Conv2D:
    """Cross-correlation of x [B, in, H, W] with W [outputs, in, kernel, kernel]."""
    return ops.Conv2D(outputs, kernel, pad_mode="pad", pad=padding, stride=stride)


class Conv2d(nn.Cell):
    """Cross-correlation of x [B, in, H, W] with W [outputs, in, kernel, kernel], plus a bias.

    The bias is [outputs], or [B, outputs] with one for each picture, or None.

    Args:
        padding: a number, or (top, bottom, left, right).
        convolve: makes the operator without bias, of the four others.
    """

    def __init__(self, outputs: int, kernel: int, stride: int, padding, convolve: Callable = conv2d):
        super().__init__()
        self.conv = convolve(outputs, kernel, stride, padding)
        self.add_bias = ops.BiasAdd()  # its gradient is three times faster than that of a broadcast addition

    def construct(self, x, weight, bias):
        y = self.conv(x, weight)
        if bias is None:
            return y
        return self.add_bias(y, bias) if bias.ndim == 1 else add(y, reshape(bias, bias.shape + (1, 1)))


def matmul() -> ops.MatMul:
    """x Wᵀ for x [N, in] and W [out, in]."""
    return ops.MatMul(transpose_b=True)
