"""Our samplers and schedules against diffusers' schedulers, along whole trajectories of a denoiser in closed form."""

from dataclasses import replace

import numpy as np
import pytest

from ldm.config.model import ScheduleConfig
from ldm.diffusion import multistep
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.samplers import get_sampler
from ldm.diffusion.schedule import BETAS, CLEAN, build_schedule
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


STEPS = [1, 2, 3, 5, 10, 15, 20, 27, 30, 50, 250]


def asked_by_ours(sampler, prediction, times):
    """The latents at which the network is asked, and the last ones."""
    asked = []

    def denoise(x, t):
        asked.append(x)
        return prediction.to_x0_eps(output(x, t, prediction, SD), x, SD.alpha(t), SD.sigma(t))

    last = sampler(denoise, start(), times, SD, noise)
    return [*asked, last]


def asked_by_theirs(scheduler, prediction, times, end, per_image=False):
    """The same, from a scheduler that is given the times, and the noise levels at them in float64.

    Args:
        times: at which the network runs.
        end: the time after the last step.
        per_image: its latents are x / alpha.
    """
    ends = np.append(times, end)
    scheduler.sigmas = torch.from_numpy(SD.sigma(ends) / SD.alpha(ends))
    scheduler.timesteps = torch.from_numpy(times)
    scheduler.num_inference_steps = len(times)
    scheduler.set_begin_index(0)
    shares = SD.alpha(ends) if per_image else np.ones(len(ends))
    x, asked = torch.from_numpy(start() / shares[0]), []
    for i, t in enumerate(times):
        asked.append(x.numpy() * shares[i])
        scheduler.is_scale_input_called = True
        x = scheduler.step(
            torch.from_numpy(output(asked[-1], t, prediction, SD)), scheduler.timesteps[i], x
        ).prev_sample
    return [*asked, x.numpy() * shares[-1]]


def assert_all_close(mine, reference, tolerance=FLOAT32):
    assert len(mine) == len(reference)
    for ours, other in zip(mine, reference):
        assert_close(ours, other, tolerance)


@pytest.fixture
def long_lines(monkeypatch):
    """They draw every line out."""
    monkeypatch.setattr("ldm.diffusion.samplers.LONGEST_LINE", np.inf)


MULTISTEP = {
    ("uni_pc", 2): ("UniPCMultistepScheduler", {"solver_order": 2, "lower_order_final": False}),
    ("uni_pc", 3): ("UniPCMultistepScheduler", {"solver_order": 3, "lower_order_final": False}),
    ("deis", 2): ("DEISMultistepScheduler", {"solver_order": 2, "lower_order_final": False}),
    ("deis", 3): ("DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}),
}


@pytest.mark.parametrize("spacing", ["trailing", "karras", "log_snr"])
@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("sampler", MULTISTEP)
def test_multistep_samplers(sampler, name, n, spacing, long_lines):
    """To the least noise: the step to none is of first order here, and with theirs some of it is infinite."""
    (class_name, options), prediction = MULTISTEP[sampler], get_prediction(name)
    mine = replace(get_sampler(sampler[0], SD, spacing=spacing, final_sigma="sigma_min"), order=sampler[1])
    scheduler = getattr(diffusers, class_name)(**BETA, prediction_type=TYPES[name], **options)
    times = mine.times(SD, n)
    times = times[times > 1e-6] if n > 1 else times  # they divide 0 by 0 in a step of no length
    assert_all_close(asked_by_ours(mine, prediction, times), asked_by_theirs(scheduler, prediction, times, 0))


def half_the_curvature(nodes, step, mean, growth):
    """Their DPM-Solver++ 3M: of the parabola's curvature it takes the half. So it is of second order."""
    whole = WEIGHTS(nodes, step, mean, growth)
    if len(nodes) < 3:
        return whole
    slopes = np.array([np.polyfit(nodes, row, 2)[1] for row in np.eye(3)])  # of each basis parabola at 0
    at, mass = mean(step, 3, growth)
    return (whole + np.array([1, 0, 0]) + slopes * (at @ mass / mass.sum())) / 2


WEIGHTS = multistep.weights


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("n", STEPS)
def test_3m_is_theirs_but_for_half_the_curvature(n, spacing, long_lines, monkeypatch):
    sampler, prediction = get_sampler("dpm_solver_pp_3m", SD, spacing=spacing), get_prediction("v")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETA, prediction_type="v_prediction", solver_order=3, lower_order_final=False
    )
    times = sampler.times(SD, n)
    reference = asked_by_theirs(scheduler, prediction, times, CLEAN)
    if n > 3:
        assert np.abs(asked_by_ours(sampler, prediction, times)[-2] - reference[-2]).max() > 1e-6
    monkeypatch.setattr("ldm.diffusion.multistep.weights", half_the_curvature)
    assert_all_close(asked_by_ours(sampler, prediction, times), reference)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", TYPES)
def test_2s(n, name):
    """Theirs takes half of its times for middles of steps; it is given ours."""
    sampler, prediction = (
        get_sampler("dpm_solver_pp_2s", SD, spacing="trailing", final_sigma="sigma_min"),
        get_prediction(name),
    )
    beta = {key: value for key, value in BETA.items() if key != "steps_offset"}
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **beta, prediction_type=TYPES[name], solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(2 * n)
    ends = np.append(sampler.times(SD, n), 0)
    middles = SD.time((SD.log_snr(ends[1:]) + SD.log_snr(ends[:-1])) / 2)
    times = np.stack([ends[:-1], middles], 1).ravel()
    scheduler.order_list = [1, 2] * n
    reference = asked_by_theirs(scheduler, prediction, times, 0)
    assert_all_close(asked_by_ours(sampler, prediction, ends[:-1]), reference)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "karras", "exponential"])
@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize(
    ("sampler", "name"),
    [*(("euler", name) for name in TYPES), ("euler_ancestral", "eps"), ("euler_ancestral", "v")],  # theirs knows no x0
)
def test_euler(sampler, name, n, spacing, monkeypatch):
    kind = {"euler": diffusers.EulerDiscreteScheduler, "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler}
    draws = iter(range(n))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
        lambda *_, **__: torch.from_numpy(noise(next(draws))),
    )
    mine, prediction = get_sampler(sampler, SD, spacing=spacing), get_prediction(name)
    scheduler = kind[sampler](**BETA, prediction_type=TYPES[name])
    times = mine.times(SD, n)
    reference = asked_by_theirs(scheduler, prediction, times, CLEAN, per_image=True)
    assert_all_close(asked_by_ours(mine, prediction, times), reference, 2 * FLOAT32)  # float32 at 14 times the scale


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", TYPES)
def test_heun(name, n):
    mine, prediction = get_sampler("heun", SD), get_prediction(name)
    scheduler = diffusers.HeunDiscreteScheduler(**BETA, prediction_type=TYPES[name])
    scheduler.set_timesteps(n)
    times = mine.times(SD, n)
    twice = np.append(times[:1], np.repeat(times[1:], 2))  # each but the first is asked at a step's end, then begin
    reference = asked_by_theirs(scheduler, prediction, twice, CLEAN, per_image=True)
    assert_all_close(asked_by_ours(mine, prediction, times), reference)


@pytest.mark.parametrize("n", [n for n in STEPS if 1000 % n == 0 and n > 1])
def test_plms(n):
    """With eps. Of the other types theirs joins the outputs of several times as they are, ours their eps."""
    mine, prediction = get_sampler("plms", SD), get_prediction("eps")
    scheduler = diffusers.PNDMScheduler(**BETA, skip_prk_steps=True, timestep_spacing="leading")
    scheduler.set_timesteps(n)
    widen(scheduler, SD)
    x, asked = torch.from_numpy(start()), []
    for t in scheduler.timesteps:
        asked.append(x.numpy())
        x = scheduler.step(torch.from_numpy(output(asked[-1], int(t), prediction, SD)), t, x).prev_sample
    assert_all_close(asked_by_ours(mine, prediction, mine.times(SD, n)), [*asked, x.numpy()])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 10, 15, 20, 27, 30, 50])
def test_lcm(n, monkeypatch):
    """Theirs mixes a share of x into x0 which is below 1e-5 at all of its times."""
    draws = iter(range(n))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: torch.from_numpy(noise(next(draws)))
    )
    mine, prediction = get_sampler("lcm", SD), get_prediction("eps")
    scheduler = diffusers.LCMScheduler(**BETA)
    scheduler.set_timesteps(n)
    times = mine.times(SD, n)
    assert scheduler.timesteps.tolist() == times.tolist()
    widen(scheduler, SD)
    x, asked = torch.from_numpy(start()), []
    for t in scheduler.timesteps:
        asked.append(x.numpy())
        x = scheduler.step(torch.from_numpy(output(asked[-1], int(t), prediction, SD)), t, x).prev_sample
    assert_all_close(asked_by_ours(mine, prediction, times), [*asked, x.numpy()])


@pytest.mark.parametrize(
    ("spacing", "option"), [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")]
)
@pytest.mark.parametrize("n", STEPS[1:])
def test_spacings_of_the_noise_level(spacing, option, n):
    """Their levels from their linspace times; the time of a level differs, for between two times they draw its log."""
    scheduler = diffusers.EulerDiscreteScheduler(**BETA, timestep_spacing="linspace", **{option: True})
    scheduler.set_timesteps(n)
    times = sampling_times(spacing, n, SD)
    np.testing.assert_allclose(SD.sigma(times) / SD.alpha(times), scheduler.sigmas[:-1].numpy(), rtol=1e-4)
    np.testing.assert_allclose(times, scheduler.timesteps.numpy(), atol=0.2)


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
