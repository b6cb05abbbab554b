"""The training loss, its weights and gradients, and the denoiser, in graph mode with networks of two parameters."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from ldm.conditioning import Condition
from ldm.config.model import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import PREDICTIONS, get_prediction
from ldm.diffusion.samplers import get_sampler
from ldm.diffusion.schedule import NoiseSchedule, build_schedule
from ldm.diffusion.weighting import WEIGHTINGS, loss_weight
from ldm.errors import UserError

SD = build_schedule(ScheduleConfig())
ZERO = build_schedule(ScheduleConfig(zero_terminal_snr=True))
SHAPE = (4, 3, 2, 5)  # [B, C, H, W]
T = np.array([0, 3, 500, 999], np.int32)


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


class Linear(nn.Cell):
    """a z + b mean(context) + t / 1000: every input counts, and the gradients are known."""

    def __init__(self, a=0.4, b=-0.7):
        super().__init__()
        self.a, self.b = Parameter(Tensor(a, ms.float32), "a"), Parameter(Tensor(b, ms.float32), "b")

    def construct(self, z, t, context):
        share = self.b * context.mean((1, 2)) + t.astype(ms.float32) / 1000  # [B]
        return self.a * z + share.reshape(-1, 1, 1, 1)


class Guess(nn.Cell):
    """Takes x0 for known, and returns what a network of that prediction type should."""

    def __init__(self, x0, prediction):
        super().__init__()
        self.x0, self.target = Parameter(Tensor(x0, ms.float32), "x0"), prediction.target
        t = np.arange(1000)
        self.alpha = Tensor(SD.alpha(t)[:, None, None, None], ms.float32)
        self.sigma = Tensor(SD.sigma(t)[:, None, None, None], ms.float32)

    def construct(self, z, t, context):
        t = t.astype(ms.int32)
        alpha, sigma = self.alpha[t], self.sigma[t]
        return self.target(self.x0, (z - alpha * self.x0) / sigma, alpha, sigma)


@pytest.fixture
def batch():
    """latents, eps, t, weight, context."""
    rng = np.random.default_rng(0)
    latents, context, eps = (rng.standard_normal(shape).astype(np.float32) for shape in (SHAPE, (4, 7, 6), SHAPE))
    return [latents, eps, T, np.ones(4, np.float32), context]


def expected(batch, prediction, weight, a, b):
    """The loss of `Linear` in float64."""
    x0, eps, t, _, context = (array.astype(np.float64) for array in batch)
    alpha, sigma = (share[:, None, None, None] for share in (SD.alpha(t), SD.sigma(t)))
    output = a * (alpha * x0 + sigma * eps) + (b * context.mean((1, 2)) + t / 1000)[:, None, None, None]
    squared = (output - prediction.target(x0, eps, alpha, sigma)) ** 2
    return (weight[T] * squared.mean((1, 2, 3))).mean()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_value_and_gradient(name, weighting, batch):
    prediction = get_prediction(name)
    weight = loss_weight(weighting, SD, prediction)
    batch[3] = weight[T].astype(np.float32)
    loss = DiffusionLoss(Linear(), SD, prediction)
    grad = ms.value_and_grad(loss, None, loss.trainable_params(), has_aux=True)
    (value, x0_loss, eps_loss), slopes = grad(*map(Tensor, batch))
    assert value.dtype == ms.float32 and x0_loss.shape == eps_loss.shape == (4,)
    a, b, h = 0.4, -0.7, 1e-5
    np.testing.assert_allclose(value.asnumpy(), expected(batch, prediction, weight, a, b), rtol=1e-5)
    for slope, da, db in zip(slopes, (h, 0), (0, h)):
        up, down = (expected(batch, prediction, weight, a + sign * da, b + sign * db) for sign in (1, -1))
        np.testing.assert_allclose(slope.asnumpy(), (up - down) / (2 * h), rtol=1e-4, atol=1e-6)


def test_a_perfect_network_has_no_loss_and_types_can_be_compared(batch):
    for prediction in PREDICTIONS.values():
        network = Guess(batch[0], prediction)
        loss = DiffusionLoss(network, SD, prediction)
        assert loss(*map(Tensor, batch))[0].asnumpy() < 1e-10
        network.x0.set_data(network.x0 + 0.25)  # whatever the network predicts, it is wrong by as much
        value, x0_loss, eps_loss = (out.asnumpy() for out in loss(*map(Tensor, batch)))
        np.testing.assert_allclose(x0_loss, 0.25**2, rtol=1e-4)
        np.testing.assert_allclose(eps_loss, 0.25**2 * np.exp(SD.log_snr(T)), rtol=1e-4)
        np.testing.assert_allclose(value, (prediction.x0_factor(SD.alpha(T), SD.sigma(T)) * x0_loss).mean(), rtol=1e-4)


def test_min_snr_values():
    t = np.arange(1000)
    snr = np.exp(SD.log_snr(t))
    weight = {name: loss_weight("min_snr", SD, get_prediction(name), gamma=5.0) for name in PREDICTIONS}
    np.testing.assert_allclose(weight["eps"], np.minimum(snr, 5) / snr, rtol=1e-9)
    np.testing.assert_allclose(weight["x0"], np.minimum(snr, 5), rtol=1e-9)
    np.testing.assert_allclose(weight["v"], np.minimum(snr, 5) / (snr + 1), rtol=1e-9)
    for prediction in PREDICTIONS.values():
        np.testing.assert_array_equal(loss_weight("none", SD, prediction), np.ones(1000))
    with pytest.raises(UserError, match="none, min_snr"):
        loss_weight("min-snr", SD, get_prediction("v"))
    with pytest.raises(UserError, match="positive"):
        loss_weight("min_snr", SD, get_prediction("v"), gamma=0.0)


def test_weightings_of_progressive_distillation():
    snr = np.exp(SD.log_snr(np.arange(1000)))
    for name, of_x0 in (("truncated_snr", np.maximum(snr, 1)), ("snr_plus_one", snr + 1)):
        for prediction, factor in (("eps", snr), ("x0", 1), ("v", snr + 1)):
            weight = loss_weight(name, SD, get_prediction(prediction))
            np.testing.assert_allclose(weight, of_x0 / factor, rtol=1e-9)
    for name in ("truncated_snr", "snr_plus_one"):
        without_signal = [loss_weight(name, ZERO, get_prediction(prediction))[-1] for prediction in ("x0", "v")]
        assert without_signal == [1.0, 1.0]
    ends = NoiseSchedule(np.array([1 - 1e-12, 1e-300]))  # almost without noise, and almost without signal
    for name in ("truncated_snr", "snr_plus_one"):
        np.testing.assert_allclose(loss_weight(name, ends, get_prediction("v")), [1, 1], rtol=1e-9)
        np.testing.assert_allclose(loss_weight(name, ends, get_prediction("x0")), [1e12, 1], rtol=1e-3)
    assert loss_weight("truncated_snr", ends, get_prediction("eps"))[0] == 1


def test_last_step_without_signal(batch):
    v = get_prediction("v")
    loss = DiffusionLoss(Linear(), ZERO, v)
    assert all(np.isfinite(out.asnumpy()).all() for out in loss(*map(Tensor, batch)))
    for refused in (
        lambda: DiffusionLoss(Linear(), ZERO, get_prediction("eps")),
        lambda: loss_weight("none", ZERO, get_prediction("eps")),
        lambda: Denoiser(Linear(), ZERO, get_prediction("eps"), Condition(batch[4])),
    ):
        with pytest.raises(UserError, match="zero_terminal_snr"):
            refused()


def contexts():
    drawn = (np.random.default_rng(seed).standard_normal((4, 7, 6)) for seed in (1, 2))
    return [Condition(context.astype(np.float32)) for context in drawn]


@pytest.mark.parametrize("name", PREDICTIONS)
def test_guidance_goes_on_the_straight_line_from_uncond_to_cond(name):
    x = np.random.default_rng(3).standard_normal(SHAPE)
    (cond, uncond), network, prediction = contexts(), Linear(), get_prediction(name)
    without, with_, guided = (
        np.stack(Denoiser(network, SD, prediction, cond, uncond, scale)(x, 500)) for scale in (0, 1, 7.5)
    )
    np.testing.assert_allclose(guided, without + 7.5 * (with_ - without), atol=1e-5)
    swapped = np.stack(Denoiser(network, SD, prediction, uncond)(x, 500))
    np.testing.assert_allclose(swapped, without, atol=1e-6)
    assert np.abs(with_ - without).max() > 0.01
    assert guided.dtype == np.float64 and guided.shape == (2, *SHAPE)
    alpha, sigma = SD.alpha(500), SD.sigma(500)
    np.testing.assert_allclose(alpha * guided[0] + sigma * guided[1], x, atol=1e-12)


@pytest.mark.parametrize(("scale", "count"), [(1.0, 4), (7.5, 8)])
def test_one_call_per_step(scale, count):
    calls = []

    def network(x, t, context):
        calls.append((x.shape, x.dtype, t.dtype, t.asnumpy().tolist(), context.shape))
        return x

    Denoiser(network, SD, get_prediction("v"), *contexts(), scale)(np.zeros(SHAPE), 20.5)
    assert calls == [((count, *SHAPE[1:]), ms.float32, ms.float32, [20.5] * count, (count, 7, 6))]


def test_guidance_in_an_interval_of_the_noise_level():
    """Outside it the network runs with caption alone, and the estimate is the one without guidance."""
    x, sizes, linear = np.random.default_rng(3).standard_normal(SHAPE), [], Linear()

    def network(z, t, context):
        sizes.append(len(z))
        return linear(z, t, context)

    ends = np.array([300.5, 600.5])
    levels = tuple(SD.sigma(ends) / SD.alpha(ends))
    words = network, SD, get_prediction("v"), *contexts(), 7.5, 0.3
    some, everywhere = Denoiser(*words, levels), Denoiser(*words)
    plain = Denoiser(*words[:4])
    for t, guided in ((299, False), (300, False), (301, True), (600, True), (601, False), (999, False)):
        sizes.clear()
        np.testing.assert_array_equal(some(x, t), (everywhere if guided else plain)(x, t))
        assert sizes[0] == SHAPE[0] * (2 if guided else 1)
    np.testing.assert_array_equal(some.scale_at(np.array([100, 400, 900])).ravel(), [1, 7.5, 1])
    assert (Denoiser(*words, (0, np.inf)).scale_at(999) == 7.5).all()
    zero = Denoiser(network, ZERO, get_prediction("v"), *contexts(), 7.5, 0.0, (0, np.inf))
    assert (zero.scale_at(999) == 7.5).all()
    assert (Denoiser(network, ZERO, *words[2:6], 0.0, (0, 1e6)).scale_at(999) == 1).all()


def test_nan_names_the_time():
    denoise = Denoiser(Linear(a=np.nan), SD, get_prediction("v"), contexts()[0])
    with pytest.raises(UserError, match="t = 981.*float32"):
        denoise(np.zeros(SHAPE), 981)
    one_bad = Denoiser(lambda z, t, context: z, SD, get_prediction("v"), contexts()[0])
    z = np.zeros(SHAPE)
    z[2] = np.inf
    with pytest.raises(UserError, match="t = 7.0:"):
        one_bad(z, np.array([981, 3, 7.0, 20]))


def test_denoiser_refuses_what_it_cannot_mean():
    denoise = Denoiser(Linear(), SD, get_prediction("v"), contexts()[0])
    with pytest.raises(AssertionError, match="as many latents"):
        denoise(np.zeros((3, *SHAPE[1:])), 500)
    with pytest.raises(AssertionError, match="one negative prompt"):
        Denoiser(Linear(), SD, get_prediction("v"), contexts()[0], Condition(contexts()[1].context[:1]), 3.0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_sampling_with_a_perfect_network_gives_the_data(name):
    x0 = np.random.default_rng(4).standard_normal(SHAPE)
    prediction = get_prediction(name)
    denoise = Denoiser(Guess(x0, prediction), SD, prediction, contexts()[0])
    x, sampler = np.random.default_rng(5).standard_normal(SHAPE), get_sampler("dpm_solver_pp", SD, spacing="trailing")
    np.testing.assert_allclose(sampler(denoise, x, sampler.times(SD, 8), SD), x0, atol=1e-5)


def test_every_field_of_a_condition_reaches_the_network():
    """As a pooled text's features do: they are joined and guided like the text's own."""
    calls = []

    def network(x, t, context, vector):
        calls.append((context.asnumpy(), vector.asnumpy()))
        return x

    cond, uncond = (Condition(np.full((4, 2, 3), n, np.float32), np.full((4, 5), -n, np.float32)) for n in (1, 2))
    Denoiser(network, SD, get_prediction("v"), cond, uncond, 3.0)(np.zeros(SHAPE), 20)
    for got, n in zip(calls[0], (1, -1)):
        assert len(got) == 8 and (got[:4] == 2 * n).all() and (got[4:] == n).all()
