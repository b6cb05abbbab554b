"""Exponential moving average of the weights, float32, updated in the graph that updates the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm import kernels
from ldm.errors import UserError
from ldm.networks.layers import set_values
from ldm.train.together import Together, copy_into, in_order


class Ema(nn.Cell):
    """A shadow of the weights: shadow <- d shadow + (1 - d) weights.

    d = min(decay, (1 + n) / (10 + n)) rises with the number n of updates, so that the untrained start is soon forgotten
    (as in CompVis's latent-diffusion).

    Args:
        params: the weights to follow; the shadow starts with their values.
        decay: d in the long run, in [0, 1).

    Attributes:
        updates: the number of updates made; the caller counts them.
        state: the shadow's tensors, each named "ema.<parameter's name>".
    """

    def __init__(self, params: Iterable[Parameter], decay: float = 0.9999):
        super().__init__(auto_prefix=False)
        self.check(decay)
        self.params = in_order(params)
        self.together = Together(self.params)
        self.shadow = self.together.few_parameters(self.params, "joined").clone("ema", "same")
        self.state = self.together.each(self.shadow, [f"ema.{param.name}" for param in self.params])
        for tensor in self.shadow:
            tensor.requires_grad = False
        self.decay = decay
        self.updates = 0
        self.swapped = False
        self.map, self.copy_into = ops.HyperMap(), copy_into
        self.fused = kernels.select().few_launches
        self.few = self.params

    def follow(self, few: ParameterTuple) -> None:
        """Read the small weights where the optimizer has them joined, if it has (`Optimizer.few`)."""
        if len(few) < len(self.params):
            assert [param.shape for param in few] == [shadow.shape for shadow in self.shadow]
            self.few = few

    @staticmethod
    def check(decay: float) -> None:
        """UserError for a decay outside [0, 1)."""
        if not 0 <= decay < 1:
            raise UserError(f"ema_decay is {decay}; give a number from 0 to below 1, such as 0.9999")

    def weight(self) -> float:
        """1 - d of the next update."""
        n = self.updates + 1
        return 1 - min(self.decay, (1 + n) / (10 + n))

    def construct(self, weight: Tensor):
        if not self.fused:
            return self.map(ops.partial(self.one, weight), self.shadow, self.params)
        new = self.map(ops.partial(self.mix, weight), self.shadow, self.few)
        return self.map(self.copy_into, self.shadow, new)

    def one(self, weight, shadow, param):
        return ops.assign_add(shadow, weight * (param.astype(ms.float32) - shadow))

    def mix(self, weight, shadow, param):
        return ops.lerp(shadow, param.astype(ms.float32), weight)

    def tensors(self) -> dict[str, np.ndarray]:
        """Copies of the averaged weights, under the parameters' own names."""
        return {param.name: shadow.asnumpy().copy() for param, shadow in zip(self.params, self.state)}

    def begin_anew(self) -> None:
        """Begin with the weights as they are."""
        self.updates = 0
        set_values(self.state, (param.asnumpy().copy() for param in self.params))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the network has the averaged weights; afterwards it has its own again, bit for bit.

        Training steps and resume states are refused inside, by an assertion.
        """
        own = [param.asnumpy().copy() for param in self.params]
        self.swapped = True
        try:
            set_values(self.params, (shadow.asnumpy().copy() for shadow in self.state))
            yield
        finally:
            set_values(self.params, own)
            self.swapped = False
