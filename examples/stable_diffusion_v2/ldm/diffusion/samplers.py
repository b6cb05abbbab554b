"""Samplers: one loop; each sampler is a set of data for it, a row of SAMPLERS.

Each step asks the denoiser for (x0, eps) at time t and joins the two at the next time s:

    x_s = alpha_s x0 + sqrt(sigma_s^2 - spread^2) eps + spread noise      (DDIM, arXiv 2010.02502, eq. 12)
    spread = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2)        (eq. 16)

eta = 0 is DDIM; eta = 1 is the ancestral step of DDPM (arXiv 2006.11239, eqs. 6 and 7), between any two times. Euler's
step in x / alpha over sigma / alpha is DDIM's, and its ancestral form is DDPM's: they differ in the usual times alone.

Samplers of higher order put a mean of several estimates in the place of x0 or of eps; see `multistep`. The estimates
are past ones (DPM-Solver, DPM-Solver++ 2M and 3M, DEIS, PLMS), or a second one inside the same step (Heun, 2S; PLMS has
it in its first step), or one at the step's end, with which the step is done again (UniPC's corrector). A step to or
from infinite log-SNR is of first order: it needs no exponential, so a clean end and a beginning without signal are
exact. DPM-Solver++ with eta = 1 is SDE-DPM-Solver++.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ldm.diffusion import multistep
from ldm.diffusion.multistep import DATA, NOISE, Form
from ldm.diffusion.prediction import choose
from ldm.diffusion.schedule import CLEAN, NoiseSchedule
from ldm.diffusion.spacing import sampling_times
from ldm.errors import UserError

FINAL_SIGMAS = {"zero": CLEAN, "sigma_min": 0}  # the time after the last step; sigma_min is the schedule's least noise
LONGEST_LINE = 1.0  # in units of the step before; farther out, the line is worse than first order

Pair = tuple[np.ndarray, np.ndarray]  # (x0, eps)
Denoise = Callable[[np.ndarray, float], Pair]


@dataclass(frozen=True)
class Sampler:
    """A sampler of this family.

    Fields:
        name: its name in options and configs.
        label: its name in tables of results.
        final_sigma: the noise after the last step, one of FINAL_SIGMAS.
        spacing: one of ldm.diffusion.spacing.SPACINGS; see `spacing_for`.
        eta: fresh noise per step, from 0 (none; the result is a function of x) to 1 (the whole ancestral step).
        renews: all noise of a step is fresh.
        order: how many estimates a step uses, this one and past ones.
        form: what it interpolates.
        mean: how it averages the polynomial, one of `multistep`'s means.
        counts_steps: the polynomial runs over the number of the step, not over log-SNR.
        probe: the share of a step at which the network is asked again, where there is no past estimate to use; 0:
            nowhere.
        corrects: each step is done again with the estimate at its end.
    """

    name: str
    label: str
    final_sigma: str
    spacing: str
    eta: float = 0.0
    renews: bool = False
    order: int = 1
    form: Form = DATA
    mean: Callable = multistep.middle
    counts_steps: bool = False
    probe: float = 0.0
    corrects: bool = False

    @property
    def flag(self) -> str:
        """The option that chooses it, as MindONE has it."""
        return f"--{self.name}"

    @property
    def takes_eta(self) -> bool:
        """Whether fresh noise can be added to its steps."""
        return not (self.renews or self.probe or self.corrects)

    def spacing_for(self, zero_terminal_snr: bool) -> str:
        """Its spacing, but never "leading" where that would miss a last step without signal."""
        return "trailing" if zero_terminal_snr and self.spacing == "leading" else self.spacing

    @property
    def end(self) -> int:
        """The time after the last step."""
        return FINAL_SIGMAS[self.final_sigma]

    def times(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times at which its steps begin, float64 [steps]; UserError as `sampling_times`."""
        return sampling_times(self.spacing, steps, schedule)

    def __call__(
        self,
        denoise: Denoise,
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
            noise: step number from 0 -> unit Gaussian noise [B, C, H, W]; it is needed where steps have fresh noise.
            progress: wraps the iterable of times, e.g. tqdm.

        Returns:
            Latents, float64 [B, C, H, W].
        """
        steps = _Steps(self, times, schedule)
        assert noise or not steps.spread.any(), "a sampler with fresh noise needs noise"
        x, past = np.asarray(x, np.float64), []  # the estimates of the last steps, the newest first
        for i, t in enumerate(progress(times)):
            now = denoise(x, t)
            if self.corrects and past and steps.goes_on(i - 1):
                x = steps.join(i - 1, past[: steps.reach(i - 1)], now, 1.0)
                now = now[0], (x - steps.alpha[i] * now[0]) / steps.sigma[i]
            past = [now, *past][: self.order]
            used, second = past[: steps.reach(i)], None
            if self.probe and len(used) == 1 and steps.goes_on(i):
                second = denoise(*steps.ahead(i, now, self.probe))
            x = steps.join(i, used, second, self.probe)
            if steps.spread[i]:
                x = x + steps.spread[i] * noise(i)
        return x


class _Steps:
    """The steps of one run of a sampler, numbered from 0."""

    def __init__(self, sampler: Sampler, times: np.ndarray, schedule: NoiseSchedule):
        self.sampler, self.schedule = sampler, schedule
        self.ends = ends = np.append(times, sampler.end)  # [n + 1]
        self.alpha, self.sigma = alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
        self.log_snr = schedule.log_snr(ends)
        self.clock = np.arange(len(ends)) if sampler.counts_steps else self.log_snr
        self.length = np.diff(self.clock)  # [n]
        ancestral = sigma[1:] / sigma[:-1] * np.sqrt(1 - (alpha[:-1] / alpha[1:]) ** 2)  # [n]
        self.spread = sigma[1:] if sampler.renews else sampler.eta * ancestral
        self.keep = np.sqrt(sigma[1:] ** 2 - self.spread**2)

    def goes_on(self, i: int) -> bool:
        """Whether step i can be of higher order: it has a length in log-SNR, and a finite one."""
        return bool(0 < self.log_snr[i + 1] - self.log_snr[i] < np.inf)

    def reach(self, i: int) -> int:
        """How many estimates step i uses, its own and past ones.

        It is 1 where the line through the last two would be longer than LONGEST_LINE, as in the last steps of evenly
        spaced times.
        """
        if i == 0 or not self.goes_on(i) or self.length[i] / self.length[i - 1] / 2 > LONGEST_LINE:
            return 1
        return int(np.isfinite(self.clock[max(0, i + 1 - self.sampler.order) : i + 1]).sum())

    def ahead(self, i: int, estimate: Pair, share: float) -> tuple[np.ndarray, float]:
        """Latents inside step i, by first order, and their time."""
        between = self.log_snr[i] + share * (self.log_snr[i + 1] - self.log_snr[i])
        t = self.ends[i + 1] if share == 1 else self.schedule.time(between)
        return self.schedule.alpha(t) * estimate[0] + self.schedule.sigma(t) * estimate[1], t

    def join(self, i: int, used: list[Pair], second: Pair | None, share: float) -> np.ndarray:
        """Latents at the end of step i, without fresh noise.

        Args:
            used: the estimates at its beginning and before, the newest first.
            second: an estimate at this share of the step.
        """
        form, (x0, eps) = self.sampler.form, used[0]
        if len(used) > 1 or second is not None:
            nodes = self.clock[i - np.arange(len(used))] - self.clock[i]  # [used]
            if second is not None:
                used, nodes = [*used, second], np.append(nodes, share * self.length[i])
            parts = multistep.weights(nodes, self.length[i], self.sampler.mean, form.growth)
            own = used[0][form.index]
            change = sum(part * (each[form.index] - own) for part, each in zip(parts[1:], used[1:]))
            x0, eps = form.moved(x0, eps, change, self.sigma[i] / self.alpha[i])
        return self.alpha[i + 1] * x0 + self.keep[i] * eps


_EXACT, _LINES, _EVEN = multistep.exact, multistep.middle_of_lines, multistep.even
SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddpm", "DDPM", "zero", "leading", eta=1.0),
        Sampler("ddim", "DDIM", "sigma_min", "leading"),
        Sampler("dpm_solver", "DPM-Solver", "sigma_min", "uniform", order=2, form=NOISE),
        Sampler("dpm_solver_pp", "DPM-Solver++", "zero", "uniform", order=2),
        Sampler("dpm_solver_pp_3m", "DPM-Solver++ 3M", "zero", "uniform", order=3, mean=_LINES),
        Sampler("dpm_solver_pp_2s", "DPM-Solver++ 2S", "zero", "uniform", probe=0.5),
        Sampler("dpm_solver_pp_sde", "DPM-Solver++ SDE 2M", "zero", "uniform", order=2, eta=1.0),
        Sampler("uni_pc", "UniPC", "zero", "uniform", order=2, mean=_LINES, corrects=True),
        Sampler("deis", "DEIS", "sigma_min", "uniform", order=3, form=NOISE, mean=_EXACT),
        Sampler("plms", "PLMS", "sigma_min", "leading", order=4, form=NOISE, mean=_EVEN, counts_steps=True, probe=1.0),
        Sampler("heun", "Heun", "zero", "karras", form=NOISE, probe=1.0),
        Sampler("euler", "Euler", "zero", "linspace"),
        Sampler("euler_ancestral", "Euler ancestral", "zero", "linspace", eta=1.0),
        Sampler("lcm", "LCM", "zero", "lcm", renews=True),
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
        UserError: unknown name of a sampler or an end (the choices are listed), eta outside [0, 1] or of a sampler
            that takes none.
    """
    sampler = choose(SAMPLERS, name, "sampler")
    if eta is not None and not 0 <= eta <= 1:
        raise UserError(f"eta {eta} is out of range: 0 adds no noise, 1 is the most")
    if eta and not sampler.takes_eta:
        others = ", ".join(other.name for other in SAMPLERS.values() if other.takes_eta)
        raise UserError(f"sampler {name} takes no eta: leave it out, or choose one of {others}")
    if final_sigma is not None:
        choose(FINAL_SIGMAS, final_sigma, "final sigma")
    if spacing is None:
        spacing = sampler.spacing_for(schedule.zero_terminal_snr)
    given = {"eta": eta, "spacing": spacing, "final_sigma": final_sigma}
    return replace(sampler, **{field: value for field, value in given.items() if value is not None})
