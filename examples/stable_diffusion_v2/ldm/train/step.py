"""One training step: gradients of one or more micro-batches and ranks, their norm, clipping, optimizer, average.

A step has two compiled graphs: value and gradients, and the update of all weights in place. Between them, the host
looks at the loss and the norm, so a NaN or an infinity never reaches the weights. With several ranks, a third graph
between the two adds up their gradients. The host decides from numbers that all ranks share, so their weights stay the
same bit for bit.

If gradients come layer by layer and no decision needs all of them (no clipping, no loss scale, one micro-batch, one
rank), each layer is updated as soon as its gradients are there. Only one layer's gradients exist at a time (arXiv
2306.09782).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm import kernels
from ldm.errors import UserError
from ldm.networks.layers import require_own, set_values
from ldm.parallel.ranks import Ranks
from ldm.train.ema import Ema
from ldm.train.gradients import LayerByLayer, WholeGraph
from ldm.train.optimizer import Optimizer
from ldm.train.together import NormOfFew


class LossScale:
    """A factor on the loss that keeps gradients from vanishing in half precision (arXiv 1710.03740, section 3.2).

    Args:
        value: the factor; 1 for float32 and bfloat16.
        window: the factor is doubled after so many good steps in a row and halved after a bad one; 0 keeps it.

    Raises:
        UserError: a factor that is not positive and finite, or a negative window.
    """

    def __init__(self, value: float = 1.0, window: int = 0):
        if not (0 < value < math.inf and window >= 0):
            raise UserError(
                f"init_loss_scale is {value}, scale_window {window}: above 0, and 0 or more; 65536, 1000 are usual"
            )
        self.value, self.window, self.good = value, window, 0

    def succeeded(self) -> None:
        self.good += 1
        if self.window and self.good >= self.window:
            self.value, self.good = self.value * 2, 0

    def overflowed(self) -> bool:
        """Halve the factor; False where it is fixed or at most 1."""
        if not self.window or self.value <= 1:
            return False
        self.value, self.good = self.value / 2, 0
        return True


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    loss: mean over the micro-batches and ranks. extras: means of the other outputs of the loss. grad_norm: global
    2-norm of the mean gradient before clipping. applied: False where an overflow only lowered the loss scale.
    """

    loss: float
    extras: tuple[float, ...]
    grad_norm: float
    applied: bool


class TrainStep:
    """The training step of a network.

    Args:
        loss: Cell, loss(*batch) -> (scalar to be minimized, further outputs...).
        optimizer: its parameters are trained.
        ema: follows the weights after each update.
        max_grad_norm: longer gradients are shortened to it; None leaves them.
        loss_scale: for half precision.
        ranks: they make the same steps, each with its own micro-batches, all of one size.
        gradients: of the loss, for the optimizer's parameters; by default by one graph.

    Attributes:
        kept: further tensors that the caller changes between steps; they are saved with the others.
    """

    def __init__(
        self,
        loss: nn.Cell,
        optimizer: Optimizer,
        ema: Ema | None = None,
        max_grad_norm: float | None = None,
        loss_scale: LossScale | None = None,
        ranks: Ranks | None = None,
        gradients: WholeGraph | LayerByLayer | None = None,
    ):
        self.check(max_grad_norm)
        require_own(optimizer.params)
        self.optimizer, self.ema, self.ranks = optimizer, ema, ranks or Ranks()
        self.kept: tuple[Parameter, ...] = ()
        self.max_grad_norm = max_grad_norm or math.inf
        self.loss_scale = loss_scale or LossScale()
        self.batch_names = tuple(inspect.signature(loss.construct).parameters)
        self.gradients = gradients or WholeGraph(loss, optimizer.params)
        self.norm = NormOfFew(optimizer.params) if kernels.select().few_launches else GlobalNorm()
        self.update = _Update(optimizer, ema)
        if ema:
            ema.follow(optimizer.few)
        self.sum_of_ranks = _SumOfRanks() if self.ranks.size > 1 else None
        wait = max_grad_norm is not None or loss_scale is not None or self.ranks.size > 1 or not optimizer.separable
        self.by_layers = self.gradients.layer_by_layer and not wait

    @staticmethod
    def check(max_grad_norm: float | None) -> None:
        """UserError for a norm that is not above 0."""
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {max_grad_norm}; give a number above 0, or switch clip_grad off")

    def __call__(self, micro_batches: Sequence[tuple[Tensor, ...]], lr: float, step: int) -> StepResult:
        """Update the weights with the mean gradient of the micro-batches, each the arguments of the loss.

        Raises:
            UserError: the loss or a gradient is not finite. It names ``step`` and the first such tensor. Weights,
                moving average and optimizer stay as they were, unless the bad gradient came layer by layer.
        """
        assert not (self.ema and self.ema.swapped), "a training step while the moving average is in the network"
        if self.by_layers and len(micro_batches) == 1:
            return self._step_by_layers(micro_batches[0], lr, step)
        scale = Tensor(self.loss_scale.value, ms.float32)
        outputs, grads = [], None
        for batch in micro_batches:
            output, grads = self.gradients(scale, *batch, onto=grads)
            outputs.append([value.asnumpy().mean(dtype=np.float64) for value in output])
        own = np.mean(outputs, axis=0).tolist()
        loss, *extras = np.mean(self.ranks.gather("loss", own), axis=0).tolist()  # now all have their gradients
        if self.sum_of_ranks:
            grads = self.sum_of_ranks(*grads)
        unscale = 1 / (self.loss_scale.value * len(micro_batches) * self.ranks.size)
        norm = self.ranks.broadcast("norm", float(self.norm(*grads).asnumpy()) * unscale)
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            self._apply(grads, unscale * min(1.0, self.max_grad_norm / (norm + 1e-6)), lr)
        elif not (math.isfinite(loss) and self.loss_scale.overflowed()):  # a lower scale does not mend the loss itself
            found = self.ranks.gather("NaN", _first_bad(self._tensors(micro_batches, loss, grads)))
            _, bad = min((one for one in found if one), default=(0, "the gradients' norm, of finite gradients"))
            raise _diverged(step, bad, "the weights are those before this step")
        return StepResult(loss, tuple(extras), norm, applied)

    def _step_by_layers(self, batch: tuple[Tensor, ...], lr: float, step: int) -> StepResult:
        one = Tensor(1.0, ms.float32)
        outputs, layers = self.gradients.layers(one, *batch)
        loss, *extras = (value.asnumpy().mean(dtype=np.float64) for value in outputs)
        if not math.isfinite(loss):
            _, bad = _first_bad(self._tensors([batch], loss, ()))
            raise _diverged(step, bad, "the weights are those before this step")
        scalars, squares = [Tensor(x, ms.float32) for x in self.optimizer.scalars(lr)], 0.0
        for params, grads in layers:
            of_layer = [_square_sum(grad.asnumpy()) for grad in grads]
            squares += sum(of_layer)
            if not math.isfinite(squares):
                bad = next(param.name for param, square in zip(params, of_layer) if not math.isfinite(square))
                raise _diverged(step, f"the gradient of {bad}", "what was saved before is good")
            for param, grad in zip(params, grads):
                self.optimizer.update(param, one, scalars, grad)
        if self.ema:
            self.ema(Tensor(self.ema.weight(), ms.float32))
        self._count()
        return StepResult(loss, tuple(extras), math.sqrt(squares), True)

    def variables(self) -> dict[str, Parameter]:
        """Every tensor that training changes, by name: weights, moving average, optimizer state."""
        assert not (self.ema and self.ema.swapped), "the weights are not the network's own now"
        averages = self.ema.state if self.ema else ()
        return {v.name: v for v in (*self.optimizer.params, *self.optimizer.state, *averages, *self.kept)}

    def counters(self) -> dict[str, float]:
        """Every number that training changes."""
        return {
            "updates": self.optimizer.updates,
            "ema_updates": self.ema.updates if self.ema else 0,
            "loss_scale": self.loss_scale.value,
            "good_in_a_row": self.loss_scale.good,
        }

    def set_counters(self, counters: dict[str, float]) -> None:
        """The inverse of ``counters``."""
        self.optimizer.updates = counters["updates"]
        if self.ema:
            self.ema.updates = counters["ema_updates"]
        self.loss_scale.value, self.loss_scale.good = counters["loss_scale"], counters["good_in_a_row"]

    def begin_anew(self) -> None:
        """Go on from these weights as from a start: with their averages where there are some, an optimizer that has
        seen no gradient, and new averages."""
        if self.ema:
            averages = self.ema.tensors()
            set_values(self.optimizer.params, (averages[param.name] for param in self.optimizer.params))
            self.ema.begin_anew()
        self.optimizer.begin_anew()

    def _apply(self, grads: tuple[Tensor, ...], factor: float, lr: float) -> None:
        scalars = (factor, self.ema.weight() if self.ema else 0.0, *self.optimizer.scalars(lr))
        self.optimizer.collect()
        self.update(Tensor(scalars, ms.float32), *grads)
        self._count()

    def _count(self) -> None:
        self.loss_scale.succeeded()
        self.optimizer.updates += 1
        if self.ema:
            self.ema.updates += 1

    def _tensors(self, micro_batches, loss, grads) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors of a step with their names, in the order in which they are computed."""
        for batch in micro_batches:
            names = (*self.batch_names, *self.batch_names[-1:] * len(batch))  # the last name may stand for several
            yield from ((f"the input '{name}'", x.asnumpy()) for name, x in zip(names, batch))
        yield from ((f"the weights {param.name}", param.asnumpy()) for param in self.optimizer.params)
        yield "the loss", loss
        yield from ((f"the gradient of {p.name}", g.asnumpy()) for p, g in zip(self.optimizer.params, grads))


def _diverged(step: int, bad: str, left: str) -> UserError:
    return UserError(
        f"step {step}: training has diverged, first NaN or infinity in {bad}; {left}; lower the learning rate, or set "
        "clip_grad"
    )


def _square_sum(x: np.ndarray) -> float:
    """The sum of squares: of each row in float32, of all rows in float64."""
    return math.fsum(float(np.vdot(row, row)) for row in (x if x.ndim > 1 else x[None]))


def _first_bad(tensors: Iterable[tuple[str, np.ndarray]]) -> tuple[int, str] | None:
    """(place in the order, name) of the first tensor with a NaN or an infinity; None without one."""
    return next(((n, name) for n, (name, x) in enumerate(tensors) if not np.isfinite(x).all()), None)


class _SumOfRanks(nn.Cell):
    """Sums of tensors over the ranks. One packed tensor took twice as long on a CPU, and the memory again."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.map, self.sum = ops.HyperMap(), ops.AllReduce()

    def construct(self, *tensors):
        return self.map(self.sum, tensors)


class GlobalNorm(nn.Cell):
    """Global 2-norm, scalar float32.

    Rows are summed first: a sum over all axes at once is five to ten times slower on a CPU. MindSpore's own ops.L2Loss
    adds one number after the other and loses 2 % of ten million (15 % of fifty).
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.map = ops.HyperMap()

    def construct(self, *tensors):
        return ops.sqrt(ops.addn(self.map(self.square_sum, tensors)))

    def square_sum(self, x):
        x = x.astype(ms.float32).reshape(x.shape[0] if x.ndim > 1 else 1, -1)
        return (x * x).sum(-1).sum()


class _Update(nn.Cell):
    """Update in place: ([factor on the gradients, weight of the average, scalars of the optimizer...], *gradients).

    The scalars come as one tensor, the gradients unpacked: a tuple would be a constant of the compiled graph.
    """

    def __init__(self, optimizer: Optimizer, ema: Ema | None):
        super().__init__(auto_prefix=False)
        self.optimizer, self.ema = optimizer, ema

    def construct(self, scalars, *grads):
        scale, weight, *others = ops.unstack(scalars)
        done = self.optimizer(scale, others, grads)
        if self.ema is not None:
            done = done, self.ema(weight)
        return ops.depend(scale, done)
