"""The mathematics of progressive distillation, in float64, and networks that are told a guidance scale."""

from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ldm.conditioning import Condition, embed_guidance
from ldm.config.model import ModelConfig, ScheduleConfig, UNetConfig, from_yaml, to_yaml
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.distillation import ddim_step, nests, one_step_x0, second_share, student_steps, target
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import PREDICTIONS, get_prediction
from ldm.diffusion.samplers import get_sampler
from ldm.diffusion.schedule import CLEAN, NoiseSchedule, build_schedule, per_sample
from ldm.diffusion.spacing import trailing
from ldm.errors import UserError
from ldm.networks.layers import initialize
from ldm.networks.unet import UNet
from ldm.pipeline import Pipeline
from ldm.weights import config_key

SD = build_schedule(ScheduleConfig())
ZERO = build_schedule(ScheduleConfig(zero_terminal_snr=True))
SCHEDULES = pytest.mark.parametrize("schedule", [SD, ZERO], ids=["sd", "zero"])
VARIANCE = 0.3  # of the Gaussian data


def shares(t, schedule):
    """alpha and sigma, [B, 1, 1, 1] each."""
    return per_sample(schedule.alpha(t)), per_sample(schedule.sigma(t))


def pair_of(x0, z, t, schedule):
    """(x0, eps) at z."""
    alpha, sigma = shares(t, schedule)
    return x0, (z - alpha * x0) / sigma


def gaussian(schedule):
    """The exact denoiser of Gaussian data of mean 0: x0 = alpha V / (alpha^2 V + sigma^2) z."""

    def denoise(z, t):
        alpha, sigma = shares(t, schedule)
        return pair_of(alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * z, z, t, schedule)

    return denoise


def curved(schedule):
    """A denoiser that is not linear, and changes along its path."""
    return lambda z, t: pair_of(np.tanh(z) * (1.5 - per_sample(t) / 1000), z, t, schedule)


def batch(n, schedule):
    """(latents, noise, every step of a student of n steps, the steps)."""
    rng = np.random.default_rng(n)
    return *rng.standard_normal((2, n, 2, 3, 3)), np.arange(n), student_steps(n, schedule)


def two_steps(z, steps, index, schedule, denoise):
    """z'' by the teacher's two DDIM steps from z."""
    for times, following in ((steps.begin, steps.middle), (steps.middle, steps.end)):
        z = ddim_step(*denoise(z, times[index]), following[index], schedule)
    return z


def quotient(z, last, begin, end, schedule):
    """The paper's form of the target (arXiv 2202.00512, appendix G), in the type of z."""
    (alpha, sigma), (alpha_end, sigma_end) = (
        (share.astype(z.dtype) for share in shares(t, schedule)) for t in (begin, end)
    )
    return (last - sigma_end / sigma * z) / (alpha_end - sigma_end / sigma * alpha)


# ---- the times ----


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 128, 256, 500])
def test_a_students_times_are_every_other_one_of_its_teachers(n):
    steps = student_steps(n, SD)
    sampler = get_sampler("ddim", SD, spacing="trailing", final_sigma="zero")
    np.testing.assert_array_equal(steps.begin, sampler.times(SD, n))
    np.testing.assert_array_equal(np.ravel((steps.begin, steps.middle), "F"), sampler.times(SD, 2 * n))
    np.testing.assert_array_equal(steps.end, [*steps.begin[1:], sampler.end])
    assert steps.begin[0] == 999 and steps.end[-1] == CLEAN
    assert all(np.array_equal(times, times.astype(int)) for times in steps)


@pytest.mark.parametrize(("n", "words"), [(48, "choose 47 or 49 steps"), (0, "1 to 500"), (501, "1 to 500")])
def test_steps_that_do_not_nest_are_refused_with_the_nearest_that_do(n, words):
    assert not nests(n, 1000) and nests(47, 1000) and nests(49, 1000)
    with pytest.raises(UserError, match=words):
        student_steps(n, SD)


def test_where_no_larger_number_nests_the_smaller_one_is_named_alone():
    schedule = NoiseSchedule(np.linspace(0.9, 0.1, 13))
    with pytest.raises(UserError, match="those of 12: choose 5 steps"):
        student_steps(6, schedule)


# ---- the target ----


@SCHEDULES
@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_gaussian_data_has_a_target_in_closed_form(n, schedule):
    """The steps of a linear denoiser are factors of z, and so is the target."""
    x0, eps, index, steps = batch(n, schedule)
    got = target(x0, eps, index, steps, schedule, gaussian(schedule))
    z = shares(steps.begin, schedule)[0] * x0 + shares(steps.begin, schedule)[1] * eps
    np.testing.assert_allclose(got.z, z, atol=1e-12)
    last = np.ones((n, 1, 1, 1))
    for t, s in ((steps.begin, steps.middle), (steps.middle, steps.end)):
        (alpha, sigma), (alpha_s, sigma_s) = shares(t, schedule), shares(s, schedule)
        # x0 and eps are z_t times alpha V and sigma over the variance of z_t.
        last = last * (alpha_s * alpha * VARIANCE + sigma_s * sigma) / (alpha**2 * VARIANCE + sigma**2)
    factor = quotient(np.ones((n, 1, 1, 1)), last, steps.begin, steps.end, schedule)
    np.testing.assert_allclose(got.x0, factor * z, atol=1e-12)


@SCHEDULES
def test_a_teacher_that_is_consistent_is_its_own_target(schedule):
    """It says the same picture at every time."""
    x0, eps, index, steps = batch(8, schedule)
    known = np.random.default_rng(1).standard_normal(x0.shape)
    got = target(x0, eps, index, steps, schedule, lambda z, t: pair_of(known, z, t, schedule))
    np.testing.assert_allclose(got.x0, known, atol=1e-12)
    np.testing.assert_allclose(got.eps, pair_of(known, got.z, steps.begin, schedule)[1], atol=1e-12)


def through(prediction, denoise, schedule):
    """The denoiser, whose answer goes through a network's output of this prediction type."""

    def teacher(z, t):
        given = shares(t, schedule)
        return prediction.to_x0_eps(prediction.target(*denoise(z, t), *given), z, *given)

    return teacher


@SCHEDULES
def test_all_prediction_types_give_the_same_target(schedule):
    x0, eps, index, steps = batch(16, schedule)
    plain, found = curved(schedule), []
    for prediction in PREDICTIONS.values():
        if prediction.needs_signal and schedule.zero_terminal_snr:
            continue
        found.append(target(x0, eps, index, steps, schedule, through(prediction, plain, schedule)))
    assert len(found) > 1
    for other in found[1:]:
        np.testing.assert_allclose(other.x0, found[0].x0, atol=1e-12)
        np.testing.assert_allclose(other.eps, found[0].eps, atol=1e-12)


@SCHEDULES
def test_the_last_step_takes_the_second_x0_and_a_first_step_without_signal_the_noise(schedule):
    x0, eps, index, steps = batch(4, schedule)
    teacher = curved(schedule)
    got = target(x0, eps, index, steps, schedule, teacher)
    assert second_share(*(times[-1:] for times in steps), schedule)[0] == 1
    middle = ddim_step(*teacher(got.z, steps.begin), steps.middle, schedule)
    np.testing.assert_allclose(got.x0[-1], teacher(middle, steps.middle)[0][-1], atol=1e-12)
    assert got.t.dtype == np.int32 and got.t.tolist() == trailing(4, 1000).tolist()
    share = second_share(*steps, schedule)
    assert ((share > 0) & (share <= 1)).all()
    if schedule.zero_terminal_snr:
        np.testing.assert_array_equal(got.z[0], eps[0])
        np.testing.assert_array_equal(got.eps[0], eps[0])
        assert np.abs(got.x0[0] - teacher(got.z, steps.begin)[0][0]).max() > 0.01


@SCHEDULES
@pytest.mark.parametrize("n", [1, 4, 64])
def test_one_step_of_the_student_lands_where_the_teachers_two_do(n, schedule):
    x0, eps, index, steps = batch(n, schedule)
    got = target(x0, eps, index, steps, schedule, curved(schedule))
    landed = two_steps(got.z, steps, index, schedule, curved(schedule))
    np.testing.assert_allclose(ddim_step(got.x0, got.eps, steps.end, schedule), landed, atol=1e-12)
    alpha, sigma = shares(steps.begin, schedule)
    np.testing.assert_allclose(alpha * got.x0 + sigma * got.eps, got.z, atol=1e-12)


def test_samples_are_apart_and_may_learn_any_step():
    x0, eps, index, steps = batch(8, SD)
    whole = target(x0, eps, index, steps, SD, curved(SD))
    chosen = np.array([5, 0, 5])
    part = target(x0[chosen], eps[chosen], chosen, steps, SD, curved(SD))
    for got, wanted in zip(part, whole):
        np.testing.assert_array_equal(got, wanted[chosen])


def test_a_student_that_has_learnt_draws_its_teachers_picture():
    """Drawn in half the teacher's steps, by the sampler that draws pictures."""
    sampler = get_sampler("ddim", SD, spacing="trailing", final_sigma="zero")
    noise, teacher, n = np.random.default_rng(0).standard_normal((1, 2, 3, 3)), gaussian(SD), 4
    steps = student_steps(n, SD)

    def student(z, t):
        """The target depends on z alone, so any latents and noise that make this z do."""
        index = np.flatnonzero(steps.begin == t)
        x0, eps = pair_of(np.zeros_like(z), z, t, SD)
        return target(x0, eps, index, steps, SD, teacher)[2:]

    pictures = [sampler(net, noise, sampler.times(SD, k), SD) for net, k in ((student, n), (teacher, 2 * n))]
    np.testing.assert_allclose(*pictures, atol=1e-12)


def test_the_convex_form_is_the_papers_quotient_and_more_exact():
    for n, least in ((8, 10), (64, 30)):
        x0, eps, index, steps = batch(n, SD)
        z = ddim_step(x0, eps, steps.begin, SD)
        first, noise = curved(SD)(z, steps.begin)
        second, _ = curved(SD)(ddim_step(first, noise, steps.middle, SD), steps.middle)
        last = two_steps(z, steps, index, SD, curved(SD))
        share = second_share(*steps, SD)
        exact = one_step_x0(first, second, share)
        np.testing.assert_allclose(quotient(z, last, steps.begin, steps.end, SD), exact, atol=1e-12)
        ours = one_step_x0(*(array.astype(np.float32) for array in (first, second, share)))
        theirs = quotient(*(array.astype(np.float32) for array in (z, last)), steps.begin, steps.end, SD)
        errors = [np.abs(each - exact).max() for each in (ours, theirs)]
        assert ours.dtype == theirs.dtype == np.float32
        assert errors[0] < 1e-6 and errors[1] > least * errors[0], errors


# ---- the teacher's guidance, and the student's loss ----


class Network:
    """z, t and a caption's mean, by NumPy."""

    def __call__(self, z, t, context):
        z, t, context = (tensor.asnumpy() for tensor in (z, t, context))
        return Tensor(np.tanh(z) * context.mean((1, 2)).reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)


def denoiser(scale):
    cond, uncond = (Condition(np.random.default_rng(seed).random((4, 2, 3), np.float32)) for seed in (1, 2))
    return Denoiser(Network(), SD, get_prediction("v"), cond, uncond, scale)


def test_guidance_of_scale_1_is_none_and_each_sample_may_have_its_own():
    x0, eps, index, steps = batch(4, SD)
    plain, ones, mixed, guided = (
        target(x0, eps, index, steps, SD, denoiser(scale)) for scale in (1, np.ones(4), np.array([1, 3, 1, 3.0]), 3)
    )
    np.testing.assert_array_equal(plain.x0, ones.x0)
    np.testing.assert_allclose(mixed.x0[::2], plain.x0[::2], atol=1e-6)
    np.testing.assert_array_equal(mixed.x0[1::2], guided.x0[1::2])
    assert np.abs(guided.x0 - plain.x0).max() > 0.01


def test_a_denoiser_takes_a_time_for_each_sample():
    z, t = np.random.default_rng(0).standard_normal((4, 2, 3, 3)), np.array([999, 20.5, 3, 0])
    together = np.stack(denoiser(3)(z, t))
    for n, time in enumerate(t):
        np.testing.assert_array_equal(together[:, n], np.stack(denoiser(3)(z, time))[:, n])


@SCHEDULES
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_training_loss_takes_the_target_in_the_place_of_latents_and_noise(name, schedule):
    """Its network sees z, and is asked for the target in its own type."""
    if name == "eps" and schedule.zero_terminal_snr:
        return
    x0, eps, index, steps = batch(64, schedule)
    learnt = target(x0, eps, index, steps, schedule, curved(schedule))
    prediction, t = get_prediction(name), Tensor(learnt.t)
    loss = DiffusionLoss(None, schedule, prediction)
    pair = [Tensor(array, ms.float32) for array in (learnt.x0, learnt.eps)]
    np.testing.assert_allclose(loss.noisy(*pair, t).asnumpy(), learnt.z, atol=2e-6)
    perfect = prediction.target(learnt.x0, learnt.eps, *shares(learnt.t, schedule))
    weight = Tensor(np.ones(64, np.float32))
    assert loss.compare(Tensor(perfect, ms.float32), *pair, t, weight)[0].asnumpy() < 1e-12
    wrong = prediction.target(*pair_of(learnt.x0 + 0.25, learnt.z, learnt.t, schedule), *shares(learnt.t, schedule))
    _, of_x0, _ = loss.compare(Tensor(wrong, ms.float32), *pair, t, weight)
    np.testing.assert_allclose(of_x0.asnumpy(), 0.25**2, rtol=1e-3)


# ---- networks that are told the guidance scale ----

SMALL = UNetConfig(
    model_channels=64,  # two channels to a group: the norm of one channel takes away what the time adds to it
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(1,),
    context_dim=8,
    num_head_channels=16,
)


def test_a_guidance_scale_is_embedded_as_diffusers_reads_it():
    """Sines first, then cosines, of 1000 (w - 1); the least frequency is 1/10000."""
    got = embed_guidance(np.array([1, 7.5]), 6)
    angles = 6500 * np.array([1, 0.01, 0.0001])
    np.testing.assert_allclose(got, [[0, 0, 0, 1, 1, 1], [*np.sin(angles), *np.cos(angles)]], atol=1e-7)
    assert got.dtype == np.float32 and embed_guidance(np.ones(3), 256).shape == (3, 256)


def test_a_student_starts_as_its_teacher_and_can_learn_the_scale():
    teacher, student = UNet(SMALL), UNet(replace(SMALL, time_cond_proj_dim=8))
    rng = np.random.default_rng(0)
    for net in (teacher, student):
        net.set_train(False)
        initialize(net, 0)
    own, others = ({param.name: param for param in net.get_parameters()} for net in (student, teacher))
    assert own.keys() - others.keys() == {"guidance_embed.weight"}
    assert not own["guidance_embed.weight"].asnumpy().any()
    for name, param in others.items():  # a trained teacher has no zeros, such as those that random blocks end with
        values = 0.1 * rng.standard_normal(param.shape, np.float32)
        for net in (own, others):
            net[name].set_data(Tensor(values))
    z, context = Tensor(rng.standard_normal((2, 4, 8, 8), np.float32)), Tensor(rng.random((2, 3, 8), np.float32))
    given, t = Tensor(embed_guidance(np.array([1.5, 9]), 8)), Tensor(np.array([999, 20], np.int32))
    wanted = teacher(z, t, context).asnumpy()
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_array_equal(student(z, t, context, given).asnumpy(), wanted)
    student.guidance_embed.weight.set_data(Tensor(rng.standard_normal((64, 8), np.float32)))
    changed = np.abs(student(z, t, context, given).asnumpy() - wanted).max((1, 2, 3))
    assert (changed > 1e-3).all()


def test_a_pipeline_tells_the_network_the_scale_and_runs_it_once():
    calls = []

    def network(z, t, context, guidance):
        calls.append((context.shape, guidance.asnumpy()))
        return z

    features = Condition(np.ones((1, 3, 8), np.float32))
    model = SimpleNamespace(unet=network, conditioner=lambda *texts: features, size_numbers=0, guidance_channels=6)
    pipeline = Pipeline(ModelConfig("v"), model)
    pipeline.denoiser(["a fox", "a hen"], ["", ""], 7.5)(np.zeros((2, 4, 2, 2)), 999)
    np.testing.assert_array_equal(calls[0][1], embed_guidance(np.array([7.5, 7.5]), 6))
    assert calls[0][0] == (2, 3, 8) and len(calls) == 1


def test_a_condition_carries_the_embedded_scale():
    whole = Condition.join([Condition(np.ones((1, 2, 3))).with_guidance(np.array([w]), 6) for w in (1, 4)])
    np.testing.assert_array_equal(whole.guidance, embed_guidance(np.array([1, 4]), 6))
    assert [field.shape for field in whole.given()] == [(2, 2, 3), (2, 6)]


def test_configs_of_other_networks_are_written_as_before():
    plain, guided = ModelConfig("v"), ModelConfig("v", unet=UNetConfig(time_cond_proj_dim=256))
    assert "time_cond_proj_dim" not in to_yaml(plain)
    for config in (plain, guided):
        assert from_yaml(to_yaml(config), "it") == config
    assert config_key(plain) != config_key(guided)
