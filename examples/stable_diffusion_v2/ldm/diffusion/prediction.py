"""Prediction types: the network predicts the noise eps, the clean latents x0, or the velocity v.

The words for them, ours and other programs', stand in this file alone.

With z = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1, any of the three gives the other two (arXiv 2202.00512,
section 2.4 and appendix D). The functions are plain arithmetic: they take NumPy arrays, and MindSpore tensors inside a
compiled graph. alpha and sigma are scalars or arrays that broadcast against z, of shape [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ldm.errors import UserError
from ldm.files import quoted


class Prediction(NamedTuple):
    """One meaning of the network's output.

    Fields:
        target(x0, eps, alpha, sigma): what the network should return, [B, C, H, W].
        to_x0_eps(output, z, alpha, sigma): the pair (x0, eps) that an output at z stands for, [B, C, H, W] each.
        x0_factor(alpha, sigma): squared error of the output / squared error of the x0 that it stands for. The error of
            eps is always SNR = alpha^2 / sigma^2 times that of x0, so losses of all types can be compared.
        needs_signal: the output gives no x0 where alpha = 0.
    """

    name: str
    target: Callable
    to_x0_eps: Callable
    x0_factor: Callable
    needs_signal: bool


def eps_target(x0, eps, alpha, sigma):
    return eps


def eps_to_x0_eps(output, z, alpha, sigma):
    return (z - sigma * output) / alpha, output


def eps_x0_factor(alpha, sigma):
    return alpha**2 / sigma**2


def x0_target(x0, eps, alpha, sigma):
    return x0


def x0_to_x0_eps(output, z, alpha, sigma):
    return output, (z - alpha * output) / sigma


def x0_x0_factor(alpha, sigma):
    return 1.0 + 0.0 * alpha  # one in the shape of alpha


def v_target(x0, eps, alpha, sigma):
    return alpha * eps - sigma * x0


def v_to_x0_eps(output, z, alpha, sigma):
    # Straight to x0. By way of eps it would be divided by alpha, 0.068 at SD's last step, and lose a digit.
    return alpha * z - sigma * output, sigma * z + alpha * output


def v_x0_factor(alpha, sigma):
    return 1.0 / sigma**2  # = SNR + 1


PREDICTIONS = {
    prediction.name: prediction
    for prediction in (
        Prediction("eps", eps_target, eps_to_x0_eps, eps_x0_factor, needs_signal=True),
        Prediction("x0", x0_target, x0_to_x0_eps, x0_x0_factor, needs_signal=False),
        Prediction("v", v_target, v_to_x0_eps, v_x0_factor, needs_signal=False),
    )
}


# Words for the types in files and configs of other programs.
FOREIGN_NAMES = {
    "epsilon": "eps",
    "noise": "eps",
    "v_prediction": "v",
    "vprediction": "v",
    "v_pred": "v",
    "velocity": "v",
    "sample": "x0",
    "x_start": "x0",
    "start_x": "x0",
}
DIFFUSERS_NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # in a scheduler's config
MODELSPEC_NAMES = {"eps": "epsilon", "v": "v", "x0": "sample"}  # in a .safetensors file's modelspec.prediction_type


def own_name(word):
    """Our name of a type, for any word that means one, however it is spelt. Any other value is returned unchanged."""
    plain = word.strip().lower().replace("-", "_") if isinstance(word, str) else word
    known = isinstance(plain, str) and plain in (*PREDICTIONS, *FOREIGN_NAMES)
    return FOREIGN_NAMES.get(plain, plain) if known else word


def choose(table: dict, name: str, what: str):
    """table[name]; UserError listing the choices where there is no such name."""
    if name not in table:
        raise UserError(f"unknown {what} {quoted(name)}: choose one of {', '.join(table)}")
    return table[name]


def get_prediction(name: str) -> Prediction:
    """The prediction type of that name; UserError listing the choices."""
    return choose(PREDICTIONS, name, "prediction type")
