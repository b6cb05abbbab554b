"""Attention without a matrix of all scores, and its gradients, against float64."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from native_library import builds, call, library, relative_rms, said_by_threads
from test_kernels import compare

from ldm.kernels import cpu, plain

pytestmark = pytest.mark.skipif(cpu.native_library() is None, reason="no C++ compiler on this machine")

TOLERANCE = 2e-6  # relative rms


@pytest.fixture(scope="module", params=builds())
def path(request):
    return library(request.param)


def odd_shapes() -> list[tuple[int, ...]]:
    """(batch, heads, queries, keys, width of a head): around the widths of vectors and blocks, then at random."""
    shapes = [(1, 1, 1, 1, 1), (2, 3, 16, 16, 32), (1, 2, 33, 77, 40), (2, 1, 64, 64, 64), (1, 1, 65, 129, 160)]
    shapes += [(1, 8, 31, 63, 80), (1, 1, 100, 100, 512), (2, 5, 1, 77, 64), (3, 2, 77, 1, 64), (1, 2, 17, 200, 7)]
    rng = np.random.default_rng(0)
    return shapes + [tuple(int(n) for n in rng.integers(1, (4, 5, 150, 200, 100))) for _ in range(30)]


def heads_of(x: np.ndarray, heads: int) -> np.ndarray:
    b, n, c = x.shape
    return x.astype(np.float64).reshape(b, n, heads, c // heads).swapaxes(1, 2)


def joined(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def defined(q, k, v, heads, mask, dy):
    """The output, the logarithms of the sums and the gradients, in float64."""
    q, k, v, dy = (heads_of(each, heads) for each in (q, k, v, dy))
    scale = q.shape[-1] ** -0.5
    scores = q @ k.swapaxes(-1, -2) * scale + mask
    log_sums = np.log(np.sum(np.exp(scores - scores.max(-1, keepdims=True)), -1)) + scores.max(-1)
    p = np.exp(scores - log_sums[..., None])
    y = p @ v
    ds = p * (dy @ v.swapaxes(-1, -2) - np.sum(dy * y, -1, keepdims=True))
    return (
        joined(y),
        log_sums,
        joined(ds @ k * scale),
        joined(ds.swapaxes(-1, -2) @ q * scale),
        joined(p.swapaxes(-1, -2) @ dy),
    )


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shape", odd_shapes(), ids=str)
def test_every_shape(path, shape, masked):
    batch, heads, queries, keys, width = shape
    rng = np.random.default_rng(1)
    q, dy = (rng.standard_normal((batch, queries, heads * width)) for _ in range(2))
    k, v = (rng.standard_normal((batch, keys, heads * width)) for _ in range(2))
    mask = np.triu(np.full((queries, keys), -1e9), 1) if masked else np.zeros((queries, keys))
    mask += masked * rng.standard_normal((queries, keys))
    inputs, suffix = ([q, k, v, mask], "_masked") if masked else ([q, k, v], "")
    wanted = defined(q, k, v, heads, mask, dy)
    y, log_sums = call(path, f"attention{suffix}", inputs, [q.shape, (batch, heads, queries)])
    grads = call(path, f"attention{suffix}_grad", [*inputs, y, log_sums, dy], [q.shape, k.shape, k.shape])
    scale = np.sqrt(np.mean(np.square(wanted[4])))  # one key alone has no gradient
    assert relative_rms(y, wanted[0]) <= TOLERANCE
    np.testing.assert_allclose(log_sums, wanted[1], atol=1e-5)
    for got, want in zip(grads, wanted[2:]):
        assert np.sqrt(np.mean((got - want) ** 2)) <= TOLERANCE * max(np.sqrt(np.mean(want**2)), scale)


def test_large_scores(path):
    """Scores of some hundred, of which one is the largest by far."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, n, 64)) * size for n, size in ((40, 30), (90, 30), (90, 1)))
    y, _ = call(path, "attention", [q, k, v], [q.shape, (1, 2, 40)])
    assert relative_rms(y, defined(q, k, v, 2, 0, q)[0]) <= 1e-4


def test_nan_stays_in_its_row(path):
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, 50, 32)) for _ in range(3))
    q[0, 7, 0] = np.nan
    y, _ = call(path, "attention", [q, k, v], [q.shape, (1, 1, 50)])
    assert np.isnan(y[0, 7]).all() and np.isfinite(np.delete(y, 7, 1)).all()


def test_gradients_by_finite_differences(path):
    rng = np.random.default_rng(5)
    q, k, v, dy = (rng.standard_normal((1, n, 24)) for n in (20, 30, 30, 20))
    sums = (1, 2, 20)
    y, log_sums = call(path, "attention", [q, k, v], [q.shape, sums])
    grads = call(path, "attention_grad", [q, k, v, y, log_sums, dy], [q.shape, k.shape, v.shape])

    def loss(*inputs):
        return np.sum(call(path, "attention", inputs, [q.shape, sums])[0] * dy, dtype=np.float64)

    for number in range(3):
        step = np.zeros((3, 1, 30, 24))
        step[number] = rng.standard_normal(step.shape[1:]) * 1e-2
        steps = step[0][:, :20], step[1], step[2]
        ahead, behind = ([x + sign * s for x, s in zip((q, k, v), steps)] for sign in (1, -1))
        along = (loss(*ahead) - loss(*behind)) / 2
        assert np.sum(grads[number] * steps[number]) == pytest.approx(along, rel=1e-2, abs=1e-4)


THREADS = """
import hashlib, sys
import numpy as np
sys.path[:0] = ["tests"]
from native_library import call
path, rng = sys.argv[1], np.random.default_rng(0)
q, k, v, dy = (rng.standard_normal((2, n, 96)) for n in (150, 77, 77, 150))
y, sums = call(path, "attention", [q, k, v], [q.shape, (2, 3, 150)])
for array in (y, sums, *call(path, "attention_grad", [q, k, v, y, sums, dy], [q.shape, k.shape, v.shape])):
    print(hashlib.sha256(array.tobytes()).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit(path):
    said = said_by_threads(THREADS, path)
    assert len(said) == 1 and said.pop().count(b"\n") == 5


class WithMask(nn.Cell):
    """Attention with a constant mask."""

    def __init__(self, heads, mask):
        super().__init__()
        self.own, self.mask = heads(2), mask

    def construct(self, q, k, v):
        return self.own(q, k, v, self.mask)


@pytest.mark.parametrize("shape", [(2, 9, 9, 32), (1, 20, 7, 48)], ids=str)
def test_the_operator_in_mindspore(shape):
    batch, queries, keys, width = shape
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((batch, n, width)) for n in (queries, keys, keys)]
    compare(cpu.NativeHeads(2), plain.Heads(2), *arrays, tolerance=TOLERANCE)
    mask = Tensor(np.triu(np.full((queries, keys), -1e9, np.float32), 1))
    compare(WithMask(cpu.NativeHeads, mask), WithMask(plain.Heads, mask), *arrays, tolerance=TOLERANCE)


def test_half_precision_stays_half(path):
    q, k, v = (Tensor(np.random.default_rng(0).standard_normal((1, 9, 32)), ms.float16) for _ in range(3))
    y = cpu.NativeHeads(1)(q, k, v)
    assert y.dtype == ms.float16
    np.testing.assert_allclose(y.asnumpy(), plain.Heads(1)(q, k, v).asnumpy(), atol=2e-3)
