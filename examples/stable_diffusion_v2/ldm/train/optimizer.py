"""Optimizers as cells: each call updates all parameters in place.

The host computes in float64 what depends on the number of updates (learning rate, bias correction), and passes it to
the compiled graph as scalars. So nothing is compiled twice, and a resumed run continues exactly.

AdamW is Loshchilov & Hutter's (arXiv 1711.05101, algorithm 2) with the bias corrections of Adam (arXiv 1412.6980,
algorithm 1), which ``mindspore.nn.AdamWeightDecay`` leaves out. Weight decay is for matrices and convolutions only:
parameters with fewer than two dimensions (biases, norms) get none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.errors import UserError
from ldm.networks.layers import set_values
from ldm.train.together import Gather, Together, copy_into, in_order

PART_BYTES = 256 * 2**20  # of parameters updated at once; the scaled gradients of more would fill the memory


def parts(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive parts, each as long as its sum is at most `most`; a larger size stands alone."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield start, i
            start, total = i, 0
        total += size
    if sizes:
        yield start, len(sizes)


def check_numbers(betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0) -> None:
    """UserError for numbers that no optimizer can work with."""
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
        raise UserError(f"betas are {list(betas)} and eps is {eps}; betas must be in [0, 1), eps above 0")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay is {weight_decay}; give 0 or more")


class Optimizer(nn.Cell):
    """What all optimizers share. A subclass names its state tensors and writes one parameter's update.

    Args:
        params: the parameters to update. The gradients follow the order of the attribute `params`.
        betas: the share of each running mean that stays at an update.
        eps: is added to divisors, which may be near 0.
        weight_decay: for parameters of two and more dimensions.

    Attributes:
        updates: the number of updates made; the caller counts them.
        state: the tensors to save and restore, each named "<prefix>.<parameter's name>".
        separable: whether a parameter can be updated alone, by its own gradient.
        few: what is updated: the parameters, or the large ones and a copy of all small ones behind them (`collect`).
    """

    prefixes: tuple[str, ...]
    separable = True

    def __init__(self, params: Iterable[Parameter], betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(auto_prefix=False)
        check_numbers(betas, eps, weight_decay)
        self.params = in_order(params)
        self.together = Together(self.params)
        self.few = self.together.few_parameters(self.params, "joined")
        self.small = ParameterTuple(self.params[self.together.first :])
        self.gather = Gather(self.small, self.few[-1]) if self.small else None
        self.separable = self.separable and not self.small
        self.state: list = []
        self.slots = tuple(self.new_slot(prefix, self.few) for prefix in self.prefixes)
        self.decayed = tuple(weight_decay > 0 and param.ndim >= 2 for param in self.few)
        self.weight_decay = weight_decay
        self.updates = 0
        self.map, self.copy_into = ops.HyperMap(), copy_into
        self.parts = tuple(parts([4 * param.size for param in self.few], PART_BYTES))
        self.places = {id(param): place for place, param in enumerate(self.few)}

    def new_slot(self, prefix: str, few: ParameterTuple) -> ParameterTuple:
        """A state tensor of zeros for each of these; they are the last of `self.few`."""
        slot = few.clone(prefix, "zeros")
        for tensor in slot:
            tensor.requires_grad = False
        names = [param.name for param in (*(few[:-1] if self.small else few), *self.small)]
        self.state += self.together.each(slot, [f"{prefix}.{name}" for name in names])
        return slot

    def scalars(self, lr: float) -> tuple[float, ...]:
        """The numbers that ``construct`` needs for the next update, at the learning rate ``lr``."""
        raise NotImplementedError

    def construct(self, scale: Tensor, scalars: tuple, grads: tuple):
        """Update the parameters with ``scale * grads``. ``scalars`` come from ``self.scalars``, as float32."""
        done = self.update_few(scale, scalars, self.together.few(grads))
        if not self.small:
            return done
        return done, self.map(self.copy_into, self.small, self.together.small(self.few[-1]))

    def collect(self) -> None:
        """Bring the copy of the small parameters up to date, before an update; somebody may have set them.

        It is a graph of its own. In the graph that writes to them, MindSpore would copy each before it is read.
        """
        if self.small:
            self.gather()

    def update_few(self, scale, scalars, grads):
        """Update `self.few` with gradients of their shapes."""
        done, last = (), scale
        for start, end in self.parts:
            part = self.map(ops.partial(self.wait, last), grads[start:end])
            slots = [slot[start:end] for slot in self.slots]
            one = ops.partial(self.one, scale, scalars)
            last = self.map(one, self.decayed[start:end], self.few[start:end], *slots, part)
            done += last
        return done

    def begin_anew(self) -> None:
        """Forget all gradients."""
        self.updates = 0
        set_values(self.state, (np.zeros(tensor.shape, np.float32) for tensor in self.state))

    def wait(self, before, grad):
        return ops.depend(grad, before)

    def update(self, param: Parameter, scale: Tensor, scalars: Sequence[Tensor], grad: Tensor) -> None:
        """Update one parameter alone. Only for a `separable` optimizer."""
        place = self.places[id(param)]
        self.one(scale, scalars, self.decayed[place], param, *(slot[place] for slot in self.slots), grad)


class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    prefixes = ("adam_m", "adam_v")

    def __init__(self, params: Iterable[Parameter], betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, betas, eps, weight_decay)
        # The values in the kernel: 1 - float32(0.999) is 1.3e-5 off, and the bias correction must fit it.
        self.betas = tuple(float(np.float32(beta)) for beta in betas)
        self.eps = eps
        self.adamw = ops.AdamWeightDecay()  # without bias correction, which goes into its scalars
        self.zero, self.beta1, self.beta2 = (Tensor(x, ms.float32) for x in (0.0, *self.betas))

    def scalars(self, lr: float) -> tuple[float, ...]:
        t = self.updates + 1
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**t)
        # lr (m / (1 - beta1^t) / (sqrt(v) / root + eps) + decay w), multiplied out to fit the kernel's
        # lr (m / (sqrt(v) + eps) + decay w)
        larger = root / (1 - beta1**t)
        return lr * larger, self.eps * root, self.weight_decay / larger

    def one(self, scale, scalars, decayed, param, m, v, grad):
        lr, eps, decay = scalars
        return self.adamw(param, m, v, lr, self.beta1, self.beta2, eps, decay if decayed else self.zero, scale * grad)


class Adam(AdamW):
    """Adam with the decay added to the gradient (L2 regularization)."""

    def one(self, scale, scalars, decayed, param, m, v, grad):
        lr, eps, _ = scalars
        grad = scale * grad
        if decayed:
            grad = grad + self.weight_decay * param
        return self.adamw(param, m, v, lr, self.beta1, self.beta2, eps, self.zero, grad)


class Muon(AdamW):
    """Orthogonalized momentum (Jordan 2024, https://kellerjordan.github.io/posts/muon) for matrices and convolutions,
    which are matrices [outputs, inputs * kernel]; AdamW for embeddings, norms and biases.

    Every update of a matrix [m, n] is 0.2 sqrt(max(m, n)) times a nearly orthogonal matrix. It is about as long as
    AdamW's (arXiv 2502.16982, equation 4), so both share a weight decay and a learning rate. From random weights, Muon
    needs a fraction of AdamW's steps, each slightly slower, and learning rates several times higher.
    """

    prefixes = ("momentum",)
    separable = False  # matrices of one size are orthogonalized together

    def __init__(self, params: Iterable[Parameter], betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, betas, eps, weight_decay)
        (momenta,) = self.slots
        self.matrix = tuple(param.ndim >= 2 and "embedding" not in param.name for param in self.few)
        others = ParameterTuple([p for p, matrix in zip(self.few, self.matrix) if not matrix])
        left = iter(self.new_slot("adam_v", others))
        # A matrix has none. Its momentum fills the place and is not read there.
        self.slots += (ParameterTuple([m if matrix else next(left) for m, matrix in zip(momenta, self.matrix)]),)
        self.groups = self.by_size()

    def by_size(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The places of all matrices, grouped by their shorter side, and inside a group by their longer side."""
        groups: dict[int, dict[int, list[int]]] = {}
        for i, (param, matrix) in enumerate(zip(self.few, self.matrix)):
            if matrix:
                m, n = sorted((len(param), param.size // len(param)))
                groups.setdefault(m, {}).setdefault(n, []).append(i)
        return tuple(tuple(map(tuple, shapes.values())) for shapes in groups.values())

    def scalars(self, lr: float) -> tuple[float, ...]:
        return (*super().scalars(lr), lr)

    def update_few(self, scale, scalars, grads):
        *adamw, lr = scalars
        one = ops.partial(self.one, scale, adamw)
        done = self.map(one, self.decayed, self.matrix, self.few, *self.slots, grads)
        for group in self.groups:
            stacks = ()
            for alike in group:
                wide = [done[i] if done[i].shape[0] <= done[i].shape[1] else done[i].swapaxes(0, 1) for i in alike]
                stacks += (ops.stack(wide),)
            for alike, updates in zip(group, orthogonalize(stacks)):
                length = lr * 0.2 * updates.shape[2] ** 0.5
                for i, update in zip(alike, ops.unstack(length * updates)):
                    lying = update if done[i].shape[0] <= done[i].shape[1] else update.swapaxes(0, 1)
                    ops.assign_sub(self.few[i], lying.reshape(self.few[i].shape))
        return done

    def one(self, scale, scalars, decayed, matrix, param, momentum, v, grad):
        """AdamW's update; for a matrix, decay it and return the momentum to be orthogonalized."""
        if not matrix:
            return super().one(scale, scalars, decayed, param, momentum, v, grad)
        if decayed:
            ops.assign_sub(param, scalars[0] * scalars[2] * param)
        grad = scale * grad
        momentum = ops.assign(momentum, MUON_MOMENTUM * momentum + grad)
        return (grad + MUON_MOMENTUM * momentum).reshape(param.shape[0], -1)  # Nesterov's


MUON_MOMENTUM = 0.95


def orthogonalize(stacks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Bring the singular values of matrices [k, m, n], with one m for all and n >= m, near 1 (between 0.7 and 1.2).

    Five steps of Jordan's Newton-Schulz iteration x <- (3.4445 - 4.775 G + 2.0315 G^2) x with G = x xT. The factors are
    polynomials of the first G, so they commute. Their product is computed on [m, m], for all matrices at once, and
    multiplied by x at the end.
    """
    gram = ops.concat([ops.matmul(x, x.swapaxes(1, 2)) for x in stacks])  # [sum of k, m, m]
    identity = ops.eye(gram.shape[1], gram.shape[1], gram.dtype)
    shrink = ops.rsqrt((gram * identity).sum(-1, keepdims=True).sum(-2, keepdims=True) + 1e-14)  # 1 / norm  [k, 1, 1]
    gram, product = gram * shrink * shrink, identity
    for step in range(5):
        factor = 3.4445 * identity - 4.775 * gram + 2.0315 * ops.matmul(gram, gram)
        product = ops.matmul(factor, product) if step else factor
        gram = ops.matmul(factor, ops.matmul(gram, factor)) if step < 4 else gram
    factors = ops.split(product * shrink, [len(x) for x in stacks])
    return tuple([ops.matmul(factor, x) for factor, x in zip(factors, stacks)])


class SGD(Optimizer):
    """Gradient descent with momentum (the first of the betas) and the decay added to the gradient."""

    prefixes = ("momentum",)

    def __init__(self, params: Iterable[Parameter], betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, betas, eps, weight_decay)
        self.momentum = Tensor(betas[0], ms.float32)
        self.apply = ops.ApplyMomentum()

    def scalars(self, lr: float) -> tuple[float, ...]:
        return (lr,)

    def one(self, scale, scalars, decayed, param, velocity, grad):
        grad = scale * grad
        if decayed:
            grad = grad + self.weight_decay * param
        return self.apply(param, velocity, scalars[0], grad, self.momentum)


OPTIMIZERS = {"adamw": AdamW, "muon": Muon, "adam": Adam, "sgd": SGD}


def build_optimizer(
    name: str,
    params: Iterable[Parameter],
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """The optimizer of that name.

    Raises:
        UserError: an unknown name, or a number that makes no sense.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer '{name}': choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](params, betas, eps, weight_decay)
