"""Networks compiled block by block: for drawing with large ones, whose compilation takes longer than some steps.

SD's UNet has 16 transformers and 22 residual blocks, but only 4 and 14 that differ, its text encoder 23 equal blocks.
As one graph all are compiled, and compiling takes memory that grows along. Here one layer of each kind is compiled, and
runs with the weights of each of its kind in turn, whose memory is shared, not copied.

The weights must stay as they are while these are in use, and the networks must not be asked for them. Training has its
own (ldm/train/gradients.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from mindspore import Parameter, Tensor, nn
from mindspore.ops import Primitive

from ldm.networks.text import encode
from ldm.networks.unet import join, walk

MANY_WEIGHTS = 50_000_000  # larger networks gain by it; in smaller ones it costs a few percent of a step
_OF_EVERY_CELL = frozenset(vars(nn.Cell()))


def graph_key(layer: nn.Cell) -> tuple:
    """Everything that makes a layer's graph but the values of its parameters: layers of one key can share a graph."""
    return tuple(fact for name, cell in layer.cells_and_names() for fact in (name, type(cell), *_facts(cell)))


def _facts(cell: nn.Cell) -> Iterator[tuple]:
    """(name, value) of a cell's own settings, operators, constants and shapes, not of the cells inside."""
    for name, parameter in cell.parameters_and_names(expand=False):
        yield name, parameter.shape, parameter.dtype
    for name in sorted(vars(cell).keys() - _OF_EVERY_CELL):
        value = vars(cell)[name]
        if isinstance(value, Primitive):
            yield name, value.name, repr(sorted(value.attrs.items()))
        elif isinstance(value, Tensor):
            yield name, value.shape, value.asnumpy().tobytes()
        elif isinstance(value, (bool, int, float, str, tuple)):
            yield name, value


class Kind:
    """A layer whose graph serves all layers of its key."""

    def __init__(self, layer: nn.Cell, parameters: list[Parameter]):
        self.layer, self.parameters, self.values = layer, parameters, None

    def take(self, values: list[Tensor]) -> None:
        """Hold these weights."""
        if self.values is not values:
            for parameter, value in zip(self.parameters, values):
                parameter.set_data(value)
            self.values = values


class Blocks:
    """Runs a network's layers by way of the graphs of their kinds."""

    def __init__(self, network: nn.Cell):
        self.network = network
        self.kinds: dict[tuple, Kind] = {}
        self.keys: dict[int, tuple] = {}  # by a layer's id
        self.weights: dict[int, list[Tensor]] = {}  # by a layer's id

    def with_weights_of(self, layer: nn.Cell) -> Kind:
        """The layer's kind, which now holds the layer's weights."""
        if id(layer) not in self.keys:
            self.keys[id(layer)] = self.key(layer)
        key = self.keys[id(layer)]
        if key not in self.kinds:
            self.kinds[key] = self.new_kind(layer, list(layer.get_parameters()))
        if id(layer) not in self.weights:  # its own, in tensors that keep them while its parameters hold another's
            self.weights[id(layer)] = [Tensor.from_numpy(each.asnumpy()) for each in layer.get_parameters()]
        kind = self.kinds[key]
        kind.take(self.weights[id(layer)])
        return kind

    def key(self, layer: nn.Cell) -> tuple:
        return graph_key(layer)

    def new_kind(self, layer: nn.Cell, parameters: list[Parameter]) -> Kind:
        return Kind(layer, parameters)

    def run(self, layer: nn.Cell, *inputs: Tensor) -> Tensor:
        """The layer's output."""
        return self.with_weights_of(layer).layer(*inputs)


class BlockwiseUNet(Blocks):
    """Called like the UNet, with the same result."""

    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        net = self.network
        return net.read_out(walk(net, z, net.time_embed(t), context, self.run, join))


class BlockwiseText(Blocks):
    """Called like one of the text encoders, with the same result."""

    def __call__(self, ids: Tensor) -> Tensor:
        return encode(self.network, ids, self.run)
