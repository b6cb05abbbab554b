"""The operators that decide the speed, and one table of implementations for each device.

`PLAIN` is the documentation, and the reference in tests. `NATIVE` is the CPU's table, `ASCEND` the NPU's. Networks call
`select()` in their `__init__`. An entry takes constants of the network and returns the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import mindspore as ms
from mindspore import ops

from ldm import npu
from ldm.kernels import ascend, convolution, cpu, plain, products, sliced
from ldm.kernels.plain import add, cast, concat_channels, multiply, reshape, transpose  # noqa: F401


class Kernels(NamedTuple):
    """One implementation of each operator; see the plain classes for their meaning.

    joins_products: whether one wide matrix product takes less time than three narrow ones and the joining.
    few_launches: whether launching a kernel costs more than its work on small tensors; see ldm.train.together.
    """

    Heads: Callable = plain.Heads
    GroupNorm: Callable = plain.GroupNorm
    LayerNorm: Callable = plain.LayerNorm
    GELU: Callable = plain.GELU
    QuickGELU: Callable = plain.QuickGELU
    SiLU: Callable = plain.SiLU
    GEGLU: Callable = plain.GEGLU
    Upsample2: Callable = plain.Upsample2
    MatMul: Callable = plain.matmul
    Affine: Callable = plain.Affine
    Conv2d: Callable = plain.Conv2d
    joins_products: bool = True
    few_launches: bool = False


PLAIN = Kernels()
SLICED_HEADS = partial(plain.Heads, attend=sliced.SlicedAttention)
CPU_CONV2D = partial(plain.Conv2d, convolve=convolution.small_gradient_conv2d)
SLICED = Kernels(Heads=SLICED_HEADS, Conv2d=CPU_CONV2D)
NATIVE = Kernels(
    Heads=cpu.NativeHeads,
    GroupNorm=cpu.NativeGroupNorm,
    LayerNorm=cpu.NativeLayerNorm,
    GELU=cpu.NativeGELU,
    GEGLU=cpu.NativeGEGLU,
    Upsample2=cpu.NativeUpsample2,
    MatMul=products.NativeMatMul,
    Affine=products.NativeAffine,
    Conv2d=convolution.native_conv2d,
    joins_products=False,
)
ASCEND = Kernels(
    Heads=ascend.FlashHeads,
    GroupNorm=ascend.FusedGroupNorm,
    LayerNorm=ascend.FusedLayerNorm,
    GELU=ascend.FusedGELU,
    SiLU=ascend.FusedSiLU,
    GEGLU=ascend.FusedGEGLU,
    Affine=ops.Dense,
    Conv2d=ascend.FusedConv2d,
    few_launches=True,
)
ASCEND_SLICED = ASCEND._replace(Heads=SLICED_HEADS)  # by request, and for chips without flash attention


@cache
def select() -> Kernels:
    """The table for the device that `runtime.start` has set."""
    device = ms.get_context("device_target")
    if device == "CPU" and cpu.native_library():
        return NATIVE
    if device != "Ascend":
        return SLICED
    return ASCEND if npu.flash_attention(ms.hal.get_device_name(0, "Ascend")) else ASCEND_SLICED
