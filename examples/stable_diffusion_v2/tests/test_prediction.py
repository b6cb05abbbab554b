"""The algebra of the prediction types, at every step of every schedule, with no network."""

import numpy as np
import pytest

from ldm.config.model import ScheduleConfig
from ldm.diffusion.prediction import PREDICTIONS, get_prediction
from ldm.diffusion.schedule import BETAS, build_schedule
from ldm.errors import UserError

X0, EPS = np.random.default_rng(0).standard_normal((2, 64))  # [64] each


def shares(schedule, t=None):
    """alpha and sigma, [T, 1], at every step or at those of t."""
    t = np.arange(len(schedule)) if t is None else np.array(t)
    return schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_round_trip(name, betas):
    prediction = get_prediction(name)
    alpha, sigma = shares(build_schedule(ScheduleConfig(name=betas)))
    target = prediction.target(X0, EPS, alpha, sigma)
    x0, eps = prediction.to_x0_eps(target, alpha * X0 + sigma * EPS, alpha, sigma)
    # To get x0 out of eps the rounding of z is divided by alpha, which the cosine schedule takes down to 5e-5.
    assert np.all(np.abs(x0 - X0) <= (np.maximum(1e-12, 1e-15 / alpha) if prediction.needs_signal else 1e-12))
    assert np.abs(eps - EPS).max() < 1e-12


@pytest.mark.parametrize("name", PREDICTIONS)
def test_x0_and_eps_belong_to_z_whatever_the_network_says(name):
    alpha, sigma = shares(build_schedule(ScheduleConfig()))
    z, output = np.random.default_rng(1).standard_normal((2, 1000, 64))
    x0, eps = get_prediction(name).to_x0_eps(output, z, alpha, sigma)
    assert np.abs(alpha * x0 + sigma * eps - z).max() < 1e-12


@pytest.mark.parametrize("name", PREDICTIONS)
def test_x0_factor_relates_the_errors(name):
    prediction = get_prediction(name)
    alpha, sigma = shares(build_schedule(ScheduleConfig()), [0, 1, 250, 500, 999])
    output = prediction.target(X0, EPS, alpha, sigma) + np.full_like(alpha, 0.5)
    x0, eps = prediction.to_x0_eps(output, alpha * X0 + sigma * EPS, alpha, sigma)
    x0_loss, eps_loss = ((x0 - X0) ** 2).mean(-1, keepdims=True), ((eps - EPS) ** 2).mean(-1, keepdims=True)
    np.testing.assert_allclose(prediction.x0_factor(alpha, sigma) * x0_loss, 0.5**2 + 0 * alpha, rtol=1e-9)
    np.testing.assert_allclose(eps_loss, alpha**2 / sigma**2 * x0_loss, rtol=1e-9)


def test_v_is_the_derivative_of_z_by_the_angle():
    """With alpha = cos(phi) and sigma = sin(phi), v = dz/dphi (arXiv 2202.00512, appendix D)."""
    phi, h = np.linspace(0.1, 1.5, 8)[:, None], 1e-6
    slope = ((np.cos(phi + h) - np.cos(phi - h)) * X0 + (np.sin(phi + h) - np.sin(phi - h)) * EPS) / (2 * h)
    np.testing.assert_allclose(get_prediction("v").target(X0, EPS, np.cos(phi), np.sin(phi)), slope, atol=1e-8)


def test_v_to_x0_in_float32_keeps_the_digits_that_the_way_through_eps_loses():
    x0, eps = np.random.default_rng(2).standard_normal((2, 100_000))
    alpha, sigma = (share.item() for share in shares(build_schedule(ScheduleConfig()), [999]))
    z, v = (np.float32(a) for a in (alpha * x0 + sigma * eps, alpha * eps - sigma * x0))
    alpha, sigma = np.float32(alpha), np.float32(sigma)
    direct, through_eps = get_prediction("v").to_x0_eps(v, z, alpha, sigma)
    detour = (z - sigma * through_eps) / alpha
    rms = [np.sqrt(np.mean((guess - x0) ** 2)) for guess in (direct, detour)]
    assert rms[0] < 1e-7
    assert rms[1] > 10 * rms[0]


@pytest.mark.parametrize("name", ["epsilon", "V", ""])
def test_unknown_type_lists_the_choices(name):
    with pytest.raises(UserError, match="eps, x0, v"):
        get_prediction(name)
