"""Samplers: one loop; each sampler is a set of data for it.

Each step asks the denoiser for (x0, eps) at time t and joins the two at the next time s:

    x_s = alpha_s x0 + sqrt(sigma_s^2 - spread^2) eps + spread noise      (DDIM, arXiv 2010.02502, eq. 12)
    spread = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2)        (eq. 16)

eta = 0 is DDIM; eta = 1 is the ancestral step of DDPM (arXiv 2006.11239, eqs. 6 and 7), between any two times.

DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (2M; arXiv 2211.01095, algorithm 2) are of second order. They draw a line
in log-SNR through the last two eps, or x0, and take its value in the middle of the step. The other of the two changes
with it, so that alpha_t x0 + sigma_t eps is still x. This equals the papers' update: let h be the step in
log(alpha / sigma); then exp(-h) = alpha_t sigma_s / (sigma_t alpha_s), and
(sigma_s / sigma_t) x - alpha_s (exp(-h) - 1) x0 = alpha_s x0 + sigma_s eps. This form needs no exponential where h is
infinite, at a clean end or at a beginning without signal. DPM-Solver++ with eta = 1 is SDE-DPM-Solver++.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ldm.diffusion.prediction import choose
from ldm.diffusion.schedule import CLEAN, NoiseSchedule
from ldm.diffusion.spacing import sampling_times
from ldm.errors import UserError

FINAL_SIGMAS = {"zero": CLEAN, "sigma_min": 0}  # the time after the last step; sigma_min is the schedule's least noise
LONGEST_LINE = 1.0  # in units of the step before; farther out, the line is worse than first order


def data_form(x0, eps, previous, slope, noise_to_signal):
    """Move x0 along the line through the previous one; eps gives way. (DPM-Solver++)"""
    change = slope * (x0 - previous[0])
    return x0 + change, eps - change / noise_to_signal


def noise_form(x0, eps, previous, slope, noise_to_signal):
    """Move eps along the line through the previous one; x0 gives way. (DPM-Solver)"""
    change = slope * (eps - previous[1])
    return x0 - change * noise_to_signal, eps + change


@dataclass(frozen=True)
class Sampler:
    """A sampler of this family.

    Fields:
        name: its name in options and configs.
        label: its name in tables of results.
        final_sigma: the noise after the last step, one of FINAL_SIGMAS.
        spacing: one of ldm.diffusion.spacing.SPACINGS; see `spacing_for`.
        eta: fresh noise per step, from 0 (none; the result is a function of x) to 1 (the whole ancestral step).
        second_order: what 2M does to (x0, eps); None for first order.
    """

    name: str
    label: str
    final_sigma: str
    spacing: str
    eta: float = 0.0
    second_order: Callable | None = None

    @property
    def flag(self) -> str:
        """The option that chooses it, as MindONE has it."""
        return f"--{self.name}"

    def spacing_for(self, zero_terminal_snr: bool) -> str:
        """Its spacing, but never "leading" where that would miss a last step without signal."""
        return "trailing" if zero_terminal_snr and self.spacing == "leading" else self.spacing

    @property
    def end(self) -> int:
        """The time after the last step."""
        return FINAL_SIGMAS[self.final_sigma]

    def times(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times at which it asks the denoiser, float64 [steps]; UserError as `sampling_times`."""
        return sampling_times(self.spacing, steps, schedule)

    def __call__(
        self,
        denoise: Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]],
        x: np.ndarray,
        times: np.ndarray,
        schedule: NoiseSchedule,
        noise: Callable[[int], np.ndarray] | None = None,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> np.ndarray:
        """Sample from times[0] to the end.

        Args:
            denoise: (x, t) -> (x0, eps).
            x: [B, C, H, W], latents at times[0]; unit Gaussian noise at the last training step.
            times: [n], falling; see `times`.
            schedule: the noise schedule.
            noise: step number from 0 -> unit Gaussian noise [B, C, H, W]; it is needed where eta is not 0.
            progress: wraps the iterable of times, e.g. tqdm.

        Returns:
            Latents, float64 [B, C, H, W].
        """
        assert noise or not self.eta, "a sampler with eta needs noise"
        ends = np.append(times, self.end)  # [n + 1]
        alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
        spread = self.eta * sigma[1:] / sigma[:-1] * np.sqrt(1 - (alpha[:-1] / alpha[1:]) ** 2)  # [n]
        keep = np.sqrt(sigma[1:] ** 2 - spread**2)
        slope = self._slope(schedule.log_snr(ends))
        x, previous = np.asarray(x, np.float64), None
        for i, t in enumerate(progress(times)):
            estimate = x0, eps = denoise(x, t)
            if slope[i]:
                x0, eps = self.second_order(x0, eps, previous, slope[i], sigma[i] / alpha[i])
            x = alpha[i + 1] * x0 + keep[i] * eps
            if spread[i]:
                x = x + spread[i] * noise(i)
            previous = estimate
        return x

    def _slope(self, log_snr: np.ndarray) -> np.ndarray:
        """How far to follow the line in each step, [n], in units of the step before; 0 makes a step of first order.

        It is 0 in the first step, in steps to or from infinite log-SNR, and where the line would be longer than
        LONGEST_LINE, as in the last steps of evenly spaced times.
        """
        step = np.diff(log_snr)
        slope = np.zeros_like(step)
        if self.second_order:
            slope[1:] = np.where(np.isfinite(step[1:]), step[1:], 0) / step[:-1] / 2
        return np.where(slope > LONGEST_LINE, 0, slope)


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddpm", "DDPM", "zero", "leading", eta=1.0),
        Sampler("ddim", "DDIM", "sigma_min", "leading"),
        Sampler("dpm_solver", "DPM-Solver", "sigma_min", "uniform", second_order=noise_form),
        Sampler("dpm_solver_pp", "DPM-Solver++", "zero", "uniform", second_order=data_form),
    )
}
DEFAULT_SAMPLER = "dpm_solver_pp"  # of models that say nothing else; MindONE's too


def get_sampler(
    name: str,
    schedule: NoiseSchedule,
    eta: float | None = None,
    spacing: str | None = None,
    final_sigma: str | None = None,
) -> Sampler:
    """The sampler of that name, with another eta, spacing or end where one is given.

    Without a spacing it is what `spacing_for` says of the schedule.

    Raises:
        UserError: unknown name of a sampler or an end (the choices are listed), eta outside [0, 1].
    """
    sampler = choose(SAMPLERS, name, "sampler")
    if eta is not None and not 0 <= eta <= 1:
        raise UserError(f"eta {eta} is out of range: 0 adds no noise, 1 is the most")
    if final_sigma is not None:
        choose(FINAL_SIGMAS, final_sigma, "final sigma")
    if spacing is None:
        spacing = sampler.spacing_for(schedule.zero_terminal_snr)
    given = {"eta": eta, "spacing": spacing, "final_sigma": final_sigma}
    return replace(sampler, **{field: value for field, value in given.items() if value is not None})
