"""A convolution for CPUs, whose gradient needs little memory.

MindSpore's own gradient of a convolution's input copies each pixel's surroundings, nine times the input for a kernel of
3×3, and every compiled convolution keeps this memory. The other gradient takes longer to compile, so only wide
convolutions have it.
"""

from __future__ import annotations

from mindspore import nn, ops

from ldm.kernels.plain import conv2d

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
