"""Optimizers against their papers' formulas in float64, parameter by parameter."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from ldm.errors import UserError
from ldm.train.optimizer import OPTIMIZERS, build_optimizer, orthogonalize

SHAPES = {"conv": (3, 2, 3, 3), "dense": (4, 5), "bias": (4,), "scale": ()}
BETAS, EPS, DECAY = (0.9, 0.98), 1e-6, 0.3
STEPS = 20


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


class Apply(nn.Cell):
    def __init__(self, optimizer):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer

    def construct(self, scale, scalars, *grads):
        return ops.depend(scale, self.optimizer(scale, ops.unstack(scalars), grads))


def make(name, **options):
    rng = np.random.default_rng(1)
    start = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
    params = [Parameter(Tensor(value), key) for key, value in start.items()]
    return start, build_optimizer(name, params, **{"betas": BETAS, "eps": EPS, "weight_decay": DECAY, **options})


def lr_at(step):
    return 1e-2 / (1 + step)


def gradients(step):
    rng = np.random.default_rng([2, step])
    # From tiny to large: eps matters for some, not for others.
    return {
        k: (rng.standard_normal(shape) * 10.0 ** (-3 * i)).astype(np.float32)
        for i, (k, shape) in enumerate(SHAPES.items())
    }


def run(optimizer, steps, scale=1.0):
    apply = Apply(optimizer)
    for step in range(steps):
        grads = [Tensor(g) for g in gradients(step).values()]
        apply(Tensor(scale, ms.float32), Tensor(optimizer.scalars(lr_at(step)), ms.float32), *grads)
        optimizer.updates += 1
    return {param.name: param.asnumpy().astype(np.float64) for param in optimizer.params}


def reference(name, w, scale, decayed):
    """Algorithm 2 of 1711.05101, algorithm 1 of 1412.6980 with L2, and momentum, as they are printed."""
    w = {key: value.astype(np.float64) for key, value in w.items()}
    m, v, momentum = ({key: np.zeros_like(value) for key, value in w.items()} for _ in range(3))
    beta1, beta2 = BETAS
    for step in range(STEPS):
        lr, t = lr_at(step), step + 1
        for key, g in gradients(step).items():
            g = scale * g.astype(np.float64)
            decay = DECAY if key in decayed else 0.0
            if name not in ("adamw", "muon"):
                g = g + decay * w[key]
            if name == "sgd":
                m[key] = beta1 * m[key] + g
                w[key] = w[key] - lr * m[key]
                continue
            m[key] = beta1 * m[key] + (1 - beta1) * g
            v[key] = beta2 * v[key] + (1 - beta2) * g**2
            if name == "muon" and key in ("conv", "dense"):
                momentum[key] = 0.95 * momentum[key] + g
                w[key] = w[key] * (1 - lr * decay) - lr * muon_update(g + 0.95 * momentum[key])
                continue
            move = m[key] / (1 - beta1**t) / (np.sqrt(v[key] / (1 - beta2**t)) + EPS)
            w[key] = w[key] - lr * (move + (decay * w[key] if name in ("adamw", "muon") else 0))
    return w


def muon_update(x):
    """By the singular values themselves: each goes five times through the polynomial."""
    u, s, vt = np.linalg.svd(x.reshape(len(x), -1), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    matrix = u @ np.diag(s) @ vt
    return 0.2 * np.sqrt(max(matrix.shape)) * matrix.reshape(x.shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_follow_the_formula(name):
    start, optimizer = make(name)
    got = run(optimizer, STEPS, scale=0.5)
    wanted = reference(name, start, 0.5, decayed=("conv", "dense"))
    for key in SHAPES:
        moved = np.abs(wanted[key] - start[key]).max()
        assert np.abs(got[key] - wanted[key]).max() < 1e-5 * moved + 1e-6 * np.abs(wanted[key]).max(), key
        assert moved > 1e-2 or key != "conv"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_do_not_decay(name):
    start, with_decay = make(name)
    _, without = make(name, weight_decay=0.0)
    a, b = run(with_decay, 3), run(without, 3)
    for key in ("conv", "dense"):
        assert not np.allclose(a[key], b[key], rtol=1e-4)
    for key in ("bias", "scale"):
        assert np.array_equal(a[key], b[key])


def test_first_adamw_step_has_the_length_of_the_learning_rate():
    """What nn.AdamWeightDecay, without bias correction, gets wrong by a factor of about 3."""
    start, optimizer = make("adamw", weight_decay=0.0, eps=1e-12)
    moved = run(optimizer, 1)
    assert np.abs(moved["dense"] - start["dense"]) == pytest.approx(lr_at(0), rel=1e-4)


def test_muon_brings_singular_values_near_one():
    rng = np.random.default_rng(3)
    shapes = ((2, 6, 40), (1, 6, 6), (1, 6, 9))
    stacks = [rng.standard_normal(shape) @ np.diag(10.0 ** -np.linspace(0, 1.5, shape[2])) for shape in shapes]
    for x in orthogonalize(tuple(Tensor(1e3 * x.astype(np.float32)) for x in stacks)):
        s = np.linalg.svd(x.asnumpy(), compute_uv=False)
        assert s.min() > 0.3 and s.max() < 1.25  # the smallest were a thirtieth of the largest


def test_muon_takes_matrices_of_all_shapes_together():
    rng = np.random.default_rng(5)
    shapes = {
        "wide": (4, 9),
        "tall": (9, 4),
        "wider": (4, 12),
        "conv": (4, 3, 3, 3),
        "narrow": (2, 1, 1, 1),
        "square": (9, 9),
    }
    start, slopes = ({k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(2))
    optimizer = build_optimizer("muon", [Parameter(Tensor(w), k) for k, w in start.items()], BETAS, EPS, 0.0)
    scalars = Tensor(optimizer.scalars(1e-2), ms.float32)
    Apply(optimizer)(Tensor(1.0, ms.float32), scalars, *map(Tensor, slopes.values()))
    for param in optimizer.params:
        update = muon_update(1.95 * slopes[param.name].astype(np.float64))
        np.testing.assert_allclose(param.asnumpy(), start[param.name] - 1e-2 * update, atol=2e-6, err_msg=param.name)


def test_muon_leaves_embeddings_to_adamw():
    rng = np.random.default_rng(4)
    start = rng.standard_normal((5, 4)).astype(np.float32)
    gradient = Tensor(rng.standard_normal((5, 4)).astype(np.float32))

    def one_step(name, parameter):
        optimizer = build_optimizer(name, [Parameter(Tensor(start), parameter)], BETAS, EPS, 0.0)
        Apply(optimizer)(Tensor(1.0, ms.float32), Tensor(optimizer.scalars(1e-2), ms.float32), gradient)
        return optimizer.params[0].asnumpy()

    assert np.array_equal(one_step("muon", "token_embedding.weight"), one_step("adamw", "token_embedding.weight"))
    assert not np.allclose(one_step("muon", "dense"), one_step("adamw", "dense"))


def test_state_is_named_after_the_parameters():
    _, adamw = make("adamw")
    assert [tensor.name for tensor in adamw.state] == [f"adam_{kind}.{key}" for kind in "mv" for key in SHAPES]
    _, sgd = make("sgd")
    assert [tensor.name for tensor in sgd.state] == [f"momentum.{key}" for key in SHAPES]
    _, muon = make("muon")
    assert [t.name for t in muon.state] == [f"momentum.{key}" for key in SHAPES] + ["adam_v.bias", "adam_v.scale"]
    assert not any(tensor.requires_grad for tensor in (*adamw.state, *sgd.state, *muon.state))
    assert [param.name for param in adamw.params] == list(SHAPES)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("lion", {}, ["lion", *OPTIMIZERS]),
        ("adamw", {"betas": (0.9, 1.0)}, ["betas", "1.0"]),
        ("adam", {"eps": 0.0}, ["eps"]),
        ("sgd", {"betas": (1.5, 0.9)}, ["betas"]),
        ("sgd", {"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
    ],
)
def test_mistakes_are_named(name, options, words):
    with pytest.raises(UserError) as error:
        make(name, **options)
    assert all(word in str(error.value) for word in words)
