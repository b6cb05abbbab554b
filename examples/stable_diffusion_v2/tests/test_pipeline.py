"""What few steps cost on a trained network: the embedded model against its own ODE, solved finely."""

import numpy as np
import pytest

from ldm.diffusion.samplers import get_sampler
from ldm.model import StableDiffusion
from ldm.pipeline import Pipeline, normal_draws
from ldm.weights import choose_config, open_weights

TINY = "models/tiny-vpred.safetensors"
PROMPTS = ["a drawing of a tomato, red, noto style", "a drawing of a fox, noto style"]


@pytest.fixture(scope="module")
def draw():
    """(sampler, steps, ...) -> final latents of two prompts, from the same noise, at a guidance scale of 7.5."""
    weights = open_weights(TINY)
    config = choose_config(weights).config
    model = StableDiffusion(config)
    model.load(weights.checkpoint.tensors, TINY, copy=True)
    pipeline = Pipeline(config, model)
    noise = normal_draws(1, "sampling noise", model.latent_shape(64, 64), [0, 1])(-1)
    denoise = pipeline.denoiser(PROMPTS, ["", ""], 7.5)

    def run(name, steps, **more):
        sampler = get_sampler(name, pipeline.schedule, **more)
        return sampler(denoise, noise, sampler.times(pipeline.schedule, steps), pipeline.schedule)

    return run


def test_few_steps_come_near_the_ode(draw, monkeypatch):
    fine = draw("dpm_solver_pp", 120)

    def distance(steps, **more):
        return np.sqrt(((draw("dpm_solver_pp", steps, **more) - fine) ** 2).mean() / (fine**2).mean())

    assert distance(15) < 0.25 and distance(20) < 0.15
    good = distance(15, spacing="leading")
    assert good < 0.2
    monkeypatch.setattr("ldm.diffusion.samplers.LONGEST_LINE", np.inf)
    assert distance(15, spacing="leading") > 2 * good
