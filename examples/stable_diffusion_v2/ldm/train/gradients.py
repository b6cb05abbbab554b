"""The gradients of a loss, in one of two ways: one graph for the whole network, or a graph for each kind of layer.

Both are called alike: (loss scale, *batch, onto=None) -> (outputs of the loss, gradients of the scaled loss). The
gradients follow the order of the trained parameters. `onto`, the gradients of the last call, is added to them.

On a CPU, one graph holds the activations of all layers at once, even with recomputation. Layer by layer, only the
layers' inputs are kept. In the backward pass, a graph for each kind of layer runs the layer again, forwards and
backwards (arXiv 1604.06174, section 4). The graphs are small and few, so they compile fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.diffusion.loss import DiffusionLoss
from ldm.networks.blockwise import Blocks, Kind
from ldm.networks.unet import Embed, add_back, in_parts, join, walk

Outputs = tuple[Tensor, ...]
Entries = list["Ran | Joined | Added"]
OfLayer = tuple[Sequence[Parameter], Sequence[Tensor]]  # parameters and their gradients


class WholeGraph:
    """The gradients of any loss by one graph.

    Args:
        loss: Cell, loss(*batch) -> (scalar to be minimized, further outputs...).
        params: the trained parameters.
    """

    layer_by_layer = False

    def __init__(self, loss: nn.Cell, params: Sequence[Parameter]):
        self.graph, self.sum = _ValueAndGradients(loss, params), _Sum()

    def __call__(self, scale: Tensor, *batch: Tensor, onto: tuple[Tensor, ...] | None = None) -> tuple[Outputs, tuple]:
        outputs, grads = self.graph(scale, *batch)
        return outputs, self.sum(*onto, *grads) if onto else grads


class _Scaled(nn.Cell):
    """(scaled loss, outputs of the loss)."""

    def __init__(self, loss: nn.Cell):
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, scale, *batch):
        outputs = self.loss(*batch)
        return outputs[0] * scale, outputs


class _ValueAndGradients(nn.Cell):
    def __init__(self, loss: nn.Cell, params: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.value_and_grad = ops.value_and_grad(_Scaled(loss), None, ParameterTuple(params), has_aux=True)

    def construct(self, scale, *batch):
        (_, outputs), grads = self.value_and_grad(scale, *batch)
        return outputs, grads


class _Sum(nn.Cell):
    """The sums of two lists of tensors; the arguments are the first list, then the second."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.map = ops.HyperMap()

    def construct(self, *both):
        half = len(both) // 2
        return self.map(ops.add, both[:half], both[half:])


class LayerByLayer(Blocks):
    """The gradients of a `DiffusionLoss` of a UNet, in little more memory than the weights take.

    Every call returns the same tensors: compiled graphs keep their last inputs, so new tensors would take the memory
    twice. `layers` needs no such tensors.

    Args:
        loss: of a UNet.
        params: the UNet's trained parameters. Other gradients are not computed, and the backward pass ends at the first
            layer with a trained parameter.
    """

    layer_by_layer = True

    def __init__(self, loss: DiffusionLoss, params: Sequence[Parameter]):
        super().__init__(loss.network)
        self.params, self.arrays, self.grads = params, {}, ()
        self.trained = {id(param) for param in params}
        net = loss.network
        self.embed, self.noisy = Embed(net), _Noisy(loss)
        self.head = _Head(self.embed, [each for layer in net.embeddings() for each in self.of_trained(layer)])
        self.tail = _Tail(loss, self.of_trained(net.out))

    def of_trained(self, layer: nn.Cell) -> list[Parameter]:
        """The layer's parameters that are trained."""
        return [param for param in layer.get_parameters() if id(param) in self.trained]

    def key(self, layer: nn.Cell) -> tuple:
        return (super().key(layer), tuple(id(param) in self.trained for param in layer.get_parameters()))

    def new_kind(self, layer: nn.Cell, parameters: list[Parameter]) -> Kind:
        kind = Kind(layer, parameters)
        kind.backward = _Backward(layer, self.of_trained(layer))
        return kind

    def __call__(self, scale: Tensor, *batch: Tensor, onto: tuple[Tensor, ...] | None = None) -> tuple[Outputs, tuple]:
        if not self.arrays:
            self.arrays = {id(param): np.empty(param.shape, np.float32) for param in self.params}
            self.grads = tuple(map(Tensor.from_numpy, self.arrays.values()))
        assert onto is None or onto is self.grads
        outputs, layers = self.layers(scale, *batch)
        for params, grads in layers:
            for param, grad in zip(params, grads):
                array, new = self.arrays[id(param)], grad.asnumpy()
                array[...] = array + new if onto else new
        return outputs, self.grads

    def layers(
        self, scale: Tensor, latents: Tensor, eps: Tensor, t: Tensor, weight: Tensor, context: Tensor, *told: Tensor
    ) -> tuple[Outputs, Iterator[OfLayer]]:
        """(outputs of the loss, the backward pass: (parameters, gradients) of one layer after the other, last first).

        Every trained parameter comes once, and the caller may change it at once. The backward pass must be run to its
        end.
        """
        self.weights.clear()  # parameters may have other memory now, for example after validation with the average
        emb, tape = self.embed(t, *told), Tape(self.run)
        run = in_parts(tape.run, tape.add_back)
        h = walk(self.network, self.noisy(latents, eps, t), emb, context, run, tape.join)
        (_, outputs), (dh, of_tail) = self.tail(h, scale, latents, eps, t, weight)
        return outputs, self.way_back(tape.entries, dh, of_tail, (t, *told), emb, context)

    def way_back(self, entries: Entries, dh: Tensor, of_tail, told, emb, context) -> Iterator[OfLayer]:
        """The backward pass over the tape's entries, from the gradient `dh` of the last layer's output."""
        yield self.tail.weights, of_tail
        demb, of_skips = ops.zeros_like(emb), {}  # gradients of skips, by the number of the entry that made the skip
        for number in reversed(range(self.first_needed(entries), len(entries))):
            entry = entries.pop()
            if number in of_skips:
                dh = dh + of_skips.pop(number)
            if isinstance(entry, Joined):
                of_skips[entry.source], dh = dh[:, entry.width :], dh[:, : entry.width]
            elif isinstance(entry, Added):
                of_skips[entry.source], dh = dh, ops.reshape(dh, entry.shape)
            else:
                (dh, part, _), grads = self.with_weights_of(entry.layer).backward(entry.h, emb, context, dh)
                demb = demb + part
                yield self.of_trained(entry.layer), grads
        if self.head.weights:
            yield self.head.weights, self.head(demb, *told)
        self.give_back()  # the optimizer updates the layers' parameters

    def first_needed(self, entries: Entries) -> int:
        """The entry where the backward pass ends: no layer before it has a trained parameter."""
        if self.head.weights:
            return 0
        trained = (n for n, entry in enumerate(entries) if isinstance(entry, Ran) and self.of_trained(entry.layer))
        return next(trained, len(entries))


class Ran(NamedTuple):
    """A layer that has run, and its input."""

    layer: nn.Cell
    h: Tensor


class Joined(NamedTuple):
    """A join of h, `width` channels wide, and the skip that entry number `source` made."""

    width: int
    source: int


class Added(NamedTuple):
    """A sum of what entry number `source` made and the entry before, which has this shape."""

    source: int
    shape: tuple[int, ...]


class Tape:
    """A record of `walk`'s forward pass. It holds the layers' inputs and no other tensors."""

    def __init__(self, run: Callable[..., Tensor]):
        self.entries: Entries = []
        self.makers: dict[int, int] = {}  # numbers of entries, by the ids of their outputs; skips live until the end
        self.run_layer = run

    def run(self, layer: nn.Cell, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        output = self.run_layer(layer, h, emb, context)
        self.makers[id(output)] = len(self.entries)
        self.entries.append(Ran(layer, h))
        return output

    def join(self, h: Tensor, skip: Tensor) -> Tensor:
        self.entries.append(Joined(h.shape[1], self.makers[id(skip)]))
        return join(h, skip)

    def add_back(self, h: Tensor, x: Tensor) -> Tensor:
        output = add_back(h, x)
        source = self.makers[id(h)]
        self.makers[id(output)] = len(self.entries)
        self.entries.append(Added(source, x.shape))
        return output


class _Backward(nn.Cell):
    """(h, emb, context, gradient of the output) -> (gradients of the first three, of the trained parameters)."""

    def __init__(self, layer: nn.Cell, params: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.layer, self.weights = layer, ParameterTuple(params)
        self.grad = ops.GradOperation(get_all=True, get_by_list=bool(params), sens_param=True)

    def construct(self, h, emb, context, dout):
        if self.weights:
            return self.grad(self.layer, self.weights)(h, emb, context, dout)
        return self.grad(self.layer)(h, emb, context, dout), ()


class _Head(nn.Cell):
    """(gradient of the embedding, t, further inputs of it) -> gradients of its trained parameters, if there are any."""

    def __init__(self, embed: nn.Cell, params: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.embed, self.weights = embed, ParameterTuple(params)
        self.grad = ops.GradOperation(get_by_list=True, sens_param=True)

    def construct(self, demb, *told):
        return self.grad(self.embed, self.weights)(*told, demb)


class _Noisy(nn.Cell):
    def __init__(self, loss: DiffusionLoss):
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, latents, eps, t):
        return self.loss.noisy(latents, eps, t)


class _LossOfOutput(nn.Cell):
    """(scaled loss, outputs of the loss), from the last layer's output."""

    def __init__(self, loss: DiffusionLoss):
        super().__init__(auto_prefix=False)
        self.loss, self.network = loss, loss.network

    def construct(self, h, scale, latents, eps, t, weight):
        outputs = self.loss.compare(self.network.read_out(h), latents, eps, t, weight)
        return outputs[0] * scale, outputs


class _Tail(nn.Cell):
    """((scaled loss, outputs of the loss), (gradient of h, gradients of the trained parameters))."""

    def __init__(self, loss: DiffusionLoss, params: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(params)
        self.value_and_grad = ops.value_and_grad(_LossOfOutput(loss), 0, self.weights or None, has_aux=True)

    def construct(self, h, scale, latents, eps, t, weight):
        if self.weights:
            return self.value_and_grad(h, scale, latents, eps, t, weight)
        outputs, dh = self.value_and_grad(h, scale, latents, eps, t, weight)
        return outputs, (dh, ())
