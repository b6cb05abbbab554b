"""Convolutions for CPUs: by Winograd's method where it is faster, and one whose gradient needs little memory.

MindSpore's own gradient of a convolution's input copies each pixel's surroundings, nine times the input for a kernel of
3×3, and every compiled convolution keeps this memory. The other gradient takes longer to compile, so only wide
convolutions have it.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from ldm.kernels.cpu import native
from ldm.kernels.plain import Conv2d, conv2d

WIDE = 320  # outputs; the narrowest convolutions of the published UNets have so many


def small_gradient_conv2d(outputs: int, kernel: int, stride: int, padding) -> nn.Cell | ops.Conv2D:
    """As `plain.conv2d`. Only a wide convolution that keeps the picture's size has the other gradient."""
    if outputs < WIDE or kernel == 1 or stride != 1 or padding != kernel // 2:
        return conv2d(outputs, kernel, stride, padding)
    return SizeKeepingConv2d(outputs, kernel)


class SizeKeepingConv2d(nn.Cell):
    """`plain.conv2d` of stride 1 that keeps the picture's size, (x, weight) -> y."""

    def __init__(self, outputs: int, kernel: int):
        super().__init__()
        self.outputs, self.kernel = outputs, kernel
        self.conv = _Convolve(outputs, kernel)
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)
        self.turn, self.swap = ops.ReverseV2([2, 3]), ops.Transpose()

    def construct(self, x, weight):
        return self.conv(x, weight)

    def bprop(self, x, weight, out, dout):
        """The input's gradient is a convolution too, by the turned weight, whose inputs and outputs are swapped.

        For small pictures MindSpore's gradient takes less time and little memory.
        """
        dx, dweight = self.gradients(self.conv)(x, weight, dout)
        if x.shape[2] * x.shape[3] > self.outputs:
            turned = self.swap(self.turn(weight), (1, 0, 2, 3))
            dx = ops.Conv2D(x.shape[1], self.kernel, pad_mode="pad", pad=self.kernel // 2)(dout, turned)
        return dx, dweight


class _Convolve(nn.Cell):
    """MindSpore's operator as a cell, for `ops.GradOperation`."""

    def __init__(self, outputs: int, kernel: int):
        super().__init__()
        self.conv = conv2d(outputs, kernel, 1, kernel // 2)

    def construct(self, x, weight):
        return self.conv(x, weight)


FEWEST_INPUTS = 4  # for Winograd's method; MindSpore's own convolution of three colours is faster


def native_conv2d(outputs: int, kernel: int, stride: int, padding) -> nn.Cell:
    """As `plain.Conv2d`."""
    if (kernel, stride, padding) == (3, 1, 1):
        return WinogradConv2d(outputs)
    return Conv2d(outputs, kernel, stride, padding, small_gradient_conv2d)


class WinogradConv2d(nn.Cell):
    """`plain.Conv2d` of 3 x 3 and stride 1 that keeps the picture's size, by Winograd's F(4x4, 3x3): see winograd.h.

    Three inputs, and half precision, take the other way.
    """

    def __init__(self, outputs: int):
        super().__init__()
        self.other = Conv2d(outputs, 3, 1, 1, small_gradient_conv2d)
        self.conv, self.conv_bias = Winograd(), WinogradBias()

    def construct(self, x, weight, bias):
        if x.shape[1] < FEWEST_INPUTS or x.dtype != ms.float32:
            return self.other(x, weight, bias)
        return self.conv(x, weight) if bias is None else self.conv_bias(x, weight, bias)


class Winograd(nn.Cell):
    """(x [B, C, H, W], weight [O, C, 3, 3]) to [B, O, H, W]."""

    def __init__(self):
        super().__init__()
        self.forward = native("convolution3", _with_outputs)
        self.to_x = native("convolution3_input_grad", _with_inputs)
        self.to_weight = native("convolution3_weight_grad", _of_filters)

    def construct(self, x, weight):
        return self.forward(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.to_x(dout, weight), self.to_weight(x, dout)


class WinogradBias(Winograd):
    """With a bias [O], or [B, O] with one for each picture."""

    def __init__(self):
        super().__init__()
        self.forward = native("convolution3_bias", lambda x, w, b: _with_outputs(x, w))
        self.to_bias = native("convolution3_bias_grad", lambda dy, bias: bias)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return self.to_x(dout, weight), self.to_weight(x, dout), self.to_bias(dout, bias)


def _with_outputs(x, weight):
    return [x[0], weight[0], *x[2:]] if isinstance(x, (list, tuple)) else x


def _with_inputs(dy, weight):
    return [dy[0], weight[1], *dy[2:]] if isinstance(dy, (list, tuple)) else dy


def _of_filters(x, dy):
    return [dy[1], x[1], 3, 3] if isinstance(x, (list, tuple)) else x
