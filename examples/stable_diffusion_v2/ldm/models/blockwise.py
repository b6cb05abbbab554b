"""Networks compiled block by block: for drawing with large ones, whose compilation takes longer than some steps.

SD's UNet has 16 transformers and 22 residual blocks, but only 4 and 14 that differ in shape, its text encoder 23 equal
blocks. As one graph all are compiled, and compiling takes memory that grows along. Here one layer of each kind is
compiled, and runs with the weights of each of its kind in turn, whose memory is shared, not copied.

The weights must stay as they are while these are in use, and the networks must not be asked for them. Training has its
own (ldm/train/blockwise.py).
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from ldm.kernels import concat_channels

MANY_WEIGHTS = 50_000_000  # larger networks gain by it; in smaller ones it costs a few percent of a step


class Kind:
    """A layer whose graph serves all layers of its shapes."""

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
        self.weights: dict[int, tuple[Kind, list[Tensor]]] = {}  # by a layer's id

    def kind(self, layer: nn.Cell) -> Kind:
        """The layer's kind, with the layer's weights."""
        if id(layer) not in self.weights:
            parameters = list(layer.get_parameters())
            shapes = (type(layer), *(parameter.shape for parameter in parameters))
            if shapes not in self.kinds:
                self.kinds[shapes] = self.new_kind(layer, parameters)
            # The layer's own weights, in tensors that keep them while its parameters hold another's.
            self.weights[id(layer)] = (
                self.kinds[shapes],
                [Tensor.from_numpy(parameter.asnumpy()) for parameter in parameters],
            )
        kind, values = self.weights[id(layer)]
        kind.take(values)
        return kind

    def new_kind(self, layer: nn.Cell, parameters: list[Parameter]) -> Kind:
        return Kind(layer, parameters)

    def run(self, layer: nn.Cell, *inputs: Tensor) -> Tensor:
        """The layer's output."""
        return self.kind(layer).layer(*inputs)


class BlockwiseUNet(Blocks):
    """Called like the UNet, with the same result."""

    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        net = self.network
        emb = net.time_embed(t)
        h, skips = z, []
        for stage in net.input_blocks:
            for layer in stage:
                h = self.run(layer, h, emb, context)
            skips.append(h)
        for layer in net.middle_block:
            h = self.run(layer, h, emb, context)
        for stage in net.output_blocks:
            h = concat_channels((h, skips.pop()))
            for layer in stage:
                h = self.run(layer, h, emb, context)
        return net.out(h).astype(ms.float32)


class BlockwiseText(Blocks):
    """Called like one of the text encoders, with the same result."""

    def __call__(self, ids: Tensor) -> Tensor:
        embed, blocks, norm = self.network.stages()
        x = embed(ids)
        for block in blocks:
            x = self.run(block, x, self.network.mask)
        return norm(x)
