"""The noise schedule's tables, and the times that are sampled."""

import itertools

import numpy as np
import pytest

from ldm.config.model import ScheduleConfig
from ldm.diffusion.prediction import PREDICTIONS, get_prediction
from ldm.diffusion.schedule import BETAS, CLEAN, build_schedule
from ldm.diffusion.spacing import LEVELS, SPACINGS, TIMES, sampling_times
from ldm.errors import UserError

ALL = [{"name": name} for name in BETAS] + [{"zero_terminal_snr": True}]


@pytest.mark.parametrize("fields", ALL, ids=str)
def test_shares(fields):
    schedule = build_schedule(ScheduleConfig(**fields))
    t = np.arange(CLEAN, len(schedule))
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    assert alpha.dtype == sigma.dtype == log_snr.dtype == np.float64
    assert np.abs(alpha**2 + sigma**2 - 1).max() < 1e-15
    assert alpha[0] == 1 and sigma[0] == 0 and log_snr[0] == np.inf
    assert (np.diff(alpha) < 0).all() and (np.diff(sigma) > 0).all() and (np.diff(log_snr) < 0).all()
    inside = slice(1, -1)
    np.testing.assert_allclose(np.exp(log_snr[inside]), (alpha[inside] / sigma[inside]) ** 2, rtol=1e-9)


def test_stable_diffusion_numbers():
    """The first and last alpha_bar of SD's table, and the share of the image in its last step."""
    schedule = build_schedule(ScheduleConfig())
    assert len(schedule) == 1000
    np.testing.assert_allclose(schedule.alpha([0, 999]) ** 2, [0.99915, 0.004660095], rtol=1e-6)
    assert schedule.alpha(999) == pytest.approx(0.0682648, abs=1e-6)


def test_products_of_betas():
    schedule = build_schedule(ScheduleConfig(name="linear", beta_start=1e-4, beta_end=0.02))
    np.testing.assert_allclose(1 - (schedule.alpha(500) / schedule.alpha(499)) ** 2, 1e-4 + 500 / 999 * 0.0199)
    cosine = build_schedule(ScheduleConfig(name="squaredcos_cap_v2"))
    np.testing.assert_allclose(
        cosine.alpha(499), np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    )
    np.testing.assert_allclose(1 - (cosine.alpha(999) / cosine.alpha(998)) ** 2, 0.999)


@pytest.mark.parametrize("fields", ALL, ids=str)
def test_fractional_times_lie_between_whole_ones(fields):
    schedule = build_schedule(ScheduleConfig(**fields))
    t = np.arange(len(schedule) - 1)
    for function in (schedule.alpha, schedule.sigma):
        np.testing.assert_array_equal(function(t.astype(float)), function(t))
        low, middle, high = np.sort([function(t), function(t + 0.5), function(t + 1)], axis=0)
        assert (low < middle).all() and (middle < high).all()
        np.testing.assert_array_equal(middle, function(t + 0.5))
    assert np.isfinite(schedule.log_snr(t + 0.999)).all()


@pytest.mark.parametrize("t", [-2, -1.5, 999.01, 1000])
def test_time_outside_is_an_error(t):
    with pytest.raises(ValueError, match="outside"):
        build_schedule(ScheduleConfig()).alpha(t)


def test_zero_terminal_snr():
    plain = build_schedule(ScheduleConfig())
    zero = build_schedule(ScheduleConfig(zero_terminal_snr=True))
    assert zero.zero_terminal_snr and not plain.zero_terminal_snr
    assert zero.alpha(999) == 0 and zero.sigma(999) == 1 and zero.log_snr(999) == -np.inf
    assert zero.alpha(0) == pytest.approx(plain.alpha(0), rel=1e-15)
    t = np.arange(1000)
    bend = np.polyfit(plain.alpha(t), zero.alpha(t), 1)  # shifted and scaled: a straight line
    np.testing.assert_allclose(np.polyval(bend, plain.alpha(t)), zero.alpha(t), atol=1e-12)


def test_zero_terminal_snr_refuses_a_prediction_that_needs_signal():
    schedule = build_schedule(ScheduleConfig(zero_terminal_snr=True))
    with pytest.raises(UserError, match="noise alone.*'x0' or 'v'"):
        schedule.check(get_prediction("eps"))
    schedule.check(get_prediction("x0"))
    schedule.check(get_prediction("v"))
    for prediction in PREDICTIONS.values():
        build_schedule(ScheduleConfig()).check(prediction)


def test_zero_terminal_snr_refuses_a_spacing_that_misses_the_last_step():
    schedule = build_schedule(ScheduleConfig(zero_terminal_snr=True))
    with pytest.raises(UserError, match="trailing"):
        sampling_times("leading", 7, schedule)
    for spacing in set(SPACINGS) - {"leading"}:
        assert sampling_times(spacing, 7, schedule)[0] == 999


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1000, 50, 7, 2])
def test_every_number_of_timesteps(spacing, steps):
    schedule = build_schedule(ScheduleConfig(timesteps=steps))
    for n in range(1, steps + 1):
        times = sampling_times(spacing, n, schedule)
        assert times.dtype == np.float64 and times.shape == (n,)
        assert spacing == "uniform" or spacing in LEVELS or (times == np.round(times)).all()
        assert (np.diff(times) < 0).all() and times[-1] >= 0 and times[0] < steps
        if spacing != "leading":
            assert times[0] == steps - 1
    if spacing in TIMES:
        np.testing.assert_array_equal(sampling_times(spacing, steps, schedule), np.arange(steps)[::-1])


@pytest.mark.parametrize(
    ("spacing", "n", "times"),
    [
        ("leading", 5, [801, 601, 401, 201, 1]),
        ("leading", 1, [1]),
        ("trailing", 5, [999, 799, 599, 399, 199]),
        ("trailing", 3, [999, 666, 332]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("linspace", 1, [999]),
        ("lcm", 4, [999, 759, 499, 259]),  # diffusers' for latent consistency models
        ("lcm", 1, [999]),
        ("lcm", 8, [999, 879, 759, 639, 499, 379, 259, 139]),
        ("uniform", 4, [999, 749.25, 499.5, 249.75]),
        ("uniform", 20, [999 - 49.95 * i for i in range(20)]),  # MindONE's DPM-Solver: 999, 949.05, ...
    ],
)
def test_known_timesteps(spacing, n, times):
    np.testing.assert_allclose(sampling_times(spacing, n, build_schedule(ScheduleConfig())), times, rtol=1e-14)


@pytest.mark.parametrize("spacing", LEVELS)
@pytest.mark.parametrize("zero", [False, True])
def test_spacings_of_the_noise_level(spacing, zero):
    """The steps are even in their own measure, and both ends are the schedule's."""
    schedule = build_schedule(ScheduleConfig(zero_terminal_snr=zero))
    times = sampling_times(spacing, 12, schedule)
    levels = schedule.log_snr(times)
    levels[0] = schedule.log_snr(998 if zero else 999)
    if spacing == "log_snr":
        levels = np.append(levels, schedule.log_snr(0))
    measure = np.exp(-levels / 2) ** (1 / 7) if spacing == "karras" else levels
    np.testing.assert_allclose(np.diff(measure), (measure[-1] - measure[0]) / (len(measure) - 1), rtol=1e-6)
    assert times[0] == 999 and levels[-1] == pytest.approx(schedule.log_snr(0))
    t = np.linspace(0, 998, 77)
    np.testing.assert_allclose(schedule.time(schedule.log_snr(t)), t, atol=1e-6)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_impossible_number_of_timesteps(n):
    with pytest.raises(UserError, match="1 to 1000"):
        sampling_times("leading", n, build_schedule(ScheduleConfig()))


def test_unknown_names():
    with pytest.raises(UserError, match="scaled_linear, linear, squaredcos_cap_v2"):
        build_schedule(ScheduleConfig(name="cosine"))
    with pytest.raises(UserError, match="leading, trailing, linspace, uniform, lcm, karras"):
        sampling_times("cosine", 5, build_schedule(ScheduleConfig()))


def test_betas_that_leave_nothing_of_the_picture_are_refused_in_words():
    for name, end, steps in (("linear", 0.9, 2000), ("scaled_linear", 0.999, 3000), ("linear", 0.9, 100_000)):
        for zero in (False, True):
            with pytest.raises(UserError, match="lower beta_end") as error:
                build_schedule(ScheduleConfig(name, 1e-4, end, steps, zero))
            assert str(steps) in str(error.value) and "zero_terminal" not in str(error.value)


def test_the_smallest_schedules_that_are_accepted_work():
    for name, zero in itertools.product(BETAS, (False, True)):
        for start, steps in ((1e-12, 2), (1e-12, 1000), (0.012, 2)):
            schedule = build_schedule(ScheduleConfig(name, start, start, steps, zero))
            assert len(sampling_times("trailing", 2, schedule)) == 2 and schedule.zero_terminal_snr == zero
