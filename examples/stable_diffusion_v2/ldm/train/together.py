"""Small tensors as one, for a device on which a kernel's launch costs more than its work.

Of SD 2.x's 686 trained tensors most are biases and weights of norms, a thousandth of all numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops


def small_last(params: Iterable[Parameter]) -> list[Parameter]:
    """The parameters in an order that `Together` takes: those of one dimension behind the others."""
    return sorted(params, key=is_small)


def is_small(tensor: Tensor) -> bool:
    return tensor.ndim == 1


class Together(nn.Cell):
    """Maps elementwise functions over lists of tensors; the small tensors are joined for it.

    The graph is made of slices of lists and of maps, because graph mode compiles no loop over hundreds of tensors.

    Args:
        tensors: of the shapes that the lists will have; see `small_last`.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__(auto_prefix=False)
        self.first = sum(not is_small(tensor) for tensor in tensors)  # of the small ones
        assert not any(map(is_small, tensors[: self.first])), "small tensors come last"
        self.sizes = tuple(tensor.size for tensor in tensors[self.first :])
        self.begins = tuple(np.cumsum((0, *self.sizes))[:-1].tolist())
        self.join, self.map = ops.Concat(0), ops.HyperMap()

    def few(self, tensors):
        """The large tensors, and all small ones as one tensor behind them."""
        if not self.sizes:
            return tensors
        return tensors[: self.first] + (self.join(tensors[self.first :]),)

    def construct(self, function: Callable, *lists):
        """`function` of the tensors of all lists, in their order."""
        few = ()
        for tensors in lists:
            few += (self.few(tensors),)
        done = self.map(function, *few)
        if not self.sizes:
            return done
        return done[:-1] + self.map(ops.partial(self.cut, done[-1]), self.begins, self.sizes)

    def cut(self, joined, begin, size):
        return mint.narrow(joined, 0, begin, size)


class NormOfFew(nn.Cell):
    """Global 2-norm of tensors of these shapes, scalar float32: the length of the list of their lengths."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__(auto_prefix=False)
        self.together, self.map, self.stack = Together(tensors), ops.HyperMap(), ops.Stack()

    def construct(self, *tensors):
        return self.length(self.stack(self.map(self.length, self.together.few(tensors))))

    def length(self, x):
        return mint.norm(x.astype(ms.float32))
