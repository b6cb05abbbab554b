"""Layers with parameters, shared by the networks. `initialize` sets random weights; a checkpoint replaces them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm import kernels
from ldm.checkpoint.arrays import widened
from ldm.config.model import GROUPS
from ldm.kernels import add, reshape
from ldm.randomness import generator

ALIGNMENT = 16  # bytes, as of NumPy's own arrays; oneDNN and the CPU kernels never see less


def parameter(*shape: int, value: float = 0.0) -> Parameter:
    """A float32 parameter of that shape, filled with `value`; zeros take no memory until they are written."""
    array = np.full(shape, value, np.float32) if value else np.zeros(shape, np.float32)
    return Parameter(Tensor.from_numpy(array))


def fill(target: Parameter, array: np.ndarray, copy: bool = False) -> bool:
    """Give a parameter the values of `array`; returns whether they were copied, by request or by necessity.

    Otherwise the parameter shares the array's memory, and must not be trained: see `require_own`.
    """
    array = widened(array)
    copy = copy or array.dtype != np.float32 or not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT != 0
    target.set_data(Tensor.from_numpy(np.array(array, np.float32, order="C") if copy else array))
    target.is_view = not copy
    return copy


def set_values(parameters: Iterable[Parameter], arrays: Iterable[np.ndarray]) -> None:
    """Give parameters the values of arrays of their shapes and types, which nobody else may change."""
    for parameter, array in zip(parameters, arrays):
        parameter.set_data(Tensor(array))


def require_own(parameters: Iterable[Parameter]) -> None:
    """Assert that no parameter is a view of a file, which cannot be written to. Call it before changing parameters."""
    views = [each.name for each in parameters if getattr(each, "is_view", False)]
    assert not views, f"{len(views)} parameters are views of a file, first {views[0]}: load them with copy=True"


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    """Float32, Gaussian."""
    return Tensor(rng.standard_normal(shape, np.float32) * np.float32(std))


class Weighted(nn.Cell):
    """A layer that multiplies by a weight. Every use of the weight goes through `effective_weight`."""

    multiplies = True  # see runtime.set_compute_dtype

    def __init__(self):
        super().__init__()
        self.adapter = None  # a cell that gives what is added to the weight; see ldm.networks.adapter

    def adapt(self, adapter: nn.Cell) -> None:
        """Add what the adapter gives to the weight from now on."""
        del self.adapter  # or MindSpore would not take a cell of that name
        self.adapter = adapter

    def effective_weight(self):
        """The weight that the layer works with."""
        if self.adapter is None:
            return self.weight
        return add(self.weight, self.adapter())


class Linear(Weighted):
    """y = x Wᵀ + b; x [..., in], weight [out, in]. `zero`: start at zero, so that its branch adds nothing at first."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, zero: bool = False):
        super().__init__()
        self.weight = parameter(outputs, inputs)
        self.bias = parameter(outputs) if bias else None
        self.zero = zero
        self.matmul = kernels.select().Affine() if bias else kernels.select().MatMul()

    def construct(self, x):
        rows = reshape(x, (-1, x.shape[-1]))
        if self.bias is None:
            y = self.matmul(rows, self.effective_weight())
        else:
            y = self.matmul(rows, self.effective_weight(), self.bias)
        return reshape(y, x.shape[:-1] + (-1,))

    def reset(self, rng: np.random.Generator) -> None:
        reset_uniform(self, self.weight.shape[1], rng)


class MatMul(nn.Cell):
    """x Wᵀ for x [..., in] and a weight [out, in], both given in the call."""

    multiplies = True

    def __init__(self):
        super().__init__()
        self.matmul = kernels.select().MatMul()

    def construct(self, x, weight):
        return reshape(self.matmul(reshape(x, (-1, x.shape[-1])), weight), x.shape[:-1] + (-1,))


class Affine(nn.Cell):
    """x Wᵀ + bias for x [..., in], a weight [out, in] and a bias [out], all given in the call."""

    multiplies = True

    def __init__(self):
        super().__init__()
        self.affine = kernels.select().Affine()

    def construct(self, x, weight, bias):
        return reshape(self.affine(reshape(x, (-1, x.shape[-1])), weight, bias), x.shape[:-1] + (-1,))


class Conv2d(Weighted):
    """2-D convolution; x [B, in, H, W], weight [out, in, k, k]; `padding`: a number or (top, bottom, left, right)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding=None, zero: bool = False):
        super().__init__()
        self.weight = parameter(outputs, inputs, kernel, kernel)
        self.bias = parameter(outputs)
        self.zero = zero
        pad = kernel // 2 if padding is None else padding
        self.conv = kernels.select().Conv2d(outputs, kernel, stride, pad)

    def construct(self, x):
        return self.conv(x, self.effective_weight(), self.bias)

    def reset(self, rng: np.random.Generator) -> None:
        reset_uniform(self, self.weight.size // self.weight.shape[0], rng)


class ShiftedConv2d(Conv2d):
    """A convolution that adds `shift` [B, out] to its bias, which saves an addition to every pixel."""

    def construct(self, x, shift):
        return self.conv(x, self.effective_weight(), add(self.bias, shift))


class GroupNorm(nn.Cell):
    """Group norm with GROUPS groups, followed by SiLU if asked."""

    def __init__(self, channels: int, eps: float, silu: bool = False):
        super().__init__()
        self.weight = parameter(channels, value=1.0)
        self.bias = parameter(channels)
        self.kernel = kernels.select().GroupNorm(GROUPS, eps, silu)

    def construct(self, x):
        return self.kernel(x, self.weight, self.bias)


class LayerNorm(nn.Cell):
    """Layer normalization over the last axis, eps 1e-5."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = parameter(channels, value=1.0)
        self.bias = parameter(channels)
        self.kernel = kernels.select().LayerNorm(1e-5)

    def construct(self, x):
        return self.kernel(x, self.weight, self.bias)


class Embedding(nn.Cell):
    """Rows of weight [entries, width] by index."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.weight = parameter(entries, width)

    def construct(self, ids):
        return ops.gather(self.weight, ids, 0)

    def reset(self, rng: np.random.Generator) -> None:
        self.weight.set_data(normal(rng, self.weight.shape, 0.02))


def reset_uniform(layer: nn.Cell, fan_in: int, rng: np.random.Generator) -> None:
    """Weight and bias uniform within ±1/sqrt(fan_in), PyTorch's default; zero for a layer with `zero`."""
    bound = 0.0 if layer.zero else 1 / math.sqrt(fan_in)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            values = (rng.random(parameter.shape, np.float32) * 2 - 1) * np.float32(bound)
            parameter.set_data(Tensor(values, ms.float32))


def initialize(net: nn.Cell, seed: int) -> None:
    """Random weights for every layer of `net`: each depends only on the seed and the layer's name."""
    for name, cell in net.cells_and_names():
        if hasattr(cell, "reset"):
            cell.reset(generator(seed, f"weights {name}"))
