"""Which timesteps training draws how often."""

import numpy as np
import pytest

from ldm.diffusion.timestep_bias import timestep_density, timesteps_at
from ldm.errors import UserError
from ldm.randomness import stratified


def test_without_bias_all_timesteps_come_as_often():
    u = stratified(3, "timestep", np.arange(5000))
    t = timesteps_at(timestep_density("none", 1000), u)
    assert t.dtype == np.int32
    np.testing.assert_array_equal(t, np.floor(1000 * u))


@pytest.mark.parametrize(
    "options, favoured",
    [
        ({"strategy": "earlier", "portion": 0.25}, (0, 250)),
        ({"strategy": "later", "portion": 0.1}, (900, 1000)),
        ({"strategy": "range", "begin": 40, "end": 440}, (40, 440)),
        ({"strategy": "range", "begin": 700}, (700, 1000)),
        ({"strategy": "none"}, (0, 0)),
    ],
)
def test_what_is_favoured_comes_as_many_times_as_often(options, favoured):
    density = timestep_density(timesteps=1000, multiplier=3.0, **options)
    inside = np.zeros(1000, bool)
    inside[slice(*favoured)] = True
    np.testing.assert_allclose(density[inside] / density[~inside].max(), 3.0)
    assert density.sum() == pytest.approx(1) and np.ptp(density[~inside]) == 0
    drawn = np.bincount(timesteps_at(density, stratified(7, "timestep", np.arange(200_000))), minlength=1000) / 200_000
    assert drawn.shape == (1000,) and np.abs(drawn - density).max() < 2e-5


def test_a_multiplier_below_one_makes_them_rare():
    density = timestep_density("later", 10, multiplier=0.5, portion=0.5)
    np.testing.assert_allclose(density, [2 / 15] * 5 + [1 / 15] * 5)


def test_the_ends_of_the_quantiles():
    density = timestep_density("earlier", 10, multiplier=9.0, portion=0.1)
    assert timesteps_at(density, np.array([0.0, 0.499, 0.501, np.nextafter(1, 0)])).tolist() == [0, 0, 1, 9]


@pytest.mark.parametrize(
    "options, told",
    [
        ({"strategy": "sooner"}, "none, earlier, later, range"),
        ({"strategy": "earlier", "multiplier": 0.0}, "timestep_bias_multiplier"),
        ({"strategy": "earlier", "multiplier": float("nan")}, "timestep_bias_multiplier"),
        ({"strategy": "later", "portion": 1.5}, "timestep_bias_portion"),
        ({"strategy": "range", "begin": -1, "end": 3}, "begin < end <= 10"),
        ({"strategy": "range", "begin": 3, "end": 3}, "begin < end <= 10"),
        ({"strategy": "range", "begin": 3, "end": 11}, "begin < end <= 10"),
    ],
)
def test_what_makes_no_sense_is_refused(options, told):
    with pytest.raises(UserError, match=told):
        timestep_density(timesteps=10, **options)
