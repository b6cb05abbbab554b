"""Small tensors as one, for a device on which a kernel's launch costs more than its work.

Of SD 2.x's 686 trained tensors most are biases and weights of norms, a thousandth of all numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, mint, nn, ops

from ldm import kernels


def small_last(params: Iterable[Parameter]) -> list[Parameter]:
    """The parameters in an order that `Together` takes: those of one dimension behind the others."""
    return sorted(params, key=is_small)


def is_small(tensor: Tensor) -> bool:
    return tensor.ndim == 1


def in_order(params: Iterable[Parameter]) -> ParameterTuple:
    """The parameters in the order of their gradients, optimizer state and moving average on this device."""
    return ParameterTuple(small_last(params) if kernels.select().few_launches else params)


# It reads the parts of a joined tensor where they lie; ops.assign, for older versions, copies them first.
copy_into = getattr(ops.auto_generate, "inplace_copy", ops.assign)


class Slice:
    """A part of a joined parameter. It is saved and restored as if it was a parameter of its own."""

    def __init__(self, name: str, whole: Parameter, begin: int, size: int):
        self.name, self.whole, self.size, self.shape, self.dtype = name, whole, size, (size,), whole.dtype
        self.place = slice(begin, begin + size)

    def asnumpy(self) -> np.ndarray:
        return self.whole.asnumpy()[self.place]

    def set_data(self, data: Tensor) -> None:
        array = self.whole.asnumpy().copy()
        array[self.place] = data.asnumpy()
        self.whole.set_data(Tensor(array))


class Together(nn.Cell):
    """Joins the small tensors of lists, where `kernels` says that launches are what costs.

    The graph is made of slices of lists and of maps, because graph mode compiles no loop over hundreds of tensors.

    Args:
        tensors: of the shapes that the lists will have, in the order of `in_order`.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__(auto_prefix=False)
        joins = kernels.select().few_launches
        self.first = sum(not is_small(tensor) for tensor in tensors) if joins else len(tensors)  # of the small ones
        assert not any(map(is_small, tensors[: self.first])) or not joins, "small tensors come last"
        self.sizes = tuple(tensor.size for tensor in tensors[self.first :])
        self.begins = tuple(np.cumsum((0, *self.sizes))[:-1].tolist())
        self.join, self.map = ops.Concat(0), ops.HyperMap()

    def few(self, tensors):
        """The large tensors, and all small ones as one tensor behind them."""
        if not self.sizes:
            return tensors
        return tensors[: self.first] + (self.join(tensors[self.first :]),)

    def few_parameters(self, params: ParameterTuple, name: str) -> ParameterTuple:
        """The large parameters, and a new one of that name behind them with the values of all small ones."""
        if not self.sizes:
            return params
        joined = np.concatenate([param.asnumpy() for param in params[self.first :]])
        return ParameterTuple([*params[: self.first], Parameter(Tensor(joined), name=name, requires_grad=False)])

    def each(self, few: Sequence[Parameter], names: Sequence[str]) -> list[Parameter | Slice]:
        """The opposite of `few_parameters`: something to save and restore for each name."""
        if not self.sizes:
            return list(few)
        *large, joined = few
        places = zip(names[len(large) :], self.begins, self.sizes)
        return large + [Slice(name, joined, begin, size) for name, begin, size in places]

    def small(self, joined):
        """The small tensors, which lie where `joined` has them."""
        return self.map(ops.partial(self.cut, joined), self.begins, self.sizes)

    def cut(self, joined, begin, size):
        return mint.narrow(joined, 0, begin, size)


class Gather(nn.Cell):
    """Copies small parameters into the one that has them joined."""

    def __init__(self, small: ParameterTuple, joined: Parameter):
        super().__init__(auto_prefix=False)
        self.small, self.joined, self.join, self.copy_into = small, joined, ops.Concat(0), copy_into

    def construct(self):
        return self.copy_into(self.joined, self.join(self.small))


class NormOfFew(nn.Cell):
    """Global 2-norm of tensors of these shapes, scalar float32: the length of the list of their lengths."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__(auto_prefix=False)
        self.together, self.map, self.stack = Together(tensors), ops.HyperMap(), ops.Stack()

    def construct(self, *tensors):
        return self.length(self.stack(self.map(self.length, self.together.few(tensors))))

    def length(self, x):
        return mint.norm(x.astype(ms.float32))
