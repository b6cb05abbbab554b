"""x Wᵀ + bias in one pass, and products of bfloat16 numbers, against float64."""

from __future__ import annotations

import ctypes

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from native_library import builds, call, library, relative_rms, said_by_threads
from test_flash_attention import defined, odd_shapes
from test_kernels import compare

from ldm import runtime
from ldm.errors import UserError
from ldm.kernels import cpu, plain, products
from ldm.networks.layers import initialize
from ldm.networks.unet import TransformerBlock

pytestmark = pytest.mark.skipif(cpu.native_library() is None, reason="no C++ compiler on this machine")

EPS = 2.0**-8  # relative spacing of bfloat16


def sizes() -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs): around the widths of vectors, panels, chunks and blocks, then at random."""
    some = [(1, 1, 1), (8, 16, 32), (64, 320, 33), (65, 31, 31), (7, 5120, 17), (1025, 9, 64), (2, 1280, 320)]
    rng = np.random.default_rng(0)
    return some + [tuple(int(n) for n in rng.integers(1, (300, 400, 200))) for _ in range(33)]


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16 and back, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


@pytest.fixture(scope="module")
def with_bfloat16() -> str:
    path = cpu.native_library()
    if not hasattr(ctypes.CDLL(path), "affine_bfloat16"):
        pytest.skip("this CPU does not multiply bfloat16 numbers")
    return path


def inputs_of(size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, inputs, outputs = size
    rng = np.random.default_rng(1)
    return tuple(rng.standard_normal(s).astype(np.float32) for s in ((rows, inputs), (outputs, inputs), outputs))


@pytest.mark.parametrize("build", builds())
def test_affine(build):
    for size in sizes():
        x, weight, bias = inputs_of(size)
        product = x.astype(np.float64) @ weight.T
        (y,) = call(library(build), "affine", [x, weight, bias], [product.shape])
        (without,) = call(library(build), "matmul", [x, weight], [product.shape])
        assert relative_rms(y, product + bias) <= 2e-6, size
        assert relative_rms(without, product) <= 2e-6, size


def test_affine_in_bfloat16(with_bfloat16):
    for size in sizes():
        x, weight, bias = inputs_of(size)
        product = rounded(x).astype(np.float64) @ rounded(weight).T
        (y,) = call(with_bfloat16, "affine_bfloat16", [x, weight, bias], [product.shape])
        (without,) = call(with_bfloat16, "matmul_bfloat16", [x, weight], [product.shape])
        assert relative_rms(y, product + bias) <= 2e-6, size
        assert relative_rms(without, product) <= 2e-6, size


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_attention_in_bfloat16(with_bfloat16, masked):
    """Errors of rounding the inputs and the exponentials are below the spacing of the numbers."""
    for batch, heads, queries, keys, width in odd_shapes():
        rng = np.random.default_rng(1)
        q = rng.standard_normal((batch, queries, heads * width))
        k, v = (rng.standard_normal((batch, keys, heads * width)) for _ in range(2))
        mask = np.triu(np.full((queries, keys), -1e9), 1) if masked else 0
        inputs, name = ([q, k, v, mask], "attention_masked_bfloat16") if masked else ([q, k, v], "attention_bfloat16")
        wanted = defined(q, k, v, heads, mask, q)
        y, log_sums = call(with_bfloat16, name, inputs, [q.shape, (batch, heads, queries)])
        assert relative_rms(y, wanted[0]) <= 2 * EPS
        np.testing.assert_allclose(log_sums, wanted[1], atol=8 * EPS)


def test_nan_and_infinity_stay_in_their_row(with_bfloat16):
    x, weight, bias = inputs_of((50, 40, 33))
    x[3, 0], x[7, 1] = np.nan, np.inf
    for name in ("affine", "affine_bfloat16"):
        (y,) = call(with_bfloat16, name, [x, weight, bias], [(50, 33)])
        assert np.isnan(y[3]).all() and not np.isfinite(y[7]).any()
        assert np.isfinite(np.delete(y, [3, 7], 0)).all()


THREADS = """
import ctypes, hashlib, sys
import numpy as np
sys.path[:0] = ["tests"]
from native_library import call
path, rng = sys.argv[1], np.random.default_rng(0)
x, weight, bias = (rng.standard_normal(shape) for shape in ((2100, 330), (130, 330), 130))
names = [name for name in ("affine", "affine_bfloat16") if hasattr(ctypes.CDLL(path), name)]
print([hashlib.sha256(call(path, name, [x, weight, bias], [(2100, 130)])[0]).hexdigest() for name in names])
"""


def test_the_number_of_threads_does_not_matter():
    assert len(said_by_threads(THREADS, cpu.native_library())) == 1


class Matmul(nn.Cell):
    """`plain.matmul` as a cell, for its gradients."""

    def __init__(self):
        super().__init__()
        self.own = plain.matmul()

    def construct(self, x, weight):
        return self.own(x, weight)


def test_gradients():
    rng = np.random.default_rng(2)
    inputs = [rng.standard_normal(shape) for shape in ((150, 70), (33, 70), 33)]
    compare(products.NativeAffine(), plain.Affine(), *inputs)
    compare(products.NativeMatMul(), Matmul(), *inputs[:2])


def test_half_precision_stays_so():
    x, weight, bias = (Tensor(each, ms.float16) for each in inputs_of((50, 70, 33)))
    for native, defined_plainly, inputs in (
        (products.NativeAffine(), plain.Affine(), (x, weight, bias)),
        (products.NativeMatMul(), plain.matmul(), (x, weight)),
    ):
        y = native(*inputs)
        assert y.dtype == ms.float16
        np.testing.assert_array_equal(y.asnumpy(), defined_plainly(*inputs).asnumpy())


def test_a_network_multiplies_in_bfloat16(with_bfloat16):
    """Attention and linear layers, with and without bias, round what they multiply, and no more than that."""
    rng = np.random.default_rng(0)
    block, rounding = TransformerBlock(64, 2, 48), TransformerBlock(64, 2, 48)
    initialize(block, 0)
    initialize(rounding, 0)
    runtime.set_compute_dtype(rounding, "bfloat16")
    x, context = (Tensor(rng.standard_normal((1, n, width)), ms.float32) for n, width in ((90, 64), (77, 48)))
    exact, changed = (net(x, None, context).asnumpy() for net in (block, rounding))
    assert changed.dtype == np.float32 and EPS / 64 < relative_rms(changed, exact) < EPS
    kinds = [cell for _, cell in rounding.cells_and_names() if hasattr(cell, "in_bfloat16")]
    assert len(kinds) == 13  # two attentions of four products and heads, a product that joins three, the MLP's two


def test_bfloat16_that_a_cpu_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    with pytest.raises(UserError, match="nothing to gain: leave out --dtype"):
        runtime.compute_dtype("bfloat16", "CPU")
    with pytest.raises(UserError, match="is for drawing"):
        runtime.compute_dtype("bfloat16", "CPU", training=True)
