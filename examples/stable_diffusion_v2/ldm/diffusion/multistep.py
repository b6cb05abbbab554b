"""How a step uses several estimates: the polynomial through them, averaged over the step.

Between two times the latents change by an integral of the estimate (DPM-Solver, arXiv 2206.00927, eq. 3.4; its data
form, arXiv 2211.01095, eq. 8). With L, the log-SNR, in half of which both are written:

    x_s = alpha_s X + sigma_s (x_t - alpha_t X) / sigma_t,   X = mean of x0(L) over the step, with weight exp(L / 2)
    x_s = sigma_s E + alpha_s (x_t - sigma_t E) / alpha_t,   E = mean of eps(L) over the step, with weight exp(-L / 2)

So every multistep sampler is a DDIM step with a mean of estimates. The estimates' polynomial stands for the curve, and
its mean is a sum of the estimates with the means of Lagrange's basis for weights. Samplers differ in what they
interpolate (a Form), in how they take the mean, and in the clock that the polynomial runs by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_POINTS, _MASS = np.polynomial.legendre.leggauss(32)  # exact to 1e-14 for steps of log-SNR up to 25
_POINTS = (_POINTS + 1) / 2  # shares of a step


class Form(NamedTuple):
    """What a sampler interpolates.

    Fields:
        index: of it in the pair (x0, eps).
        growth: its weight in the step grows like exp(growth * log-SNR / 2).
        moved(x0, eps, change, noise_to_signal): the pair with the change in this one of the two. The other gives way,
            so that alpha_t x0 + sigma_t eps is still x; noise_to_signal is sigma_t / alpha_t.
    """

    index: int
    growth: int
    moved: Callable


def _data_moved(x0, eps, change, noise_to_signal):
    return x0 + change, eps - change / noise_to_signal


def _noise_moved(x0, eps, change, noise_to_signal):
    return x0 - change * noise_to_signal, eps + change


DATA, NOISE = Form(0, 1, _data_moved), Form(1, -1, _noise_moved)

# Means over a step: (its length, number of estimates, growth) -> where the polynomial is read, and with what mass.


def middle(step, count, growth):
    """The value in the middle of the step."""
    return np.array([step / 2]), np.ones(1)


def exact(step, count, growth):
    """The integral."""
    at = step * _POINTS
    return at, _MASS * np.exp(growth * (at - step) / 2)


def middle_of_lines(step, count, growth):
    """The middle of a line, the integral of a curve."""
    return (middle if count == 2 else exact)(step, count, growth)


def even(step, count, growth):
    """The integral with the same weight everywhere."""
    return step * _POINTS, _MASS


def weights(nodes: np.ndarray, step: float, mean: Callable, growth: int) -> np.ndarray:
    """The weights of estimates in a step, [n]; their sum is 1.

    Args:
        nodes: [n], by the sampler's clock, where the estimates were made; the step begins at 0.
        step: where it ends.
        mean, growth: see above.
    """
    at, mass = mean(step, len(nodes), growth)
    basis = [np.prod([(at - b) / (a - b) for b in nodes if b != a], axis=0) for a in nodes]  # [n] of [points]
    return np.array(basis) @ mass / mass.sum()
