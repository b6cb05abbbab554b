"""Loss weights by signal-to-noise ratio, the same in effect for every prediction type.

A weighting gives the weight on the error of x0 at each step. Divided by the type's x0_factor it becomes the weight on
the network's own loss. So min-SNR is min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v.
"""

from __future__ import annotations

import numpy as np

from ldm.diffusion.prediction import Prediction, choose
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError


def none(snr: np.ndarray, x0_factor: np.ndarray, gamma: float) -> np.ndarray:
    """The network's own loss, unweighted."""
    return x0_factor


def min_snr(snr: np.ndarray, x0_factor: np.ndarray, gamma: float) -> np.ndarray:
    """min(SNR, gamma) (arXiv 2303.09556, section 3.4). A last step without signal gets weight 0."""
    return np.minimum(snr, gamma)


def truncated_snr(snr: np.ndarray, x0_factor: np.ndarray, gamma: float) -> np.ndarray:
    """max(SNR, 1) (arXiv 2202.00512, section 4). The weight for v is 1/2 at SNR 1, and rises to 1 at both ends."""
    return np.maximum(snr, 1.0)


def snr_plus_one(snr: np.ndarray, x0_factor: np.ndarray, gamma: float) -> np.ndarray:
    """SNR + 1 (arXiv 2202.00512, section 4). The weight for v is 1 at every step; for eps it is 1 + 1 / SNR."""
    return snr + 1.0


WEIGHTINGS = {"none": none, "min_snr": min_snr, "truncated_snr": truncated_snr, "snr_plus_one": snr_plus_one}


def loss_weight(name: str, schedule: NoiseSchedule, prediction: Prediction, gamma: float = 5.0) -> np.ndarray:
    """Weight on the network's squared error at each training step, float64 [T].

    Raises:
        UserError: unknown name, gamma not positive, or a prediction type that does not go with the schedule.
    """
    weighting = choose(WEIGHTINGS, name, "loss weighting")
    schedule.check(prediction)
    if not gamma > 0:
        raise UserError(f"the SNR's limit gamma must be positive, got {gamma}; 5 is usual")
    t = np.arange(len(schedule))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0_factor = prediction.x0_factor(alpha, sigma)
    return weighting(alpha**2 / sigma**2, x0_factor, gamma) / x0_factor
