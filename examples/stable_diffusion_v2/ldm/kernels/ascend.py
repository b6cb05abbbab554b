"""The NPU's operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from ldm.kernels.sliced import SlicedAttention

WIDEST = 128  # of a head, for flash attention: pictures were noisy with 160


class FlashAttention(nn.Cell):
    """`ops.flash_attention_score` (arXiv 2205.14135): half precision in and out, sums in float32 inside.

    It is used where it is known to be good: in unmasked self-attention with heads of up to WIDEST channels.
    """

    def __init__(self):
        super().__init__()
        self.attend = SlicedAttention()

    def construct(self, q, k, v, mask=None):
        width = q.shape[-1]
        if mask is not None or q.dtype == ms.float32 or width > WIDEST or q.shape[2] != k.shape[2]:
            return self.attend(q, k, v, mask)
        if width % 16 != 0:  # the operator wants multiples of 16, SD 1.x has 40; zeros change nothing
            pad = (0, 16 - width % 16)
            q, k, v = ops.pad(q, pad), ops.pad(k, pad), ops.pad(v, pad)
        return self.flash(q, k, v)[..., :width]

    def flash(self, q, k, v):
        return ops.flash_attention_score(q, k, v, head_num=q.shape[1], scalar_value=1.0, input_layout="BNSD")
