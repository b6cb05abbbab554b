"""Every operator of the device's table, forward and backward, against its definition in NumPy, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm import kernels
from ldm.train.optimizer import build_optimizer
from tools.ascend_checks.machine import Finding, guarded

WIDTHS, KEYS = (40, 64, 80, 128, 160, 512), (77, 256, 4096)
FORWARD = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}  # relative error, root mean square
BACKWARD = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 8e-2}  # of the derivative along one direction


class Case(NamedTuple):
    name: str
    build: Callable[[], Callable]
    define: Callable[..., np.ndarray]
    shapes: tuple[tuple[int, ...], ...]


def group_norm(x, w, b, silu=False):
    grouped = x.reshape(len(x), 32, -1)
    grouped = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    y = grouped.reshape(x.shape) * w[:, None, None] + b[:, None, None]
    return y / (1 + np.exp(-y)) if silu else y


def layer_norm(x, w, b):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def geglu(x):
    value, gate = np.split(x, 2, -1)
    return value * gelu(gate)


def conv2d(x, w, b, stride, around):
    top, bottom, left, right = around
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bihwkl,oikl->bohw", windows, w, optimize=True) + b[:, None, None]


def heads(q, k, v, width):
    q, k, v = (x.reshape(x.shape[0], x.shape[1], -1, width).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(width)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = (p / p.sum(-1, keepdims=True)) @ v
    return out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)


def cases(widths=WIDTHS, keys=KEYS) -> Iterator[Case]:
    table, norm = kernels.select(), ((2, 64, 16, 16), (64,), (64,))
    yield Case("GroupNorm", lambda: table.GroupNorm(32, 1e-5), group_norm, norm)
    yield Case("GroupNorm, SiLU", lambda: table.GroupNorm(32, 1e-5, True), lambda *a: group_norm(*a, True), norm)
    yield Case("LayerNorm", lambda: table.LayerNorm(1e-5), layer_norm, ((2, 77, 320), (320,), (320,)))
    yield Case("GELU", table.GELU, gelu, ((2, 77, 256),))
    yield Case("QuickGELU", table.QuickGELU, lambda x: x / (1 + np.exp(-1.702 * x)), ((2, 77, 256),))
    yield Case("SiLU", table.SiLU, lambda x: x / (1 + np.exp(-x)), ((2, 1280),))
    yield Case("GEGLU", table.GEGLU, geglu, ((2, 64, 256),))
    yield Case("Affine", table.Affine, lambda x, w, b: x @ w.T + b, ((154, 320), (640, 320), (640,)))
    yield Case("MatMul", table.MatMul, lambda x, w: x @ w.T, ((154, 320), (640, 320)))
    yield Case("Upsample2", table.Upsample2, lambda x: x.repeat(2, 2).repeat(2, 3), ((2, 32, 8, 8),))
    for size, stride, padding in ((1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 2, (0, 1, 0, 1))):
        around = padding if isinstance(padding, tuple) else (padding,) * 4
        yield Case(
            f"Conv2d {size}x{size}, stride {stride}, padding {padding}",
            lambda s=(64, size, stride, padding): table.Conv2d(*s),
            lambda x, w, b, s=stride, a=around: conv2d(x, w, b, s, a),
            ((2, 32, 16, 16), (64, 32, size, size), (64,)),
        )
    for width in widths:
        for count in keys:
            queries = 256 if count == 77 else count  # 77 keys are a text's, other numbers the picture's own
            shapes = (1, queries, 2 * width), (1, count, 2 * width), (1, count, 2 * width)
            define = lambda q, k, v, width=width: heads(q, k, v, width)  # noqa: E731
            yield Case(f"attention, width {width}, {count} keys", lambda: table.Heads(2), define, shapes)


class Weighed(nn.Cell):
    """A scalar of an operator's output, so that a gradient reaches every input."""

    def __init__(self, operator: Callable, weights: Tensor):
        super().__init__()
        self.operator, self.weights = operator, weights

    def construct(self, *inputs):
        return (self.operator(*inputs).astype(ms.float32) * self.weights).sum()


class Called(nn.Cell):
    """An operator as a cell, so that graph mode compiles it."""

    def __init__(self, operator: Callable):
        super().__init__()
        self.operator = operator

    def construct(self, *inputs):
        return self.operator(*inputs)


def drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers; a matrix has rows of length 1, about."""
    numbers = rng.standard_normal(shape).astype(np.float32)
    return numbers / np.float32(shape[-1] ** 0.5) if len(shape) == 2 else numbers


def check(case: Case, dtype: str) -> Finding:
    """Errors of the output, and of the derivative of its weighed sum along a random direction."""
    rng, what, kind = np.random.default_rng(0), f"{case.name}, {dtype}", getattr(ms, dtype)
    inputs = [
        Tensor(rng.standard_normal(s).astype(np.float32) / max(1, s[-1] * (len(s) == 2)) ** 0.5) for s in case.shapes
    ]
    in_float32 = "Norm" in case.name  # norms are as in training: the input alone has half the width
    inputs = [x.astype(kind) if not (in_float32 and n) else x for n, x in enumerate(inputs)]
    exact = [x.astype(ms.float32).asnumpy().astype(np.float64) for x in inputs]
    wanted, operator = case.define(*exact), Called(case.build())
    given = operator(*inputs).astype(ms.float32).asnumpy()
    forward = float(np.sqrt(np.mean((given - wanted) ** 2) / np.mean(wanted**2)))
    weights = rng.standard_normal(wanted.shape).astype(np.float32)
    grads = ops.grad(Weighed(operator, Tensor(weights)), tuple(range(len(inputs))))(*inputs)
    grads = grads if isinstance(grads, tuple) else (grads,)
    along = [rng.standard_normal(x.shape) for x in exact]
    step = 1e-4 / max(1.0, max(np.abs(x).max() for x in exact))
    ends = [(case.define(*(x + s * d for x, d in zip(exact, along))) * weights).sum() for s in (step, -step)]
    slopes = [(g.astype(ms.float32).asnumpy().astype(np.float64) * d).sum() for g, d in zip(grads, along)]
    length = math.sqrt(sum(float((g.astype(ms.float32).asnumpy().astype(np.float64) ** 2).sum()) for g in grads))
    backward = abs(sum(slopes) - (ends[0] - ends[1]) / (2 * step)) / length
    good = bool(forward <= FORWARD[dtype] and backward <= BACKWARD[dtype])  # False for NaN too
    return Finding(what, good, f"error {forward:.1e} forward, {backward:.1e} backward", "this kernel is wrong here")


def adamw() -> Finding:
    """Five updates against AdamW in float64."""
    rng, betas, lr, decay = np.random.default_rng(0), (0.9, 0.999), 1e-2, 0.1
    start = rng.standard_normal((64, 64)).astype(np.float32)
    optimizer = build_optimizer("adamw", [Parameter(Tensor(start), name="w")], betas, weight_decay=decay)
    w, m, v = start.astype(np.float64), 0.0, 0.0
    for t in range(1, 6):
        g = rng.standard_normal(w.shape).astype(np.float32)
        scalars = tuple(Tensor(x, ms.float32) for x in optimizer.scalars(lr))
        optimizer(Tensor(1.0, ms.float32), scalars, (Tensor(g),))
        optimizer.updates = t
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g.astype(np.float64) ** 2
        w = w - lr * (m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8) + decay * w)
    error = float(np.abs(optimizer.params[0].asnumpy() - w).max())
    return Finding("AdamW, 5 updates", error < 1e-5, f"error {error:.1e} in weights of 1", "this kernel is wrong here")


def overflow(multiply: Callable = ops.Mul()) -> Finding:  # noqa: B008  a constant
    """What a product beyond float16 becomes; a loss scale needs infinity."""
    product = Called(multiply)(*(Tensor(np.full(16, value, np.float16)) for value in (60000, 2)))
    value = float(product.asnumpy().astype(np.float32)[0])
    return Finding("overflow in float16", value == np.inf, f"60000 x 2 is {value:g}", "train in --dtype float32")


def findings(dtypes: tuple[str, ...], widths=WIDTHS, keys=KEYS) -> Iterator[Finding]:
    for case in cases(widths, keys):
        for dtype in dtypes:
            what = f"{case.name}, {dtype}"
            mend = "try --enable_flash_attention False" if "attention" in what else "paste the whole report"
            yield guarded(what, lambda case=case, dtype=dtype: check(case, dtype), mend)
    yield guarded("AdamW", adamw)
    yield guarded("overflow", overflow)
