"""The operators that decide the speed, and one table of implementations for each device.

`PLAIN` is the documentation, and the reference in tests. `NATIVE` is the CPU's table, `ASCEND` the NPU's. Networks call
`select()` in their `__init__`. An entry takes constants of the network and returns the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mindspore as ms

from ldm import npu
from ldm.kernels import ascend, cpu, plain, sliced
from ldm.kernels.plain import add, cast, concat_channels, multiply, reshape, transpose  # noqa: F401


class Kernels(NamedTuple):
    """One implementation of each operator; see the plain classes for their meaning."""

    Attention: Callable = plain.Attention
    GroupNorm: Callable = plain.GroupNorm
    LayerNorm: Callable = plain.LayerNorm
    GELU: Callable = plain.GELU
    QuickGELU: Callable = plain.QuickGELU
    SiLU: Callable = plain.SiLU
    GEGLU: Callable = plain.GEGLU
    AddBias: Callable = plain.AddBias
    Upsample2: Callable = plain.Upsample2
    MatMul: Callable = plain.matmul
    Conv2d: Callable = plain.conv2d


PLAIN = Kernels()
SLICED = Kernels(Attention=sliced.SlicedAttention)
NATIVE = Kernels(
    Attention=sliced.SlicedAttention,
    GroupNorm=cpu.NativeGroupNorm,
    LayerNorm=cpu.NativeLayerNorm,
    GELU=cpu.NativeGELU,
    GEGLU=cpu.NativeGEGLU,
    AddBias=cpu.NativeAddBias,
    Upsample2=cpu.NativeUpsample2,
)
ASCEND = Kernels(Attention=ascend.FlashAttention)
ASCEND_SLICED = ASCEND._replace(Attention=sliced.SlicedAttention)  # by request, and for chips without flash attention


@cache
def select() -> Kernels:
    """The table for the device that `runtime.start` has set."""
    device = ms.get_context("device_target")
    if device == "CPU" and cpu.native_library():
        return NATIVE
    if device != "Ascend":
        return SLICED
    return ASCEND if npu.flash_attention(ms.hal.get_device_name(0, "Ascend")) else ASCEND_SLICED
