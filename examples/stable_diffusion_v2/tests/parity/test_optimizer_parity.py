"""Optimizers and gradient clipping against PyTorch's, fed with the same gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from ldm.train.optimizer import build_optimizer
from ldm.train.step import TrainStep

torch = pytest.importorskip("torch", reason="compares with PyTorch's optimizers")
pytestmark = pytest.mark.parity

SHAPES = {"conv": (8, 4, 3, 3), "dense": (16, 12), "bias": (16,), "norm": (8,)}
BETAS, EPS, DECAY, STEPS = (0.9, 0.98), 1e-8, 0.01, 20


class Dot(nn.Cell):
    """The sum of parameters times coefficients: its gradients are the coefficients."""

    def __init__(self, params):
        super().__init__(auto_prefix=False)
        self.conv, self.dense, self.bias, self.norm = params

    def construct(self, conv, dense, bias, norm):
        loss = (self.conv * conv).sum() + (self.dense * dense).sum()
        return (loss + (self.bias * bias).sum() + (self.norm * norm).sum(),)


def torch_optimizer(name, params):
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=BETAS[0])
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    return kind(groups, lr=1.0, betas=BETAS, eps=EPS)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_twenty_steps_as_in_pytorch(name, max_grad_norm):
    ms.set_context(mode=ms.GRAPH_MODE)
    rng = np.random.default_rng(0)
    start = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
    ours = [Parameter(Tensor(value), key) for key, value in start.items()]
    theirs = [torch.nn.Parameter(torch.tensor(value)) for value in start.values()]
    optimizer = build_optimizer(name, ours, BETAS, EPS, DECAY)
    train_step = TrainStep(Dot(ours), optimizer, None, max_grad_norm)
    other = torch_optimizer(name, theirs)

    for step in range(STEPS):
        # Norms from 0.03 to 300: clipped in some steps, left alone in others.
        size = 10.0 ** rng.uniform(-3, 1)
        grads = [(size * rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES.values()]
        lr = 1e-3 * (1 - step / STEPS)
        result = train_step([tuple(Tensor(g) for g in grads)], lr, step)
        for param, grad in zip(theirs, grads):
            param.grad = torch.tensor(grad)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm or float("inf"))
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
        for group in other.param_groups:
            group["lr"] = lr
        other.step()

    for (key, value), our, their in zip(start.items(), ours, theirs):
        our, their = our.asnumpy().astype(np.float64), their.detach().numpy().astype(np.float64)
        assert np.linalg.norm(our - their) < 1e-6 * np.linalg.norm(their), key
        assert np.linalg.norm(our - their) < 1e-4 * np.linalg.norm(their - value), key  # of the way they went


def test_state_as_in_pytorch():
    ms.set_context(mode=ms.GRAPH_MODE)
    rng = np.random.default_rng(1)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]
    ours = [Parameter(Tensor(value), key) for key, value in zip(SHAPES, start)]
    theirs = [torch.nn.Parameter(torch.tensor(value)) for value in start]
    optimizer, other = build_optimizer("adamw", ours, BETAS, EPS, DECAY), torch_optimizer("adamw", theirs)
    train_step = TrainStep(Dot(ours), optimizer)
    for step in range(5):
        grads = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]
        train_step([tuple(Tensor(g) for g in grads)], 1.0, step)
        for param, grad in zip(theirs, grads):
            param.grad = torch.tensor(grad)
        other.step()
    state = {tensor.name: tensor.asnumpy() for tensor in optimizer.state}
    for key, param in zip(SHAPES, theirs):
        assert state[f"adam_m.{key}"] == pytest.approx(other.state[param]["exp_avg"].numpy(), rel=1e-5, abs=1e-7)
        assert state[f"adam_v.{key}"] == pytest.approx(other.state[param]["exp_avg_sq"].numpy(), rel=1e-5, abs=1e-7)
