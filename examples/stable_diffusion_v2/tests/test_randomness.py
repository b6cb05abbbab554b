"""Draws depend on their keys alone; stratified ones cover the unit interval evenly."""

import numpy as np

from ldm.randomness import generator, stratified


def test_a_generator_depends_on_all_of_its_arguments():
    draws = [generator(*key).random() for key in [(1, "a", 2), (1, "a", 3), (1, "b", 2), (2, "a", 2), (1, "a")]]
    assert len(set(draws)) == 5 and generator(1, "a", 2).random() == draws[0]


def test_every_stretch_of_stratified_numbers_is_even():
    numbers = stratified(42, "timestep", np.arange(10**6, 10**6 + 10_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    for start in range(0, 9_000, 500):
        counts = np.histogram(numbers[start : start + 64], 8, (0, 1))[0]
        assert counts.min() >= 7 and counts.max() <= 9  # drawn independently, 64 would leave some below 4


def test_stratified_numbers_are_uniform_over_seeds():
    first = [stratified(seed, "timestep", np.array([123]))[0] for seed in range(400)]
    assert np.abs(np.sort(first) - (np.arange(400) + 0.5) / 400).max() < 0.07  # Kolmogorov-Smirnov at 4 %
