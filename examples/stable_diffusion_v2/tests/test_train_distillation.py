"""train_distillation.py: its stages, its teacher, what it writes, and how its students are drawn with."""

import json
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import text_to_image
import train_distillation
import train_text_to_image
from test_scripts import QUICKLY, SMALLER, call, fill_place, refusal, run, sampling, tensors, training

from ldm import checkpoint, drawing
from ldm.checkpoint import lora
from ldm.checkpoint.names import GUIDANCE
from ldm.config.model import SamplingConfig, from_yaml, save_model_config, to_yaml
from ldm.config.options import read_options
from ldm.diffusion.distillation import student_steps, target
from ldm.errors import UserError
from ldm.networks.blockwise import BlockwiseUNet
from ldm.networks.unet import UNet
from ldm.pipeline import Pipeline, sampler_of
from ldm.train import distill, finetune
from ldm.train.distill import RatePerStage, halvings
from ldm.train.log import read_log
from ldm.train.run import Run
from ldm.weights import choose_config, open_weights, with_adapters

STUDENT = SamplingConfig("ddim", 4, 1.0, "trailing", "zero", distilled_guidance=(3.0,))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    fill_place(folder, SMALLER)
    return folder


def distilling(place, output, *more) -> list[str]:
    words = ["--updates_per_halving", 2, "--scale", 3, "--ckpt_save_interval", 1]
    return training(place, output, *words, *more)


def students(output) -> dict[str, checkpoint.Checkpoint]:
    return {path.stem: checkpoint.load(path) for path in (output / "ckpt/rank_0").glob("student-*")}


def config_of(path):
    return choose_config(open_weights(str(path))).config


def options(*words) -> Namespace:
    return read_options(train_distillation.build_parser(), list(map(str, words)))


# ---- what is asked for ----


def test_the_defaults_are_the_papers():
    args = options()
    assert (args.scheduler, args.end_learning_rate, args.clip_grad, args.max_grad_norm) == ("linear", 0, True, 1)
    assert (args.weight_decay, args.loss_weighting, args.use_ema) == (0, "truncated_snr", False)
    plan = halvings(args, SMALLER)
    assert [stage.steps for stage in plan.stages] == [16, 8, 4, 2, 1]
    assert plan.scales == (SMALLER.guidance_scale,) and plan.guided


def test_stages_follow_each_other_and_each_has_its_own_rate():
    args = options("--start_steps", 8, "--end_steps", 2, "--updates_per_halving", 5, 3, "--start_learning_rate", 1)
    plan = halvings(args, SMALLER)
    assert plan.stages == ((0, 4, 0, 5), (1, 2, 5, 8)) and plan.total == 8
    assert [plan.at(step).steps for step in range(8)] == [4] * 5 + [2] * 3
    rate = RatePerStage(args, plan)
    assert [rate(step) for step in range(8)] == [1, 0.75, 0.5, 0.25, 0, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start_steps", 12], "halving 12 steps does not lead to 1"),
        (["--start_steps", 8, "--end_steps", 8], "halving 8 steps does not lead to 8"),
        (["--start_steps", 96, "--end_steps", 48], "choose 47 or 49"),
        (["--updates_per_halving", 1, 2], "one for each"),
        (["--updates_per_halving", 0], "at least 1"),
        (["--scale", 0.5], "at least 1"),
        (["--scale", 4, 2], "that rise"),
        (["--scale", 1, 2, 3], "not 3"),
        (["--scale", "nan"], "nan"),
        (["--use_lora", True, "--scale", 1, 8], "use_lora leaves the weights"),
        (["--trainable_modules", "attn2", "--scale", 1, 8], "add guidance_embed"),
        (["--scheduler", "multi_step_decay"], "choose from"),
        (["--train_text_encoder", True], "unknown option --train_text_encoder"),
    ],
)
def test_what_cannot_be_distilled_is_refused_at_once(place, tmp_path, monkeypatch, capsys, words, message):
    said = refusal(monkeypatch, capsys, train_distillation, training(place, tmp_path / "out", *words))
    assert message in said and not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_student_is_distilled_further_as_it_was(place):
    """Its steps and its guidance are in its config; asking for others is a mistake."""
    student = replace(SMALLER, sampling=STUDENT)
    plan = halvings(options("--end_steps", 2), student)
    assert [stage.steps for stage in plan.stages] == [2] and plan.scales == (3.0,) and not plan.guided
    for words, message in ((["--start_steps", 8], "for 4 steps"), (["--scale", 2], "in its weights")):
        with pytest.raises(UserError, match=message):
            halvings(options(*words), student)
    told = replace(SMALLER, unet=replace(SMALLER.unet, time_cond_proj_dim=8))
    with pytest.raises(UserError, match="the least and the largest"):
        halvings(options(), told)
    plan = halvings(options("--scale", 1, 8), told)
    assert plan.told and not plan.guided and plan.network(told).unet.time_cond_proj_dim == 8


# ---- the targets ----


@pytest.mark.parametrize("scale", [[3], [1.5, 4]])
def test_the_first_teacher_is_the_guided_model(place, tmp_path, monkeypatch, scale):
    """The loss is given what `target` makes with the guided denoiser of a drawing."""
    found = {}

    def caught(self, batches, plan, rate):
        found.update(task=self.task, batch=next(iter(batches)))

    monkeypatch.setattr(Run, "train", caught)
    words = ["--start_steps", 4, "--end_steps", 2, "--scale", *scale]
    call(monkeypatch, train_distillation, distilling(place, tmp_path, *words, "--cache_text", False))
    task, batch = found["task"], found["batch"]
    inputs, texts, steps = task.inputs(batch, 0), batch.texts, student_steps(2, task.schedule)
    scales = task.scales(batch.ordinals)
    assert (scales == 3).all() if len(scale) == 1 else ((scales > 1.5) & (scales < 4)).all() and len(set(scales)) == 3
    pipeline = Pipeline(task.config, task.model)
    pipeline.model.guidance_channels = None
    conds = pipeline.condition(texts), pipeline.condition([""] * 3)
    if task.plan.told:  # the layer that is told is still zero
        (layer,) = (param for param in task.learnt if param.name.endswith("guidance_embed.weight"))
        assert not layer.asnumpy().any()
        conds = [each.with_guidance(np.ones(3), 256) for each in conds]
    guided = distill.Denoiser(task.model.unet, task.schedule, task.prediction, *conds, scales)
    t = inputs[2].asnumpy()
    assert set(t) == set(steps.begin.astype(int))  # a batch covers the times
    index = (t < steps.begin[0]).astype(int)
    wanted = target(task.inputs_of.latents(batch), task.inputs_of.eps(batch), index, steps, task.schedule, guided)
    for got, expected in zip(inputs, (wanted.x0, wanted.eps)):
        np.testing.assert_allclose(got.asnumpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    one = task.export_bytes()
    task.plan = replace(task.plan, stages=task.plan.stages * 3)  # room is needed for every student
    assert task.export_bytes() == 3 * one and {path.name for path in task.replaces} == {"student-2.safetensors"}


# ---- a run ----


def stopped_at(monkeypatch, step):
    """Let the next run end before this step."""
    inputs = distill.Distilling.inputs

    def stop(self, batch, number):
        if number == step:
            raise UserError("stopped here")
        return inputs(self, batch, number)

    monkeypatch.setattr(distill.Distilling, "inputs", stop)


@pytest.fixture(scope="module")
def runs(place):
    """Two runs 8 -> 4 -> 2 -> 1: one undisturbed, one stopped in a stage and at the end of one."""
    whole, parts = place / "whole", place / "parts"
    words = ["--start_steps", 8, "--updates_per_halving", 3, 2, 1, "--ema_decay", 0.5, *QUICKLY]
    words += ["--gradient_accumulation_steps", 2]
    prompts = ["--validation_prompts", "a cat", "--validation_interval", 0]
    with pytest.MonkeyPatch.context() as patch:
        call(patch, train_distillation, distilling(place, whole, *words, *prompts))
    for step in (2, 3, 4, None):  # in the first stage, at its end, in the second one; the end of that is step 5
        with pytest.MonkeyPatch.context() as patch:
            if step:
                stopped_at(patch, step)
            again = ["--resume", True] if step != 2 else []
            with pytest.raises(SystemExit) if step else nullcontext():
                call(patch, train_distillation, distilling(place, parts, *words, *again))
    return whole, parts


def test_every_halving_leaves_a_student_that_says_how_to_draw(runs, place):
    whole, _ = runs
    assert sorted(path.name for path in (whole / "ckpt/rank_0").iterdir()) == [
        *(f"student-{steps}.safetensors" for steps in (1, 2, 4)),
        "train_resume.safetensors",
    ]
    for steps in (4, 2, 1):
        said = config_of(whole / f"ckpt/rank_0/student-{steps}.safetensors")
        assert said == replace(SMALLER, sampling=replace(STUDENT, steps=steps))
    log = read_log(whole / "result.log")
    assert log["student_steps"].tolist() == [4, 4, 4, 2, 2, 1] and np.isfinite(log["loss"]).all()
    assert sorted(path.name for path in (whole / "validation").iterdir()) == [f"{step:06}.png" for step in (0, 3, 5, 6)]


def test_a_run_in_parts_is_that_in_one_bit_for_bit(runs):
    whole, parts = (tensors(output / "ckpt/rank_0/train_resume.safetensors") for output in runs)
    assert whole.keys() == parts.keys() and {"teacher.model", "model"} <= {n.split(".diff")[0] for n in whole}
    assert [name for name in whole if not np.array_equal(whole[name], parts[name])] == []
    one, other = map(students, runs)
    assert one.keys() == other.keys() == {"student-4", "student-2", "student-1"}
    for name in one:
        assert all(np.array_equal(one[name].tensors[key], other[name].tensors[key]) for key in one[name].tensors)


def test_a_stage_begins_with_the_averages_of_the_one_before(runs):
    """The last teacher is the student before it, which was exported with its averages."""
    whole, _ = runs
    state, student = tensors(whole / "ckpt/rank_0/train_resume.safetensors"), students(whole)["student-2"]
    taught = {name.removeprefix("teacher."): array for name, array in state.items() if name.startswith("teacher.")}
    assert taught and all(np.array_equal(student.tensors[name], array) for name, array in taught.items())
    assert (
        json.loads(checkpoint.formats.read(whole / "ckpt/rank_0/train_resume.safetensors")[1]["train_state"])[
            "counters"
        ]["updates"]
        == 1
    )  # of the last stage alone


def test_the_teachers_yaml_file_does_not_hide_that_a_model_is_a_student(runs, place):
    """Otherwise guidance would come on top of the guidance in the weights."""
    weights, yaml = open_weights(str(runs[0] / "ckpt/rank_0/student-4.safetensors")), str(place / "model.yaml")
    chosen = choose_config(weights, yaml).config
    assert chosen.sampling == replace(STUDENT, steps=4) and not halvings(options("--end_steps", 2), chosen).guided
    assert choose_config(weights, yaml, changes=["model.sampling.steps=8"]).config.sampling.steps == 8


def test_another_plan_is_another_run(runs, place, monkeypatch, capsys):
    words = ["--start_steps", 8, "--updates_per_halving", 4, 2, 1, "--ema_decay", 0.5, *QUICKLY]
    words += ["--gradient_accumulation_steps", 2, "--resume", True]
    assert "halvings was" in refusal(monkeypatch, capsys, train_distillation, distilling(place, runs[0], *words))


def test_layer_by_layer_is_the_same(place, tmp_path, monkeypatch):
    """Both the student's gradients and the teacher, across the end of a stage."""
    save_model_config(replace(SMALLER, unet=replace(SMALLER.unet, use_checkpoint=True)), tmp_path / "model.yaml")
    words = ["--start_steps", 4, "--use_ema", False, "--model_config", tmp_path / "model.yaml"]
    losses, teachers = [], []
    teach = distill.Distilling.teach
    monkeypatch.setattr(distill.Distilling, "teach", lambda self: teachers.append(type(self.teacher)) or teach(self))
    for many in (0, 10**9):
        monkeypatch.setattr(finetune, "MANY_WEIGHTS", many)
        call(monkeypatch, train_distillation, distilling(place, tmp_path / str(many), *words))
        losses.append(read_log(tmp_path / str(many) / "result.log")["loss"])
    assert teachers == [BlockwiseUNet, BlockwiseUNet, UNet, UNet]
    np.testing.assert_allclose(*losses, rtol=1e-4)


# ---- students of a range, adapters ----


def test_a_student_of_a_range_of_scales_is_told_one(place, tmp_path, monkeypatch, caplog):
    words = ["--start_steps", 4, "--end_steps", 2, "--scale", 1, 8, "--use_ema", False]
    call(monkeypatch, train_distillation, distilling(place, tmp_path / "out", *words))
    path = tmp_path / "out/ckpt/rank_0/student-2.safetensors"
    config, weights = config_of(path), checkpoint.load(path).tensors
    assert config.sampling.distilled_guidance == (1.0, 8.0) and config.guidance_scale == 8.0  # SMALLER's 9 is above
    assert weights[GUIDANCE].shape == (32, 256) and weights[GUIDANCE].any()
    drawn = []
    for scale in (2, 6):
        output = tmp_path / f"drawn{scale}"
        one = ["--n_iter", 1, "--n_samples", 1, "--prompt", "a cat", "--scale", scale, "--negative_prompt", "bad"]
        call(monkeypatch, text_to_image, ["--ckpt_path", path, "--output_path", output, *one])
        drawn.append((output / "samples/00000.png").read_bytes())
    assert drawn[0] != drawn[1] and "without them" in caplog.text and "was distilled for" not in caplog.text
    further = ["--pretrained_model_path", path, "--data_path", place / "data", "--output_path", tmp_path / "further"]
    call(monkeypatch, train_distillation, [*further, "--updates_per_halving", 1, "--train_batch_size", 2, *QUICKLY])
    assert config_of(tmp_path / "further/ckpt/rank_0/student-1.safetensors").sampling.distilled_guidance == (1.0, 8.0)
    said = [*further[:2], "--data_path", place / "data", "--output_path", tmp_path / "no"]
    assert "was distilled" in _refused(monkeypatch, said)


def _refused(monkeypatch, words) -> str:
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, train_text_to_image, words)
    return str(caught.value.code)


def test_a_student_of_adapters_draws_as_it_was_distilled(place, tmp_path, monkeypatch, caplog):
    words = ["--start_steps", 4, "--use_lora", True, "--lora_rank", 2, "--lora_format", "peft", "--use_ema", False]
    call(monkeypatch, train_distillation, distilling(place, tmp_path / "out", *words))
    folder = tmp_path / "out/ckpt/rank_0"
    assert sorted(path.name for path in folder.iterdir()) == ["student-1", "student-2", "train_resume.safetensors"]
    state = tensors(folder / "train_resume.safetensors")
    assert state and all(".adapter." in name for name in state) and any(name.startswith("teacher.") for name in state)
    assert lora.load(folder / "student-1").form == "peft"
    base = checkpoint.load(place / "base.safetensors").tensors
    _, config = with_adapters(base, SMALLER, [str(folder / "student-1")], [1.0])
    assert config == replace(SMALLER, sampling=replace(STUDENT, steps=1))
    words = ["--n_iter", 1, "--n_samples", 1, "--prompt", "a cat", "--lora_ckpt_path", folder / "student-2"]
    draw = [word for word in sampling(place, tmp_path / "drawn") if word not in ("--sampling_steps", "3")]
    call(monkeypatch, text_to_image, [*draw, *words])
    told = json.loads((tmp_path / "drawn/samples/prompts.jsonl").read_text())
    assert (told["sampling_steps"], told["sampler"], told["scale"]) == (2, "ddim", 1)
    run("tools/merge_lora.py", tmp_path / "m.safetensors", "--base", place / "base.safetensors", *words[-2:])
    assert config_of(tmp_path / "m.safetensors").sampling == replace(STUDENT, steps=2)


# ---- drawing ----


@pytest.mark.parametrize(
    ("sampler", "steps", "scale", "scales", "said"),
    [
        ("ddim", 4, 1, (3.0,), []),
        ("ddim", 4, 5, (1.0, 8.0), []),
        ("ddim", 4, 9, (1.0, 8.0), ["--scale from 1 to 8, not 9"]),
        ("ddim", 8, 3, (3.0,), ["--sampling_steps 4, not 8", "--scale 1, not 3"]),
        ("ddpm", 4, 1, (3.0,), ["--sampler ddim, not ddpm", "--ddim_eta 0.0, not 1.0"]),
        ("ddpm", 8, 3, None, []),
    ],
)
def test_one_line_says_that_a_student_was_distilled_otherwise(sampler, steps, scale, scales, said, caplog):
    unet = replace(SMALLER.unet, time_cond_proj_dim=256)
    config = replace(SMALLER, unet=unet, sampling=replace(STUDENT, distilled_guidance=scales))
    settings = SimpleNamespace(sampler=sampler_of(config, sampler), steps=steps, guidance_scale=scale)
    drawing.warn_of_other_steps([settings, settings], config)
    assert len(caplog.messages) == bool(said) and all(caplog.text.count(words) == 1 for words in said)


def test_what_students_have_is_checked_and_left_out_of_other_models():
    assert "distilled_guidance" not in to_yaml(SMALLER)
    student = replace(SMALLER, sampling=STUDENT)
    assert from_yaml(to_yaml(student), "test") == student
    for wrong, message in (((4.0, 2.0), "the least and the largest"), ((1.0, 2.0, 3.0), "one scale")):
        with pytest.raises(UserError, match=message):
            replace(STUDENT, distilled_guidance=wrong)
    with pytest.raises(UserError, match="time_cond_proj_dim is missing"):
        replace(SMALLER, sampling=replace(STUDENT, distilled_guidance=(1.0, 8.0)))
