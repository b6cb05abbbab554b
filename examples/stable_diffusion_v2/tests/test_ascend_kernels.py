"""The NPU's operators, as far as a CPU has their kernels, against the plain definitions.

Where it has none, the definition stands in for the kernel, and what is around it is tested.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from tiny_sdxl import random_tensors, smaller_sdxl_config

from ldm import kernels
from ldm.kernels import ascend, plain
from ldm.model import StableDiffusion
from ldm.parts import VAE
from ldm.train.ema import Ema
from ldm.train.optimizer import OPTIMIZERS, build_optimizer
from ldm.train.state import load_state, save_state
from ldm.train.step import TrainStep
from ldm.train.together import NormOfFew


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensors(rng, *shapes, dtype=ms.float32) -> list[Tensor]:
    return [Tensor(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes]


def close(given: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert given.shape == wanted.shape
    np.testing.assert_allclose(given.asnumpy(), wanted.asnumpy(), atol=tolerance, rtol=tolerance)


class Zeros(ascend.FlashHeads):
    """Zeros come out where the NPU's operator would be called."""

    def flash(self, q, k, v, scale, layout):
        return q * 0


class Defined(ascend.FlashHeads):
    """The operator by its definition, in both layouts."""

    def __init__(self, heads: int):
        super().__init__(heads)
        self.attention = plain.Attention()

    def flash(self, q, k, v, scale, layout):
        q4, k4, v4 = (x.reshape(x.shape[0], x.shape[1], self.heads, -1).swapaxes(1, 2) for x in (q, k, v))
        return self.attention(q4 * scale, k4, v4).swapaxes(1, 2).reshape(q.shape)


SHAPES = [  # width of a head, keys, dtype, masked, flash attention
    (64, 32, ms.float16, False, True),
    (40, 32, ms.float16, False, True),
    (128, 32, ms.float16, False, True),
    (160, 32, ms.float16, False, False),
    (512, 32, ms.float16, False, False),
    (64, 77, ms.float16, False, False),
    (64, 32, ms.float32, False, False),
    (64, 32, ms.float16, True, False),
]


@pytest.mark.parametrize(("width", "keys", "dtype", "masked", "flash"), SHAPES)
def test_flash_attention_is_for_narrow_self_attention_in_half_precision(rng, width, keys, dtype, masked, flash):
    q, k, v = tensors(rng, *((2, n, 3 * width) for n in (32, keys, keys)), dtype=dtype)
    mask = [Tensor(np.zeros((32, keys), np.float32))] if masked else []
    wanted = plain.Heads(3)(q, k, v, *mask)
    assert wanted.dtype == dtype
    close(Zeros(3)(q, k, v, *mask), wanted * (0 if flash else 1), 1e-3)
    close(Defined(3)(q, k, v, *mask), wanted, 4e-3)


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm(rng, silu):
    x, weight, bias = tensors(rng, (2, 64, 5, 7), (64,), (64,))
    close(ascend.FusedGroupNorm(32, 1e-5, silu)(x, weight, bias), plain.GroupNorm(32, 1e-5, silu)(x, weight, bias))


def test_silu_and_the_affine_map(rng):
    x, weight, bias = tensors(rng, (6, 8), (4, 8), (4,))
    close(ascend.FusedSiLU()(x), plain.SiLU()(x))
    close(kernels.ASCEND.Affine()(x, weight, bias), plain.Affine()(x, weight, bias))


class Convolved(ascend.FusedConv2d):
    """The convolution of CANN by MindSpore's own."""

    def __init__(self, *settings):
        super().__init__(*settings)
        outputs, kernel, stride, _ = settings
        self.own = plain.Conv2d(outputs, kernel, stride, self.padding)

    def conv(self, x, weight, bias):
        return self.own(x, weight, bias)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, (0, 1, 0, 1)), (1, (1, 2, 3, 0))])
def test_padding_of_a_convolution(rng, stride, padding):
    x, weight, bias = tensors(rng, (2, 4, 8, 8), (6, 4, 3, 3), (6,))
    settings = 6, 3, stride, padding
    close(Convolved(*settings)(x, weight, bias), plain.Conv2d(*settings)(x, weight, bias))
    close(Convolved(*settings)(x, weight, None), plain.Conv2d(*settings)(x, weight, None))


class Lengths(NormOfFew):
    def length(self, x):
        return ops.sqrt((x * x).sum())


class Net(nn.Cell):
    """A loss of parameters of all kinds of shapes, small ones between large ones."""

    def __init__(self):
        super().__init__()
        rng, shapes = np.random.default_rng(0), [(3,), (4, 3), (5,), (2, 2, 3, 3), (1,), (6, 6), (7,)]
        self.all = ms.ParameterTuple(
            [Parameter(Tensor(rng.standard_normal(s, np.float32)), name=f"p{n}") for n, s in enumerate(shapes)]
        )

    def construct(self, x):
        loss = 0.0
        for param in self.all:
            loss = loss + (ops.sin(param) * x).sum()
        return (loss,)


def train_step(monkeypatch, few: bool, optimizer: str = "adamw") -> TrainStep:
    monkeypatch.setattr(kernels, "select", lambda: kernels.PLAIN._replace(few_launches=few))
    net = Net()
    params = list(net.get_parameters())
    step = TrainStep(net, build_optimizer(optimizer, params), Ema(params, 0.9), max_grad_norm=0.5)
    assert isinstance(step.norm, NormOfFew) == few
    if few:
        assert [p.ndim == 1 for p in step.optimizer.params] == [False] * 3 + [True] * 4
        assert len(step.optimizer.few) == len(step.ema.shadow) == 4 and not step.optimizer.separable
        step.norm = Lengths(step.optimizer.params)
    return step


def make_steps(step: TrainStep, *numbers: int) -> list[float]:
    return [step([(Tensor(1.5 - n, ms.float32),)], 0.1, n).grad_norm for n in numbers]


def variables(step: TrainStep) -> dict[str, np.ndarray]:
    return {name: v.asnumpy().copy() for name, v in step.variables().items()}


def close_variables(given: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert given.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(given[name], array, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_small_tensors_as_one_make_the_same_steps(monkeypatch, optimizer):
    one, other = train_step(monkeypatch, False, optimizer), train_step(monkeypatch, True, optimizer)
    np.testing.assert_allclose(make_steps(other, 0, 1, 2), make_steps(one, 0, 1, 2), rtol=1e-6)
    close_variables(variables(other), variables(one))
    averages = other.ema.tensors()
    with other.ema.applied():
        for param in other.optimizer.params:
            np.testing.assert_array_equal(param.asnumpy(), averages[param.name])
    for step in (one, other):  # others have set the weights; the optimizer goes on from there
        step.begin_anew()
        assert not any(tensor.asnumpy().any() for tensor in step.optimizer.state)
        make_steps(step, 3)
    close_variables(variables(other), variables(one))


def test_a_state_serves_joined_and_separate_tensors(monkeypatch, tmp_path):
    straight, path = train_step(monkeypatch, True), tmp_path / "state.safetensors"
    make_steps(straight, 0)
    save_state(path, straight, {"step": 1}, {})
    make_steps(straight, 1, 2)
    for few in (True, False):
        resumed = train_step(monkeypatch, few)
        load_state(path, resumed, {})
        make_steps(resumed, 1, 2)
        close_variables(variables(resumed), variables(straight))
        if few:
            assert all(np.array_equal(v, variables(resumed)[name]) for name, v in variables(straight).items())


def test_weights_are_cast_once_for_drawing(monkeypatch, rng):
    monkeypatch.setattr(kernels, "select", lambda: kernels.PLAIN)
    config, outputs = smaller_sdxl_config(), {}
    inputs = tensors(rng, (1, 4, 16, 16), (1, 77, 64), (1, config.unet.adm_in_channels))
    inputs.insert(1, Tensor([500], ms.int32))
    for weights in (False, True):
        model = StableDiffusion(config)
        model.load(random_tensors(config), "random", copy=True)
        model.compute_in("float16", weights)
        types = {name.startswith(VAE): param.dtype for name, param in model.parameters_and_names()}
        assert types == {True: ms.float32, False: ms.float16 if weights else ms.float32}  # its autoencoder must stay
        outputs[weights] = model.unet(*inputs)
        assert outputs[weights].dtype == ms.float32
    close(*outputs.values(), 2e-2)
