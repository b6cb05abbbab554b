"""Our samplers and schedules against diffusers' schedulers, along whole trajectories of a denoiser in closed form."""

import numpy as np
import pytest

from ldm.config.model import ScheduleConfig
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.samplers import get_sampler
from ldm.diffusion.schedule import BETAS, build_schedule
from ldm.diffusion.spacing import sampling_times
from ldm.randomness import generator

torch = pytest.importorskip("torch", reason="the parity tests compare with PyTorch's world: install torch")
diffusers = pytest.importorskip("diffusers", reason="the reference schedulers are diffusers': install diffusers")
pytestmark = pytest.mark.parity

SPACINGS = ("leading", "trailing", "linspace")  # that diffusers has
SD = build_schedule(ScheduleConfig())

TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
FLOAT32 = 1e-5  # their DPM-Solver takes its steps in float32 whatever it is given
SHAPE = (2, 4, 3, 3)
BETA = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def output(x, t, prediction, schedule):
    """What a network returns at x, made up: curved enough to tell samplers apart."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0 = np.tanh(2 * alpha * x) + 0.1 * np.sin(3 * x)
    return prediction.target(x0, (x - alpha * x0) / sigma, alpha, sigma)


def start():
    return generator(3, "latents").standard_normal(SHAPE)


def noise(i):
    return generator(3, "step noise", i).standard_normal(SHAPE)


def ours(sampler, schedule, prediction, n):
    def denoise(x, t):
        return prediction.to_x0_eps(output(x, t, prediction, schedule), x, schedule.alpha(t), schedule.sigma(t))

    return sampler(denoise, start(), sampler.times(schedule, n), schedule, noise)


def theirs(scheduler, schedule, prediction, step=lambda i: {}):
    """`step` gives the further arguments of their step i."""
    widen(scheduler, schedule)
    x = torch.from_numpy(start())
    for i, t in enumerate(scheduler.timesteps):
        guess = torch.from_numpy(output(x.numpy(), int(t), prediction, schedule))
        x = scheduler.step(guess, t, x, **step(i)).prev_sample
    return x.numpy()


def widen(scheduler, schedule):
    """Replaces their float32 tables, where 1 - alpha_bar has lost 3 of 7 digits, by the same in float64."""
    wide = torch.from_numpy(schedule.alpha(np.arange(1000)) ** 2)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), wide, rtol=2e-5, atol=0)
    scheduler.alphas_cumprod = wide
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = wide[0]
    if hasattr(scheduler, "sigmas"):
        sigmas = ((1 - wide) / wide) ** 0.5
        last = sigmas[0] if scheduler.config.final_sigmas_type == "sigma_min" else torch.zeros_like(sigmas[0])
        sigmas = torch.cat([sigmas[scheduler.timesteps], last[None]])
        torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-4, atol=0)
        scheduler.sigmas = sigmas


def assert_close(mine, reference, tolerance=1e-9):
    assert np.abs(mine - reference).max() < tolerance * np.abs(reference).max()


@pytest.mark.parametrize("n", [10, 30])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(name, n, eta):
    schedule, prediction, sampler = SD, get_prediction(name), get_sampler("ddim", SD, eta)
    scheduler = diffusers.DDIMScheduler(
        **BETA, prediction_type=TYPES[name], clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == sampler.times(schedule, n).tolist()
    reference = theirs(
        scheduler, schedule, prediction, lambda i: {"eta": eta, "variance_noise": torch.from_numpy(noise(i))}
    )
    assert_close(ours(sampler, schedule, prediction, n), reference)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("n", [10, 30])
@pytest.mark.parametrize("name", TYPES)
def test_ddpm(name, n, spacing, monkeypatch):
    schedule, prediction, sampler = SD, get_prediction(name), get_sampler("ddpm", SD, spacing=spacing)
    scheduler = diffusers.DDPMScheduler(
        **BETA, prediction_type=TYPES[name], clip_sample=False, variance_type="fixed_small", timestep_spacing=spacing
    )
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == sampler.times(schedule, n).tolist()
    draws = iter(range(n))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.from_numpy(noise(next(draws)))
    )
    assert_close(ours(sampler, schedule, prediction, n), theirs(scheduler, schedule, prediction))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 10, 14, 15, 30])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("sampler", "algorithm", "end"),
    [("dpm_solver_pp", "dpmsolver++", "zero"), ("dpm_solver", "dpmsolver", "sigma_min")],
)
def test_dpm_solver(sampler, algorithm, end, name, n, spacing, monkeypatch):
    if sampler == "dpm_solver" and spacing == "linspace" and n >= 15:
        pytest.skip("it ends at the time linspace ends at, and theirs divides 0 by 0 in that step of no length")
    schedule, prediction, sampler = SD, get_prediction(name), get_sampler(sampler, SD, spacing=spacing)
    monkeypatch.setattr("ldm.diffusion.samplers.LONGEST_LINE", np.inf)  # they draw every line out, but for a last step
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETA, prediction_type=TYPES[name], algorithm_type=algorithm, final_sigmas_type=end, lower_order_final=False
    )
    scheduler.set_timesteps(timesteps=sampler.times(schedule, n).astype(int))
    reference = theirs(scheduler, schedule, prediction)
    assert_close(ours(sampler, schedule, prediction, n), reference, FLOAT32)


@pytest.mark.parametrize("n", [10, 30])
def test_dpm_solver_pp_with_eta_is_its_sde(n, monkeypatch):
    schedule, prediction = SD, get_prediction("v")
    sampler = get_sampler("dpm_solver_pp", SD, 1.0, "leading")
    monkeypatch.setattr("ldm.diffusion.samplers.LONGEST_LINE", np.inf)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETA, prediction_type="v_prediction", algorithm_type="sde-dpmsolver++"
    )
    scheduler.set_timesteps(timesteps=sampler.times(schedule, n).astype(int))
    reference = theirs(scheduler, schedule, prediction, lambda i: {"variance_noise": torch.from_numpy(noise(i))})
    assert_close(ours(sampler, schedule, prediction, n), reference, FLOAT32)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_at_every_number_of_steps(spacing):
    scheduler = diffusers.DDIMScheduler(**BETA, timestep_spacing=spacing)
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        reference = scheduler.timesteps.tolist()
        if len(reference) == n and reference[0] < 1000 and (n > 1 or spacing != "linspace"):
            assert sampling_times(spacing, n, SD).tolist() == reference, n


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("zero", [False, True])
def test_tables(name, zero):
    schedule = build_schedule(ScheduleConfig(name=name, zero_terminal_snr=zero))
    scheduler = diffusers.DDIMScheduler(**{**BETA, "beta_schedule": name}, rescale_betas_zero_snr=zero)
    ours = schedule.alpha(np.arange(1000)) ** 2
    np.testing.assert_allclose(ours, scheduler.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-9)
