"""The UNet's gradients layer by layer: for large ones on a CPU, in little more memory than their weights take.

As one graph, MindSpore's CPU runtime holds the activations of all layers at once, even where they are to be recomputed.
Here every layer keeps its input alone; on the way back a graph for each kind of layer runs it again, forwards and
backwards (arXiv 1604.06174, section 4). The graphs are small and few, so they are soon compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.diffusion.loss import DiffusionLoss
from ldm.kernels import concat_channels
from ldm.models.blockwise import Blocks, Kind


class TrainedKind(Kind):
    """A layer with its backward pass, both for all layers of its shapes."""

    def __init__(self, layer: nn.Cell, parameters: list[Parameter]):
        super().__init__(layer, parameters)
        self.backward = _Backward(layer, parameters)


class BlockwiseGradients(Blocks):
    """(loss scale, latents, context, eps, t) -> (outputs of the loss, gradients of the scaled loss), for `TrainStep`.

    The gradients are always the same tensors, written anew or, where `add`, added to: compiled graphs keep their last
    inputs, so that those of two steps would be held. `layers` does without them.

    Args:
        loss: of a UNet.
        params: the UNet's parameters that are trained; the others' gradients are let go as they come.
    """

    def __init__(self, loss: DiffusionLoss, params: Sequence[Parameter]):
        super().__init__(loss.network)
        self.params, self.arrays, self.grads = params, {}, ()
        self.trained = {id(param) for param in params}
        self.noisy, self.head, self.tail = _Noisy(loss), _Head(loss.network.time_embed), _Tail(loss)

    def new_kind(self, layer: nn.Cell, parameters: list[Parameter]) -> Kind:
        return TrainedKind(layer, parameters)

    def __call__(self, scale: Tensor, latents: Tensor, context: Tensor, eps: Tensor, t: Tensor, add: bool = False):
        if not self.arrays:
            self.arrays = {id(param): np.empty(param.shape, np.float32) for param in self.params}
            self.grads = tuple(map(Tensor.from_numpy, self.arrays.values()))
        outputs, layers = self.layers(scale, latents, context, eps, t)
        for params, grads in layers:
            for param, grad in zip(params, grads):
                array = self.arrays[id(param)]
                array[...] = array + grad.asnumpy() if add else grad.asnumpy()
        return outputs, self.grads

    def layers(
        self, scale: Tensor, latents: Tensor, context: Tensor, eps: Tensor, t: Tensor
    ) -> tuple[tuple[Tensor, ...], Iterator[tuple[Sequence[Parameter], Sequence[Tensor]]]]:
        """(outputs of the loss, the way back): parameters with their gradients, layer by layer from the last on.

        Every trained parameter comes once and may be changed as soon as it has come. The way back must be gone to its
        end.
        """
        self.weights.clear()  # the parameters may have got other memory since, as by the moving average's validation
        net = self.network
        emb, h = self.head.time_embed(t), self.noisy(latents, eps, t)
        inputs, widths, skips = [], [], []  # of the layers, of h before a skip joins it, the skips themselves

        def forward(layer: nn.Cell, h: Tensor) -> Tensor:
            inputs.append(h)
            return self.run(layer, h, emb, context)

        for stage in net.input_blocks:
            for layer in stage:
                h = forward(layer, h)
            skips.append(h)
        for layer in net.middle_block:
            h = forward(layer, h)
        for stage in net.output_blocks:
            widths.append(h.shape[1])
            h = concat_channels((h, skips.pop()))
            for layer in stage:
                h = forward(layer, h)

        (_, outputs), (dh, of_tail) = self.tail(h, scale, latents, eps, t)

        def way_back():
            nonlocal dh
            yield self.of_trained(self.tail.weights, of_tail)
            demb = ops.zeros_like(emb)
            stages = (*net.input_blocks, net.middle_block, *net.output_blocks)
            for place in reversed(range(len(stages))):
                if place < len(net.input_blocks):
                    dh = dh + skips.pop()
                for layer in reversed(stages[place]):
                    (dh, part, _), of_layer = self.kind(layer).backward(inputs.pop(), emb, context, dh)
                    demb = demb + part
                    yield self.of_trained(layer.get_parameters(), of_layer)
                if place > len(net.input_blocks):
                    width = widths.pop()
                    skips.append(dh[:, width:])
                    dh = dh[:, :width]
            yield self.of_trained(self.head.weights, self.head(t, demb))
            for kind in self.kinds.values():  # whose parameters the optimizer moves
                self.kind(kind.layer)

        return outputs, way_back()

    def of_trained(self, params: Iterable[Parameter], grads: Iterable[Tensor]) -> tuple[list[Parameter], list[Tensor]]:
        """Without those that are not trained."""
        pairs = [(param, grad) for param, grad in zip(params, grads) if id(param) in self.trained]
        return [param for param, _ in pairs], [grad for _, grad in pairs]


class _Backward(nn.Cell):
    """(h, emb, context, gradient of the output) -> gradients of (h, emb, context), of the parameters."""

    def __init__(self, layer: nn.Cell, params: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.layer, self.weights = layer, ParameterTuple(params)
        self.grad = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, h, emb, context, dout):
        return self.grad(self.layer, self.weights)(h, emb, context, dout)


class _Head(nn.Cell):
    """(t, gradient of the time embedding) -> gradients of its parameters."""

    def __init__(self, time_embed: nn.Cell):
        super().__init__(auto_prefix=False)
        self.time_embed, self.weights = time_embed, ParameterTuple(time_embed.get_parameters())
        self.grad = ops.GradOperation(get_by_list=True, sens_param=True)

    def construct(self, t, demb):
        return self.grad(self.time_embed, self.weights)(t, demb)


class _Noisy(nn.Cell):
    def __init__(self, loss: DiffusionLoss):
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, latents, eps, t):
        return self.loss.noisy(latents, eps, t)


class _Loss(nn.Cell):
    """From the last layer's output: (scaled loss, outputs of the loss)."""

    def __init__(self, loss: DiffusionLoss):
        super().__init__(auto_prefix=False)
        self.loss, self.out = loss, loss.network.out

    def construct(self, h, scale, latents, eps, t):
        outputs = self.loss.compare(self.out(h).astype(ms.float32), latents, eps, t)
        return outputs[0] * scale, outputs


class _Tail(nn.Cell):
    """((scaled loss, outputs of the loss), (gradient of h, gradients of the parameters))."""

    def __init__(self, loss: DiffusionLoss):
        super().__init__(auto_prefix=False)
        self.weights = ParameterTuple(loss.network.out.get_parameters())
        self.value_and_grad = ops.value_and_grad(_Loss(loss), 0, self.weights, has_aux=True)

    def construct(self, h, scale, latents, eps, t):
        return self.value_and_grad(h, scale, latents, eps, t)
