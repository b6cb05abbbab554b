"""Progressive distillation: a student learns to make in one DDIM step what its teacher makes in two (arXiv 2202.00512).

The student of N steps learns at the N times of `trailing` spacing, the teacher draws at 2N such times. Both end at
CLEAN, without noise: a student must be drawn with this spacing, and with final sigma "zero". From a latent z_t the
teacher steps from t to t' and to t'' (the paper's algorithm 2). With r = alpha / sigma, a DDIM step is
z_s / sigma_s = z_t / sigma_t + (r_s - r_t) x0. So both steps together are one step with a mean of the teacher's two x0,
weighted by how far r moves with each of them:

    x_target = x0(t) + (x0(t') - x0(t)) (r'' - r') / (r'' - r)

The paper's quotient for it (appendix G) divides a small difference of z'' and z_t, and loses up to three digits in
float32.

The target (x_target, eps_target) satisfies z_t = alpha_t x_target + sigma_t eps_target. So `DiffusionLoss` of the
student takes it in the place of (latents, eps): its input is z_t then, and its target is `prediction.target` of both.

A last step T - 1 without signal needs nothing more: r is 0 there, z_t is eps, and eps_target is eps. The teacher must
give x0 there, as `NoiseSchedule.check` demands. All functions work in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import CLEAN, NoiseSchedule, per_sample
from ldm.diffusion.spacing import trailing
from ldm.errors import UserError

Denoise = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Steps(NamedTuple):
    """The steps of a student, each beside its teacher's two: begin -> middle -> end. Times, float64 [N] each.

    The student's own times are `begin`, and its last step ends at CLEAN.
    """

    begin: np.ndarray
    middle: np.ndarray
    end: np.ndarray


class Target(NamedTuple):
    """What a student learns from a batch.

    Fields:
        z: [B, C, H, W], its input at time t.
        t: int32 [B], in [0, T - 1].
        x0, eps: [B, C, H, W], what it should say of z; z = alpha_t x0 + sigma_t eps.
    """

    z: np.ndarray
    t: np.ndarray
    x0: np.ndarray
    eps: np.ndarray


def nests(n: int, steps: int) -> bool:
    """Whether the times of a student of n steps are among those of a teacher of 2n, out of `steps` training steps."""
    return 1 <= n <= steps // 2 and np.array_equal(trailing(2 * n, steps)[::2], trailing(n, steps))


def student_steps(n: int, schedule: NoiseSchedule) -> Steps:
    """The steps of a student of n steps, whose teacher has 2n.

    Powers of two nest in SD's 1000 training steps. Some other numbers, such as 48, do not, by rounding.

    Raises:
        UserError: n outside 1 to T / 2, or the student's times are not among its teacher's.
    """
    most = len(schedule) // 2
    if not 1 <= n <= most:
        raise UserError(
            f"a student of {n} steps is not possible: choose 1 to {most}, for its teacher has twice as many"
        )
    if not nests(n, len(schedule)):
        smaller = next(other for other in range(n - 1, 0, -1) if nests(other, len(schedule)))  # 1 always nests
        larger = next((other for other in range(n + 1, most + 1) if nests(other, len(schedule))), None)
        choices = f"{smaller} or {larger}" if larger else f"{smaller}"
        raise UserError(
            f"the times of {n} steps are not among those of {2 * n}: choose {choices} steps for the student"
        )
    times = np.append(trailing(2 * n, len(schedule)), CLEAN).astype(np.float64)  # [2n + 1]
    return Steps(times[:-1:2], times[1::2], times[2::2])


def ddim_step(x0: np.ndarray, eps: np.ndarray, s: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    """z_s = alpha_s x0 + sigma_s eps (arXiv 2010.02502, eq. 12 without fresh noise).

    Args:
        x0, eps: [B, C, H, W], the denoiser's estimates at an earlier time.
        s: [B], the time after the step.
    """
    return per_sample(schedule.alpha(s)) * x0 + per_sample(schedule.sigma(s)) * eps


def second_share(begin: np.ndarray, middle: np.ndarray, end: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    """(r'' - r') / (r'' - r), the share of the second step's x0 in the target, between 0 and 1. At CLEAN it is 1.

    Args:
        begin, middle, end: times t > t' > t'' [B] each. Only the last may be CLEAN.

    Returns:
        float64 [B].
    """
    r, r_middle = (schedule.alpha(t) / schedule.sigma(t) for t in (begin, middle))
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    return (alpha - sigma * r_middle) / (alpha - sigma * r)  # both times sigma'': r'' is infinite at CLEAN


def one_step_x0(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The x0 with which one DDIM step goes where two steps go with `first` and `second` (see the module).

    Args:
        first, second: [B, C, H, W], the teacher's x0 at t and at t'.
        share: [B], of the second; see `second_share`.
    """
    return first + (second - first) * per_sample(share)


def target(
    x0: np.ndarray, eps: np.ndarray, index: np.ndarray, steps: Steps, schedule: NoiseSchedule, teacher: Denoise
) -> Target:
    """What a student learns from a batch of latents (arXiv 2202.00512, algorithm 2).

    Args:
        x0: [B, C, H, W], latents of unit variance.
        eps: [B, C, H, W], unit Gaussian noise.
        index: whole numbers [B], which of the student's steps each sample learns; 0 is the one with the most noise.
        steps: see `student_steps`.
        schedule: of both networks.
        teacher: (z [B, C, H, W], t [B]) -> (x0, eps), guided or not, such as a `Denoiser`. It is called twice.

    Returns:
        float64 arrays, and t.
    """
    begin, middle, end = (times[index] for times in steps)  # [B] each
    z = ddim_step(np.asarray(x0, np.float64), eps, begin, schedule)
    first, noise = teacher(z, begin)
    second, _ = teacher(ddim_step(first, noise, middle, schedule), middle)
    learnt = one_step_x0(first, second, second_share(begin, middle, end, schedule))
    alpha, sigma = (per_sample(share(begin)) for share in (schedule.alpha, schedule.sigma))
    return Target(z, begin.astype(np.int32), *get_prediction("x0").to_x0_eps(learnt, z, alpha, sigma))
