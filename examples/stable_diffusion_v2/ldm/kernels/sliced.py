"""Attention in slices of the queries, for devices without a better kernel: less memory, the same numbers."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops import constexpr

from ldm.kernels.plain import Attention, cast, multiply

SCORE_BYTES = 64 * 2**20  # the most attention scores held at once on a CPU ...
MOST_SLICES = 32  # ... except for very large pictures: more slices take longer to compile


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

    Every slice waits for the one before. Otherwise MindSpore would run them side by side and hold all scores at once.
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
        """dS = P (dout vᵀ - D). D, the row sums of dout * out, goes into the product as one more column."""
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
    """(first, number) of the queries of each part, from the shapes of q and k, so that its scores fit SCORE_BYTES.

    The parts are equal if this takes fewer than twice the needed number; otherwise the last part is smaller.
    """
    rows, row_bytes = q[2], 4 * q[0] * q[1] * k[2]
    fewest = min(rows, MOST_SLICES, -(-rows * row_bytes // SCORE_BYTES))
    count = next((count for count in range(fewest, 2 * fewest) if rows % count == 0), fewest)
    size = -(-rows // count)
    return tuple((first, min(size, rows - first)) for first in range(0, rows, size))
