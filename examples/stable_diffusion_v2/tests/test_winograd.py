"""3x3 convolution by Winograd's method, and its gradients, against float64."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from native_library import builds, call, library, relative_rms, said_by_threads
from test_kernels import compare

from ldm.kernels import convolution, cpu, plain

pytestmark = pytest.mark.skipif(cpu.native_library() is None, reason="no C++ compiler on this machine")

TOLERANCE = 5e-6  # relative rms of a convolution


@pytest.fixture(scope="module", params=builds())
def path(request):
    return library(request.param)


def odd_shapes() -> list[tuple[int, ...]]:
    """(batch, inputs, outputs, height, width): around the widths of vectors, panels and tiles, then at random."""
    shapes = [(1, 1, 1, 1, 1), (1, 32, 32, 4, 4), (2, 33, 31, 8, 8), (3, 17, 65, 5, 7), (1, 161, 33, 16, 16)]
    shapes += [(1, 3, 130, 70, 3), (1, 320, 4, 9, 2), (2, 16, 16, 64, 64), (1, 5, 40, 3, 130), (40, 8, 8, 4, 4)]
    rng = np.random.default_rng(0)
    return shapes + [tuple(int(n) for n in rng.integers(1, (4, 200, 100, 40, 40))) for _ in range(30)]


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    x, (height, width) = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1))), x.shape[2:]
    taps = [(r, s) for r in range(3) for s in range(3)]
    parts = (np.einsum("oc,bchw->bohw", weight[..., r, s], x[..., r : r + height, s : s + width]) for r, s in taps)
    return sum(parts)


def filter_gradient(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    x, (height, width) = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1))), x.shape[2:]
    gradient = np.empty((dy.shape[1], x.shape[1], 3, 3))
    for r in range(3):
        for s in range(3):
            gradient[..., r, s] = np.einsum("bohw,bchw->oc", dy, x[..., r : r + height, s : s + width])
    return gradient


@pytest.mark.parametrize("shape", odd_shapes(), ids=str)
def test_every_shape(path, shape):
    batch, inputs, outputs, height, width = shape
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((batch, inputs, height, width)), rng.standard_normal((batch, outputs, height, width))
    weight, biases = rng.standard_normal((outputs, inputs, 3, 3)), rng.standard_normal((batch, outputs))
    wanted = convolved(x, weight)
    (y,) = call(path, "convolution3", [x, weight], [dy.shape])
    (dx,) = call(path, "convolution3_input_grad", [dy, weight], [x.shape])
    (dweight,) = call(path, "convolution3_weight_grad", [x, dy], [weight.shape])
    assert relative_rms(y, wanted) <= TOLERANCE
    turned = weight[..., ::-1, ::-1].swapaxes(0, 1)
    assert relative_rms(dx, convolved(dy, turned)) <= TOLERANCE
    assert relative_rms(dweight, filter_gradient(x, dy)) <= TOLERANCE
    for bias, axes in ((biases[0], (0, 2, 3)), (biases, (2, 3))):
        (y,) = call(path, "convolution3_bias", [x, weight, bias], [dy.shape])
        (dbias,) = call(path, "convolution3_bias_grad", [dy, bias], [bias.shape])
        assert relative_rms(y, wanted + bias.reshape(-1, outputs, 1, 1)) <= TOLERANCE
        assert relative_rms(dbias, dy.sum(axes)) <= TOLERANCE


def test_gradients_by_finite_differences(path):
    """y is linear in x and in the weight, so that a large step is exact."""
    rng = np.random.default_rng(2)
    x, weight, dy = (rng.standard_normal(shape) for shape in ((2, 5, 6, 9), (7, 5, 3, 3), (2, 7, 6, 9)))
    (dx,) = call(path, "convolution3_input_grad", [dy, weight], [x.shape])
    (dweight,) = call(path, "convolution3_weight_grad", [x, dy], [weight.shape])

    def loss(x, weight):
        return np.sum(call(path, "convolution3", [x, weight], [dy.shape])[0] * dy, dtype=np.float64)

    for _ in range(5):
        to_x, to_weight = rng.standard_normal(x.shape), rng.standard_normal(weight.shape)
        along_x = (loss(x + to_x, weight) - loss(x - to_x, weight)) / 2
        along_weight = (loss(x, weight + to_weight) - loss(x, weight - to_weight)) / 2
        assert np.sum(dx * to_x) == pytest.approx(along_x, rel=1e-4, abs=1e-3)
        assert np.sum(dweight * to_weight) == pytest.approx(along_weight, rel=1e-4, abs=1e-3)


THREADS = """
import hashlib, sys
import numpy as np
sys.path[:0] = ["tests"]
from native_library import call
path, rng = sys.argv[1], np.random.default_rng(0)
for batch, inputs, outputs, side in ((2, 70, 90, 33), (1, 200, 130, 9)):
    x, dy = (rng.standard_normal((batch, n, side, side)) for n in (inputs, outputs))
    weight = rng.standard_normal((outputs, inputs, 3, 3))
    for name, arrays, shape in (
        ("convolution3", [x, weight], dy.shape),
        ("convolution3_input_grad", [dy, weight], x.shape),
        ("convolution3_weight_grad", [x, dy], weight.shape),
    ):
        print(name, hashlib.sha256(call(path, name, arrays, [shape])[0].tobytes()).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit(path):
    said = said_by_threads(THREADS, path)
    assert len(said) == 1 and said.pop().count(b"\n") == 6


class WithoutBias(nn.Cell):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def construct(self, x, weight):
        return self.conv(x, weight, None)


@pytest.mark.parametrize("bias", [None, (20,), (2, 20)], ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (2, 16, 8, 8)], ids=str)
def test_the_operator_in_mindspore(shape, bias):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape), rng.standard_normal((20, shape[1], 3, 3))]
    both = convolution.WinogradConv2d(20), plain.Conv2d(20, 3, 1, 1)
    if bias:
        arrays.append(rng.standard_normal(bias))
    else:
        both = map(WithoutBias, both)
    compare(*both, *arrays, tolerance=TOLERANCE)


@pytest.mark.parametrize("words", [(64, 5, 1, 2), (64, 1, 1, 0), (64, 3, 2, 1), (64, 3, 1, (0, 1, 0, 1))], ids=str)
def test_other_convolutions_are_not_winograds(words):
    assert isinstance(convolution.native_conv2d(64, 3, 1, 1), convolution.WinogradConv2d)
    assert isinstance(convolution.native_conv2d(*words), plain.Conv2d)


def test_few_inputs_and_half_precision_take_the_other_way():
    rng, conv = np.random.default_rng(0), convolution.WinogradConv2d(16)
    weight, bias = rng.standard_normal((16, 3, 3, 3)), rng.standard_normal(16)
    compare(conv, plain.Conv2d(16, 3, 1, 1), rng.standard_normal((1, 3, 5, 5)), weight, bias)
    x, weight = (Tensor(rng.standard_normal(shape), ms.float16) for shape in ((1, 16, 5, 5), (16, 16, 3, 3)))
    assert conv(x, weight, None).dtype == ms.float16
