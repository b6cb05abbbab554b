"""Networks compiled block by block: for drawing with large networks, whose compilation takes longer than some steps.

SD's UNet has 16 transformers and 22 residual blocks, but only 4 and 14 different ones. Its text encoder has 23 equal
blocks. One graph would compile all of them, and the memory for it would grow with them. Here one layer of each kind is
compiled. It takes the weights of each layer of its kind in turn, whose memory is shared, not copied. Weights of half
the width stay in their file, and become float32 for as long as a layer of their kind has them.

While these classes are in use, weights must not change, and the networks' parameters must not be read. Training has its
own subclass (ldm/train/gradients.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops import Primitive

from ldm.checkpoint.arrays import widened
from ldm.networks.text import TextEncoders, both, encode
from ldm.networks.unet import Embed, UNet, add_back, in_parts, join, parts_of, walk

MANY_WEIGHTS = 50_000_000  # larger networks gain by going block by block; smaller ones lose a few percent of a step
_OF_EVERY_CELL = frozenset(vars(nn.Cell()))


def graph_key(layer: nn.Cell) -> tuple:
    """Everything that decides a layer's graph, without its parameters' values: layers of one key can share a graph."""
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


def layers_of(network: nn.Cell) -> Iterator[nn.Cell]:
    """The layers of a UNet or of text encoders that are run one by one."""
    if isinstance(network, UNet):
        for stage in (*network.input_blocks, network.middle_block, *network.output_blocks):
            for layer in stage:
                yield from parts_of(layer)
    elif isinstance(network, TextEncoders):
        yield from (*network.first.blocks(), *network.second.blocks())
    else:
        yield from network.blocks()


def lent_parameters(*networks: nn.Cell | None) -> set[int]:
    """The ids of the parameters of these layers. Their values may stay in a file, in its own type, as `stored`."""
    layers = (layer for network in networks if network for layer in layers_of(network))
    return {id(parameter) for layer in layers for parameter in layer.get_parameters()}


def weights_of(parameter: Parameter) -> Tensor | np.ndarray:
    """A parameter's values: its stored ones, or else a tensor of the same memory."""
    stored = getattr(parameter, "stored", None)
    return Tensor.from_numpy(parameter.asnumpy()) if stored is None else stored


class Kind:
    """A layer whose graph serves all layers of its key."""

    def __init__(self, layer: nn.Cell, parameters: list[Parameter]):
        self.layer, self.parameters, self.values = layer, parameters, None
        self.buffers: dict[int, tuple[np.ndarray, Tensor]] = {}  # by a parameter's number; both are the same memory

    def take(self, values: list[Tensor | np.ndarray]) -> None:
        """Give the layer these weights; arrays of another type, which lie in a file, become float32 here."""
        if self.values is not values:
            for number, (parameter, value) in enumerate(zip(self.parameters, values)):
                parameter.set_data(value if isinstance(value, Tensor) else self.as_float32(number, value))
            self.values = values

    def as_float32(self, number: int, stored: np.ndarray) -> Tensor:
        """The array in the buffer of this parameter. New memory for each layer would leave gaps that nothing fits."""
        if number not in self.buffers:
            array = np.empty(stored.shape, np.float32)
            self.buffers[number] = array, Tensor.from_numpy(array)
        array, tensor = self.buffers[number]
        np.copyto(array, widened(stored))
        return tensor


class Blocks:
    """Runs a network's layers by the graphs of their kinds."""

    def __init__(self, network: nn.Cell):
        self.network = network
        self.kinds: dict[tuple, Kind] = {}
        self.keys: dict[int, tuple] = {}  # by a layer's id
        self.weights: dict[int, list[Tensor | np.ndarray]] = {}  # by a layer's id

    def with_weights_of(self, layer: nn.Cell) -> Kind:
        """The layer's kind, which now holds the layer's weights."""
        if id(layer) not in self.keys:
            self.keys[id(layer)] = self.key(layer)
        key = self.keys[id(layer)]
        if key not in self.kinds:
            self.kinds[key] = self.new_kind(layer, list(layer.get_parameters()))
        if id(layer) not in self.weights:  # tensors that keep them while its parameters hold another layer's
            self.weights[id(layer)] = [weights_of(each) for each in layer.get_parameters()]
        kind = self.kinds[key]
        kind.take(self.weights[id(layer)])
        return kind

    def give_back(self) -> None:
        """Give every layer its own weights again."""
        for kind in self.kinds.values():
            self.with_weights_of(kind.layer)

    def key(self, layer: nn.Cell) -> tuple:
        return graph_key(layer)

    def new_kind(self, layer: nn.Cell, parameters: list[Parameter]) -> Kind:
        return Kind(layer, parameters)

    def run(self, layer: nn.Cell, *inputs: Tensor) -> Tensor:
        """The layer's output."""
        return self.with_weights_of(layer).layer(*inputs)


class BlockwiseUNet(Blocks):
    """Called like the UNet, with the same result."""

    def __init__(self, network: UNet):
        super().__init__(network)
        self.embed = Embed(network)

    def __call__(self, z: Tensor, t: Tensor, context: Tensor, *told: Tensor) -> Tensor:
        net = self.network
        return net.read_out(walk(net, z, self.embed(t, *told), context, in_parts(self.run, add_back), join))


class BlockwiseText(Blocks):
    """Called like the text encoders, with the same result."""

    def __call__(self, ids: Tensor) -> tuple[Tensor, ...]:
        net = self.network
        if isinstance(net, TextEncoders):
            return both(*(encode(each, ids[:, n], self.run) for n, each in enumerate((net.first, net.second))))
        return encode(net, ids, self.run)
