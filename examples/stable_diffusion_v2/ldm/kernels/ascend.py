"""The NPU's operators. Each is one kernel of CANN where the plain definition is several.

A network is bound by the number of kernels that are launched, not by their work, where it draws few pictures.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import mint, nn, ops

from ldm.kernels.plain import Heads, add, cast, multiply, reshape
from ldm.kernels.sliced import SlicedAttention

WIDEST = 128  # of a head, for flash attention: pictures were noisy with 160


class FlashHeads(nn.Cell):
    """`plain.Heads` by `ops.flash_attention_score` (arXiv 2205.14135): half precision, sums in float32 inside.

    It is used where it is known to be good: in unmasked self-attention with heads of up to WIDEST channels. It reads
    the heads where they lie, so nothing is transposed.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.heads, self.attend = heads, Heads(heads, SlicedAttention)

    def construct(self, q, k, v, mask=None):
        width = q.shape[-1] // self.heads
        if mask is not None or q.dtype == ms.float32 or width > WIDEST or q.shape[1] != k.shape[1]:
            return self.attend(q, k, v, mask)
        if width % 16 == 0:
            return self.flash(q, k, v, width**-0.5, "BSH")
        # The operator wants multiples of 16, SD 1.x has 40; zeros change nothing.
        out = self.flash(self.padded(q), self.padded(k), self.padded(v), width**-0.5, "BSND")
        return reshape(mint.narrow(out, -1, 0, width), q.shape)

    def padded(self, x):
        """[B, N, C] to [B, N, H, D], D the next multiple of 16."""
        b, n, c = x.shape
        width = c // self.heads
        return mint.nn.functional.pad(reshape(x, (b, n, self.heads, width)), (0, -width % 16))

    def flash(self, q, k, v, scale, layout):
        return ops.flash_attention_score(q, k, v, head_num=self.heads, scalar_value=scale, input_layout=layout)


class FusedGroupNorm(nn.Cell):
    """`plain.GroupNorm` in the type of its weight; the sums are float32 inside."""

    def __init__(self, groups: int, eps: float, silu: bool = False):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.act = FusedSiLU() if silu else nn.Identity()

    def construct(self, x, weight, bias):
        return self.act(ops.group_norm(cast(x, weight.dtype), self.groups, weight, bias, self.eps))


class FusedLayerNorm(nn.Cell):
    """`plain.LayerNorm` in the type of its weight; the sums are float32 inside."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def construct(self, x, weight, bias):
        return ops.layer_norm(cast(x, weight.dtype), weight.shape, weight, bias, self.eps)


class FusedSiLU(nn.Cell):
    def construct(self, x):
        return ops.silu(x)


class FusedGELU(nn.Cell):
    def construct(self, x):
        return mint.nn.functional.gelu(x)  # the exact one


class FusedGEGLU(nn.Cell):
    def construct(self, x):
        value, gate = mint.chunk(x, 2, -1)
        return multiply(value, mint.nn.functional.gelu(gate))


class FusedConv2d(nn.Cell):
    """`plain.Conv2d`; only padding that is alike on all sides is part of the kernel."""

    def __init__(self, outputs: int, kernel: int, stride: int, padding: int | tuple[int, int, int, int]):
        super().__init__()
        alike = isinstance(padding, int)
        self.stride, self.padding = stride, padding if alike else 0
        self.around = () if alike else (*padding[2:], *padding[:2])  # left, right, top, bottom

    def construct(self, x, weight, bias):
        if self.around:
            x = mint.nn.functional.pad(x, self.around)
        if bias is None or bias.ndim == 1:
            return self.conv(x, weight, bias)
        return add(self.conv(x, weight, None), reshape(bias, bias.shape + (1, 1)))

    def conv(self, x, weight, bias):
        return mint.nn.functional.conv2d(x, weight, bias, self.stride, self.padding)
