"""The training step, the moving average and the resume state, with a network small enough to compile in a second."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from full_disk import files_of_at_most
from mindspore import Parameter, Tensor, nn, ops

from ldm.checkpoint import formats
from ldm.errors import UserError
from ldm.networks.layers import fill
from ldm.parallel.ranks import Ranks
from ldm.randomness import generator
from ldm.train.ema import Ema
from ldm.train.optimizer import build_optimizer
from ldm.train.state import RESUME_NAME, check_room, load_state, prune, resume_path, save_state, state_bytes
from ldm.train.step import GlobalNorm, LossScale, TrainStep

SETTINGS = {"prediction_type": "v", "betas": (0.9, 0.98), "batch": 8}


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


class Net(nn.Cell):
    """A convolution, a matrix, a bias, a scalar."""

    def __init__(self, width=6):
        super().__init__()
        rng = np.random.default_rng(3)
        shapes = {"conv": (width, 2, 3, 3), "dense": (width, 5), "bias": (5,), "scale": ()}
        for name, shape in shapes.items():
            setattr(self, name, Parameter(Tensor(0.3 * rng.standard_normal(shape), ms.float32), name))

    def construct(self, x):
        h = ops.silu(ops.conv2d(x, self.conv, pad_mode="same")).mean((2, 3))  # [B, width]
        return (ops.matmul(h, self.dense) + self.bias) * self.scale


class Loss(nn.Cell):
    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, picture, target):
        error = ((self.net(picture) - target) ** 2).mean(-1)  # [B]
        return error.mean(), error


class ByLayers:
    """All gradients of one graph, given out one by one, from the last parameter on."""

    layer_by_layer = True

    def __init__(self, loss, params):
        self.params, self.graph = params, ops.value_and_grad(loss, None, params, has_aux=True)

    def layers(self, scale, *batch):
        outputs, grads = self.graph(*batch)
        return outputs, (([param], [grad]) for param, grad in reversed(list(zip(self.params, grads))))


def make(
    optim="adamw", ema=0.99, max_grad_norm=1.0, loss_scale=None, loss=Loss, ranks=None, by_layers=False, **options
):
    net = Net()
    optimizer = build_optimizer(optim, net.get_parameters(), **options)
    average = Ema(optimizer.params, ema) if ema else None
    network = loss(net)
    gradients = ByLayers(network, optimizer.params) if by_layers else None
    return TrainStep(network, optimizer, average, max_grad_norm, loss_scale, ranks, gradients)


def batch(step, size=8):
    rng = generator(7, "data", step)
    return Tensor(rng.standard_normal((size, 2, 4, 4), np.float32)), Tensor(rng.standard_normal((size, 5), np.float32))


def train(train_step, first, last):
    return [train_step([batch(step)], 1e-2 / (1 + step), step) for step in range(first, last)]


def snapshot(train_step):
    """All that training changes, as bytes."""
    return {name: p.asnumpy().tobytes() for name, p in train_step.variables().items()}, train_step.counters()


# ---- the step ----


def test_the_loss_falls():
    train_step = make(optim="adamw", max_grad_norm=None)
    results = [train_step([batch(0)], 0.1, step) for step in range(60)]
    assert all(result.applied for result in results)
    assert results[-1].loss < 0.5 * results[0].loss
    assert results[0].extras == pytest.approx((results[0].loss,), rel=1e-6)


def test_a_view_of_a_file_is_not_trained():
    param = Parameter(Tensor(np.zeros(4, np.float32)), name="w")
    optimizer = build_optimizer("sgd", [param], (0.9, 0.999))
    for copy in (False, True):
        assert fill(param, np.frombuffer(bytes(1040), np.float32, 4, 512), copy) == copy
        if copy:
            TrainStep(nn.Cell(), optimizer)
        else:
            with pytest.raises(AssertionError, match="views of a file, first w"):
                TrainStep(nn.Cell(), optimizer)


def test_norm_and_clipping():
    """Plain gradient descent with rate 1 moves the weights by the clipped gradient."""
    moves = {}
    for limit in (None, 0.05, 1e6):
        train_step = make("sgd", ema=None, max_grad_norm=limit, betas=(0.0, 0.0), weight_decay=0.0)
        before = [p.asnumpy().astype(np.float64) for p in train_step.optimizer.params]
        result = train_step([batch(0)], 1.0, 0)
        moves[limit] = [b - p.asnumpy() for b, p in zip(before, train_step.optimizer.params)]
        moves[limit, "norm"] = result.grad_norm
    length = np.sqrt(sum((move**2).sum() for move in moves[None]))
    assert moves[None, "norm"] == moves[0.05, "norm"] == pytest.approx(length, rel=1e-5)
    assert length > 0.1
    for free, clipped, loose in zip(moves[None], moves[0.05], moves[1e6]):
        assert clipped == pytest.approx(free * 0.05 / length, rel=1e-3, abs=1e-7)
        assert np.array_equal(loose, free)


@pytest.mark.parametrize("shape", [(), (7,), (3000, 1111), (130, 120, 3, 3)])
def test_norm_is_exact_for_large_tensors(shape):
    """MindSpore's own L2Loss is 1 % off at three million values."""
    x = (np.random.default_rng(0).standard_normal(shape) * 1e-3 + 1e-3).astype(np.float32)
    wanted = np.sqrt(2 * (np.asarray(x, np.float64) ** 2).sum())
    assert GlobalNorm()(Tensor(x), Tensor(x)).asnumpy() == pytest.approx(wanted, rel=1e-6)


def test_micro_batches_are_one_large_batch():
    whole, parts = make("sgd"), make("sgd")
    for step in range(3):
        x, y = (array.asnumpy() for array in batch(step))
        a = whole([(Tensor(x), Tensor(y))], 0.1, step)
        b = parts([(Tensor(x[i : i + 2]), Tensor(y[i : i + 2])) for i in range(0, 8, 2)], 0.1, step)
        assert (b.loss, b.grad_norm, *b.extras) == pytest.approx((a.loss, a.grad_norm, *a.extras), rel=1e-5)
    assert parts.counters() == whole.counters()
    for p, q in zip(whole.variables().values(), parts.variables().values()):
        assert q.asnumpy() == pytest.approx(p.asnumpy(), rel=1e-5, abs=1e-6), p.name


def test_two_runs_have_the_same_bits():
    a, b = make(), make()
    assert train(a, 0, 10) == train(b, 0, 10)
    assert snapshot(a) == snapshot(b)


def test_pynative_mode_agrees():
    graph, native = make(), make()
    results = train(graph, 0, 3)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    for a, b in zip(results, train(native, 0, 3)):
        assert (b.loss, b.grad_norm) == pytest.approx((a.loss, a.grad_norm), rel=1e-5)
    for p, q in zip(graph.variables().values(), native.variables().values()):
        assert q.asnumpy() == pytest.approx(p.asnumpy(), rel=1e-4, abs=1e-5)


# ---- what must never reach the weights ----


class RootLoss(Loss):
    """Finite, with an infinite gradient of ``scale`` where that is 0."""

    def construct(self, picture, target):
        error = ((self.net(picture) - target) ** 2).mean(-1)
        return error.mean() + ops.sqrt(self.net.scale), error


class FarLoss(Loss):
    """Infinite, with finite gradients."""

    def construct(self, picture, target):
        error = ((self.net(picture) - target) ** 2).mean(-1)
        return error.mean() + float("inf"), error


def nothing(train_step):
    return [batch(3)]


def bad_input(train_step):
    x, y = batch(3)
    values = x.asnumpy().copy()
    values[5, 1, 2, 3] = np.nan
    return [batch(2), (Tensor(values), y)]


def bad_target(train_step):
    x, y = batch(3)
    return [(x, Tensor(np.full(y.shape, np.inf, np.float32)))]


def bad_weights(train_step):
    train_step.optimizer.params[2].set_data(Tensor(np.array([0, 0, np.nan, 0, 0], np.float32)))
    return [batch(3)]


def zero_scale(train_step):
    train_step.optimizer.params[3].set_data(Tensor(0.0, ms.float32))
    return [batch(3)]


def overflow(train_step):
    x, y = batch(3)
    return [(x, Tensor(1e25 * y.asnumpy()))]


@pytest.mark.parametrize("optim", ["adamw", "adam", "sgd"])
def test_layer_by_layer_a_step_changes_the_same(optim):
    wanted, got = (make(optim, max_grad_norm=None, by_layers=by_layers) for by_layers in (False, True))
    assert got.by_layers and not wanted.by_layers
    for step in range(4):
        (one,), (other,) = (train(train_step, step, step + 1) for train_step in (wanted, got))
        assert (one.loss, one.applied) == (other.loss, other.applied)
        np.testing.assert_allclose(one.extras, other.extras)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
    assert snapshot(got)[1] == snapshot(wanted)[1]
    for a, b in zip(wanted.variables().values(), got.variables().values()):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"optim": "muon"}, {"max_grad_norm": 1.0}, {"loss_scale": LossScale(2.0)}],
    ids=["muon", "clipping", "loss scale"],
)
def test_what_needs_all_gradients_waits_for_them(options):
    assert not make(**{"max_grad_norm": None, "by_layers": True, **options}).by_layers


def test_layer_by_layer_nothing_infinite_reaches_the_weights():
    far = make(loss=FarLoss, max_grad_norm=None, by_layers=True)
    before = snapshot(far)
    with pytest.raises(UserError, match="step 0: .* in the loss; the weights are those before"):
        train(far, 0, 1)
    assert snapshot(far) == before
    root = make(loss=RootLoss, max_grad_norm=None, by_layers=True)
    zero_scale(root)
    before = snapshot(root)
    with pytest.raises(UserError, match="step 0: .* in the gradient of scale; what was saved before is good"):
        train(root, 0, 1)
    assert snapshot(root) == before  # scale comes first


class WithAnother(Ranks):
    """Rank 0 of two, the other of which answers what is set here. The gradients' sum is left out."""

    answers: dict = {}

    def gather(self, at, value=None):
        return [value, self.answers.get(at, value)]


@pytest.mark.parametrize("far", [float("nan"), float("inf")])
def test_what_goes_wrong_on_another_rank_stops_this_one(far):
    train_step = make()
    train(train_step, 0, 2)
    before, train_step.ranks = snapshot(train_step), WithAnother()
    train_step.ranks.answers = {"loss": [far, 1.0], "NaN": (0, "the input 'picture'")}
    with pytest.raises(UserError, match="step 2: .* in the input 'picture'"):
        train(train_step, 2, 3)
    assert snapshot(train_step) == before


def test_all_ranks_go_by_the_loss_of_all_and_the_norm_of_the_first():
    train_step, other = make(), make()
    train_step.ranks = WithAnother()
    train_step.ranks.answers = {"loss": [3.0, 5.0], "norm": 1e9}
    (ours,), (alone,) = train(train_step, 0, 1), train(other, 0, 1)
    assert (ours.loss, ours.extras[0]) == pytest.approx(((alone.loss + 3) / 2, (alone.extras[0] + 5) / 2))
    assert ours.grad_norm == alone.grad_norm and snapshot(train_step) == snapshot(other)


@pytest.mark.parametrize(
    "spoil, loss, named",
    [
        (bad_input, Loss, "the input 'picture'"),
        (bad_target, Loss, "the input 'target'"),
        (bad_weights, Loss, "the weights bias"),
        (zero_scale, RootLoss, "the gradient of scale"),
        (overflow, Loss, "the loss"),
        (nothing, FarLoss, "the loss"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(spoil, loss, named):
    train_step = make(loss=loss)
    if loss is Loss:
        train(train_step, 0, 2)
    batches = spoil(train_step)
    before = snapshot(train_step)
    with pytest.raises(UserError) as error:
        train_step(batches, 1e-2, 1234)
    assert "step 1234" in str(error.value) and named in str(error.value)
    assert snapshot(train_step) == before


def test_training_goes_on_after_a_refused_step():
    interrupted, straight = make(), make()
    train(interrupted, 0, 2)
    with pytest.raises(UserError):
        interrupted(bad_input(interrupted), 1e-2, 2)
    train(interrupted, 2, 4)
    train(straight, 0, 4)
    assert snapshot(interrupted) == snapshot(straight)


def test_loss_scale_changes_no_number_that_matters():
    plain, scaled = make(), make(loss_scale=LossScale(1024.0))
    for a, b in zip(train(plain, 0, 3), train(scaled, 0, 3)):
        assert (b.loss, b.grad_norm, *b.extras) == pytest.approx((a.loss, a.grad_norm, *a.extras), rel=1e-5)
    for p, q in zip(plain.optimizer.params, scaled.optimizer.params):
        assert q.asnumpy() == pytest.approx(p.asnumpy(), rel=1e-4, abs=1e-6)


def test_loss_scale_falls_on_overflow_and_rises_again():
    scale = LossScale(2.0**127, window=3)
    train_step = make(loss_scale=scale)
    before = snapshot(train_step)[0]
    result = train_step([batch(0)], 1e-2, 0)  # the squares in the norm overflow float32
    assert not result.applied and scale.value == 2.0**126
    assert snapshot(train_step)[0] == before and train_step.optimizer.updates == 0
    for step in range(100):
        if train_step([batch(0)], 1e-2, step).applied:
            break
    found = scale.value
    assert 2.0**40 < found < 2.0**70
    train(train_step, 0, 2)
    assert scale.value == 2 * found and train_step.optimizer.updates == 3


def test_loss_scale_gives_up_at_one():
    train_step = make(loss_scale=LossScale(4.0, window=3))
    x, y = batch(0)
    steep = [(Tensor(x.asnumpy() * 1e15), y)]  # the loss is finite, the squares of its gradient are not
    assert not train_step(steep, 1e-2, 0).applied
    assert not train_step(steep, 1e-2, 1).applied
    with pytest.raises(UserError, match="step 2"):
        train_step(steep, 1e-2, 2)


def test_no_loss_scale_mends_a_loss_that_is_not_finite():
    train_step = make(loss_scale=LossScale(4.0, window=3))
    x, y = batch(0)
    with pytest.raises(UserError, match="step 7.*the input 'target'"):
        train_step([(x, Tensor(np.full(y.shape, np.nan, np.float32)))], 1e-2, 7)
    assert train_step.loss_scale.value == 4.0


def test_a_limit_on_the_norm_must_be_positive():
    with pytest.raises(UserError, match="max_grad_norm"):
        make(max_grad_norm=0.0)


# ---- the moving average ----


def test_average_follows_its_formula():
    train_step = make(ema=0.5)
    shadow = {p.name: p.asnumpy().astype(np.float64) for p in train_step.optimizer.params}
    for step in range(12):
        train(train_step, step, step + 1)
        n = step + 1
        d = min(0.5, (1 + n) / (10 + n))  # reaches 0.5 at n = 8
        for p in train_step.optimizer.params:
            shadow[p.name] = d * shadow[p.name] + (1 - d) * p.asnumpy()
    got = train_step.ema.tensors()
    assert list(got) == ["conv", "dense", "bias", "scale"]
    for name, wanted in shadow.items():
        assert got[name] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_average_starts_as_a_copy_and_is_apart():
    train_step = make()
    start = {p.name: p.asnumpy().copy() for p in train_step.optimizer.params}
    assert all(np.array_equal(value, start[name]) for name, value in train_step.ema.tensors().items())
    assert [p.name for p in train_step.ema.state] == [f"ema.{name}" for name in start]
    kept = train_step.ema.tensors()
    train(train_step, 0, 1)
    assert all(np.array_equal(kept[name], start[name]) for name in start), "tensors() gives copies"
    assert not np.array_equal(train_step.ema.tensors()["conv"], start["conv"])
    assert not np.array_equal(train_step.ema.tensors()["conv"], train_step.optimizer.params[0].asnumpy())


def test_own_weights_survive_the_use_of_the_average():
    used, untouched = make(), make()
    train(used, 0, 3)
    train(untouched, 0, 3)
    before = snapshot(used)
    with used.ema.applied():
        inside = {p.name: p.asnumpy() for p in used.optimizer.params}
        assert all(np.array_equal(inside[name], value) for name, value in used.ema.tensors().items())
        with pytest.raises(AssertionError):
            train(used, 3, 4)
        with pytest.raises(AssertionError):
            save_state(os.devnull, used, {}, {})
    assert snapshot(used) == before
    with pytest.raises(KeyError), used.ema.applied():
        raise KeyError
    assert snapshot(used) == before
    train(used, 3, 6)
    train(untouched, 3, 6)
    assert snapshot(used) == snapshot(untouched)


def test_average_is_what_a_compiled_network_computes_with():
    net = Net()
    ema = Ema(net.get_parameters(), 0.9)
    x, _ = batch(0)
    before = net(x).asnumpy()
    for shadow in ema.state:
        shadow.set_data(Tensor(np.zeros(shadow.shape, np.float32)))
    with ema.applied():
        assert not net(x).asnumpy().any()
    assert np.array_equal(net(x).asnumpy(), before)


def test_decay_out_of_range():
    with pytest.raises(UserError, match="ema_decay"):
        make(ema=1.0)


# ---- the resume state ----


@pytest.mark.parametrize("optim, ema", [("adamw", 0.99), ("sgd", None)])
def test_resumed_run_equals_the_straight_one(tmp_path, optim, ema):
    straight, first, second = (make(optim, ema, loss_scale=LossScale(8.0, window=7)) for _ in range(3))
    results = train(straight, 0, 20)
    train(first, 0, 10)
    progress = {"step": 10, "epoch": 1, "best": 0.1 + 0.2, "written": ["sd-1.ckpt"]}
    save_state(tmp_path / RESUME_NAME, first, progress, SETTINGS)
    train(second, 0, 1)  # something else, already compiled
    assert load_state(tmp_path / RESUME_NAME, second, SETTINGS) == progress
    assert snapshot(second) == snapshot(first)
    assert train(second, 10, 20) == results[10:]
    assert snapshot(second) == snapshot(straight)
    assert second.loss_scale.value > 8


def run_until_killed(path):
    """In another process: train, and write the state after every step from the tenth on."""
    ms.set_context(mode=ms.GRAPH_MODE)
    train_step = make()
    for step in range(10**6):
        train(train_step, step, step + 1)
        if step >= 9:
            save_state(path, train_step, {"step": step + 1}, SETTINGS)


def test_killed_run_goes_on_exactly(tmp_path):
    """kill -9 wherever it is, in a step or in writing; then a new process goes on from what is there."""
    path, tests = tmp_path / RESUME_NAME, Path(__file__).parent
    code = f"import test_train_parts as t; t.run_until_killed({str(path)!r})"
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    resumed, straight = make(), make()
    step = load_state(path, resumed, SETTINGS)["step"]
    assert step >= 10
    train(straight, 0, step)
    assert snapshot(resumed) == snapshot(straight)
    train(resumed, step, step + 10)
    train(straight, step, step + 10)
    assert snapshot(resumed) == snapshot(straight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    ms.set_context(mode=ms.GRAPH_MODE)
    train_step = make()
    train(train_step, 0, 2)
    path = tmp_path_factory.mktemp("state") / RESUME_NAME
    save_state(path, train_step, {"step": 2}, SETTINGS)
    return train_step, path


def refuses(path, train_step, settings, *words):
    before = snapshot(train_step)
    with pytest.raises(UserError) as error:
        load_state(path, train_step, settings)
    assert all(word in str(error.value) for word in (*words, Path(path).name)), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    assert snapshot(train_step) == before


def test_other_settings_are_refused_by_name(saved):
    _, path = saved
    assert load_state(path, make(), SETTINGS) == {"step": 2}
    refuses(path, make(), {**SETTINGS, "prediction_type": "eps"}, "prediction_type was 'v' and is now 'eps'")
    refuses(path, make(), {**SETTINGS, "new": 1}, "new")
    refuses(path, make(), {"batch": 8}, "betas", "prediction_type")


def test_states_from_before_a_setting_was_kept_are_resumed(saved, tmp_path):
    train_step, path = saved
    now = {**SETTINGS, "data": "1", "frozen": "2", "vae.force_upcast": False, "text.projection": None}
    assert load_state(path, make(), now) == {"step": 2}
    save_state(tmp_path / "new.safetensors", train_step, {"step": 2}, now)
    assert load_state(tmp_path / "new.safetensors", make(), now) == {"step": 2}
    refuses(tmp_path / "new.safetensors", make(), {**now, "data": "3"}, "data was '1' and is now '3'")


NAN_STEP = {"step": math.nan, "written": []}
RECORD_DAMAGES = {  # what becomes of the JSON text beside the tensors
    "no JSON": lambda record: "not JSON",
    "cut off": lambda record: json.dumps(record)[:-9],
    "a list": lambda record: json.dumps([record]),
    "a number": lambda record: "7",
    "brackets": lambda record: "[" * 100_000,
    "an empty table": lambda record: "{}",
    "no settings": lambda record: json.dumps({**record, "settings": None}),
    "settings that are a list": lambda record: json.dumps({**record, "settings": [1]}),
    "no version": lambda record: json.dumps({**record, "version": None}),
    "a version in words": lambda record: json.dumps({**record, "version": "one"}),
    "no step": lambda record: json.dumps({**record, "progress": {}}),
    "a step that is no number": lambda record: json.dumps({**record, "progress": NAN_STEP}),
    "a step below zero": lambda record: json.dumps({**record, "progress": {"step": -1}}),
    "a huge step": lambda record: json.dumps({**record, "progress": {"step": 10**30}}),
    "other files to delete": lambda record: json.dumps(
        {**record, "progress": {"step": 2, "written": ["../sd-1.ckpt"]}}
    ),
    "written is a word": lambda record: json.dumps({**record, "progress": {"step": 2, "written": "sd-1.ckpt"}}),
    "no counters": lambda record: json.dumps({**record, "counters": {}}),
    "a counter in words": lambda record: json.dumps({**record, "counters": {**record["counters"], "updates": "2\n"}}),
    "a scale that is no number": lambda record: json.dumps(
        {**record, "counters": {**record["counters"], "loss_scale": math.nan}}
    ),
    "a scale without end": lambda record: json.dumps(
        {**record, "counters": {**record["counters"], "loss_scale": math.inf}}
    ),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGES)
def test_a_damaged_record_is_one_line(saved, tmp_path, damage):
    _, path = saved
    tensors, strings, _ = formats.read(path)
    text = RECORD_DAMAGES[damage](json.loads(strings["train_state"]))
    formats.write(tmp_path / RESUME_NAME, tensors, {"train_state": text}, "safetensors")
    refuses(tmp_path / RESUME_NAME, make(), SETTINGS, "is damaged: ", "start from its last checkpoint")


TENSOR_DAMAGES = {  # what becomes of the tensors, and what the line says
    "one missing": (lambda t: {n: a for n, a in t.items() if n != "conv"}, "missing 1 (first: conv)"),
    "one too many": (lambda t: {**t, "x": t["conv"]}, "unexpected 1 (first: x)"),
    "another shape": (lambda t: {**t, "conv": t["conv"][:3]}, "wrong shape 1"),
    "whole numbers": (lambda t: {**t, "conv": t["conv"].astype(np.int32)}, "is damaged: conv is int32"),
    "half as wide": (lambda t: {**t, "conv": t["conv"].astype(np.float16)}, "is damaged: conv is float16"),
    "none of them": (lambda t: {"conv": t["conv"]}, "missing"),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES)
def test_damaged_tensors_are_one_line(saved, tmp_path, damage):
    _, path = saved
    tensors, strings, _ = formats.read(path)
    change, words = TENSOR_DAMAGES[damage]
    formats.write(tmp_path / RESUME_NAME, change(tensors), strings, "safetensors")
    refuses(tmp_path / RESUME_NAME, make(), SETTINGS, words)


@pytest.mark.parametrize("size", [0, 1, 8, 40, 700, -1])
def test_a_state_that_is_cut_is_one_line(saved, tmp_path, size):
    (tmp_path / RESUME_NAME).write_bytes(saved[1].read_bytes()[:size])
    refuses(tmp_path / RESUME_NAME, make(), SETTINGS)


def test_long_words_in_a_state_are_cut(saved, tmp_path):
    tensors, strings, _ = formats.read(saved[1])
    record = json.loads(strings["train_state"])
    record["settings"]["prediction_type"], record["settings"]["x\n" * 10**6] = "v\n" * 10**6, [1] * 10**5
    formats.write(tmp_path / RESUME_NAME, tensors, {"train_state": json.dumps(record)}, "safetensors")
    refuses(tmp_path / RESUME_NAME, make(), SETTINGS, "belongs to a run with other settings")


def test_states_of_other_networks_and_optimizers_are_refused(saved):
    _, path = saved
    other = Net(width=7)
    optimizer = build_optimizer("adamw", other.get_parameters())
    refuses(path, TrainStep(Loss(other), optimizer, Ema(optimizer.params)), SETTINGS, "conv")
    refuses(path, make("sgd"), SETTINGS, "momentum")
    refuses(path, make(ema=None), SETTINGS, "ema.conv")


def test_unfit_files_are_refused(saved, tmp_path):
    train_step, path = saved
    whole = path.read_bytes()
    refuses(tmp_path / "none.safetensors", train_step, SETTINGS, "does not exist")
    for name, content in {
        "half": whole[: len(whole) // 2],
        "almost": whole[:-1],
        "head": whole[:100],
        "empty": b"",
        "text": b"no checkpoint at all, only words",
        "longer": whole + b"\0",
    }.items():
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, train_step, SETTINGS)
    weights = {p.name: p.asnumpy() for p in train_step.optimizer.params}
    formats.write(tmp_path / "weights.safetensors", weights, {"prediction_type": "v"}, "safetensors")
    refuses(tmp_path / "weights.safetensors", train_step, SETTINGS, "not a resume state")


def test_full_disk_leaves_the_old_state(saved, tmp_path):
    train_step, _ = saved
    path = tmp_path / RESUME_NAME
    save_state(path, train_step, {"step": 2}, SETTINGS)
    old = path.read_bytes()
    with pytest.raises(UserError, match=RESUME_NAME), files_of_at_most(len(old) // 2):
        save_state(path, train_step, {"step": 3}, SETTINGS)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [RESUME_NAME]


def test_where_the_state_is_looked_for(tmp_path):
    own, other = tmp_path / "run" / "ckpt", tmp_path / "other.v1"
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / RESUME_NAME).touch()
    for no in ("False", "", "none", False):
        assert resume_path(no, own) is None
    assert resume_path("True", own) == resume_path(True, own) == own / RESUME_NAME
    assert resume_path(str(other), own) == other / RESUME_NAME
    for missing in ("my.safetensors", "empty"):
        with pytest.raises(UserError, match="cannot resume.*does not exist"):
            resume_path(str(tmp_path / missing), own)
    (tmp_path / "train_resume.bak").touch()
    assert resume_path(str(tmp_path / "train_resume.bak"), own) == tmp_path / "train_resume.bak"


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(tmp_path):
    train_step = make()
    assert state_bytes(train_step) == sum(v.asnumpy().nbytes for v in train_step.variables().values())
    check_room(tmp_path, state_bytes(train_step))
    with pytest.raises(UserError, match="GiB of disk left.*make room"):
        check_room(tmp_path, 1 << 60)
    with open(tmp_path / RESUME_NAME, "wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no room
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, free + (1 << 39), tmp_path / RESUME_NAME, tmp_path / "not there")
    with pytest.raises(UserError, match="make room"):
        check_room(tmp_path, free + (1 << 39))


@pytest.mark.parametrize(("value", "window"), [(0, 1000), (-1, 0), (math.nan, 0), (math.inf, 1000), (1024, -1)])
def test_a_loss_scale_that_cannot_work(value, window):
    with pytest.raises(UserError, match="init_loss_scale"):
        LossScale(value, window)


def test_only_own_old_checkpoints_are_deleted(tmp_path):
    files = ["sd-1.ckpt", "sd-2.ckpt", "sd-3.safetensors", "sd-4.ckpt", "sd-99.ckpt", "best.ckpt", RESUME_NAME]
    for name in files:
        (tmp_path / name).touch()
    written = ["sd-2.ckpt", "sd-3.safetensors", "sd-4.ckpt"]
    assert prune(tmp_path, written, 0) == prune(tmp_path, written, 5) == written
    assert sorted(os.listdir(tmp_path)) == sorted(files)
    assert prune(tmp_path, written, 2) == ["sd-3.safetensors", "sd-4.ckpt"]
    assert sorted(set(files) - set(os.listdir(tmp_path))) == ["sd-2.ckpt"]
    (tmp_path / "sd-3.safetensors").unlink()  # by the user: no error
    assert prune(tmp_path, ["sd-3.safetensors", "sd-4.ckpt", "sd-5.ckpt", "sd-4.ckpt"], 1) == ["sd-4.ckpt"]
    assert (tmp_path / "sd-4.ckpt").exists()
    for name in ("step5", "step10", "steps.deleted"):
        (tmp_path / name / "unet").mkdir(parents=True)
    assert prune(tmp_path, ["step5", "step10"], 1) == ["step10"]
    assert (
        not (tmp_path / "step5").exists() and (tmp_path / "step10").exists() and (tmp_path / "steps.deleted").exists()
    )
    with pytest.raises(ValueError):
        prune(tmp_path, ["best.ckpt", "sd-4.ckpt"], 1)
    assert (tmp_path / "best.ckpt").exists()


def test_a_checkpoint_is_whole_or_gone(tmp_path, monkeypatch):
    """A kill in the middle of deleting a folder leaves nothing that could be taken for a checkpoint."""
    for name in ("sd-1", "sd-2"):
        (tmp_path / name / "unet").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, ["sd-1", "sd-2"], 1)
    assert not (tmp_path / "sd-1").exists() and (tmp_path / "sd-2").exists()
    prune(tmp_path, ["sd-2"], 1)
    prune(tmp_path, ["sd-2", "sd-3"], 1)
    assert not any(path.name.startswith("sd-1") for path in tmp_path.iterdir())
