"""Progressive distillation as a training: students of fewer and fewer steps (arXiv 2202.00512, algorithm 2).

The run has stages. In each of them a student learns to draw in half of its teacher's steps; it starts with the
teacher's weights, and it is the next stage's teacher. `ldm.diffusion.distillation` has the mathematics.

The first teacher is guided (arXiv 2207.12598). Its students have learnt guidance with one scale, and run once in a
step. Or they have learnt a range of scales, and are told one (arXiv 2210.03142, section 3).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Tensor

from ldm.checkpoint.names import GUIDANCE
from ldm.conditioning import Condition
from ldm.config.model import ModelConfig, SamplingConfig
from ldm.data.batches import Batch
from ldm.data.dataset import CaptionedImages
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.distillation import student_steps, target
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.errors import UserError
from ldm.networks.blockwise import BlockwiseUNet
from ldm.networks.layers import set_values
from ldm.parallel.ranks import Ranks
from ldm.randomness import generator, stratified
from ldm.train.adapters import TrainAdapters
from ldm.train.finetune import FineTune, ckpt_folder, trained_unet
from ldm.train.learning_rate import LearningRate
from ldm.train.run import Plan
from ldm.train.step import StepResult
from ldm.weights import words_of

log = logging.getLogger(__name__)

USUAL_STEPS = 32  # of a teacher that is no student
TOLD_CHANNELS = 256  # of the embedded scale, as in other people's students


# ---- the stages ----


class Stage(NamedTuple):
    """A halving: its number from 0, the student's sampling steps, its training steps from `first` to below `end`."""

    number: int
    steps: int
    first: int
    end: int


@dataclass(frozen=True)
class Halvings:
    """What a run distils.

    Fields:
        stages: in their order.
        scales: the guidance scale that the students have learnt, or the least and the largest that they are told.
        guided: the first teacher is guided; otherwise it has learnt that itself.
        rescale: of the guided teacher; see `Denoiser`.
    """

    stages: tuple[Stage, ...]
    scales: tuple[float, ...]
    guided: bool
    rescale: float

    @property
    def told(self) -> bool:
        """Whether students are told the guidance scale."""
        return len(self.scales) == 2

    @property
    def total(self) -> int:
        """Training steps of the run."""
        return self.stages[-1].end

    def at(self, step: int) -> Stage:
        """The stage of a training step."""
        return next(stage for stage in self.stages if step < stage.end)

    def network(self, config: ModelConfig) -> ModelConfig:
        """The students' config, but for how they are drawn with."""
        channels = (config.unet.time_cond_proj_dim or TOLD_CHANNELS) if self.told else None
        return replace(config, unet=replace(config.unet, time_cond_proj_dim=channels))

    def student(self, config: ModelConfig, stage: Stage) -> ModelConfig:
        """The config of a stage's student; `config`: from `network`."""
        usual = float(np.clip(config.guidance_scale, *self.scales)) if self.told else 1.0
        sampling = SamplingConfig(
            sampler="ddim",
            steps=stage.steps,
            guidance_scale=usual,
            spacing="trailing",
            final_sigma="zero",
            zeros_for_empty_prompt=config.sampling.zeros_for_empty_prompt,
            distilled_guidance=self.scales,
        )
        return replace(config, sampling=sampling)


def halvings(args: argparse.Namespace, config: ModelConfig) -> Halvings:
    """What the options and the teacher's config ask for.

    Raises:
        UserError: steps that cannot be halved so, or no number of updates for each halving; or scales that the teacher
            cannot be guided with.
    """
    schedule, own = build_schedule(config.schedule), config.sampling
    is_student = own.distilled_guidance is not None
    start = args.start_steps or (own.steps if is_student else USUAL_STEPS)
    if is_student and start != own.steps:
        raise UserError(f"the teacher was distilled for {own.steps} steps: leave out --start_steps {start}")
    sizes, updates = _halved(start, args.end_steps), args.updates_per_halving
    for steps in sizes:
        student_steps(steps, schedule)
    if len(updates) not in (1, len(sizes)) or min(updates) < 1:
        raise UserError(
            f"updates_per_halving is {' '.join(map(str, updates))}: give one number for all {len(sizes)} halvings, or "
            "one for each, all of them at least 1"
        )
    ends = np.cumsum(updates * len(sizes) if len(updates) == 1 else updates).tolist()
    stages = tuple(Stage(n, *each) for n, each in enumerate(zip(sizes, [0, *ends], ends)))
    return Halvings(stages, *_guidance(args.scale, config))


def _halved(start: int, end: int) -> list[int]:
    """The students' steps; UserError where halving `start` does not come to `end`."""
    sizes, steps = [], start
    while steps > max(end, 1) and steps % 2 == 0:
        steps //= 2
        sizes.append(steps)
    if not sizes or sizes[-1] != end:
        raise UserError(
            f"halving {start} steps does not lead to {end}: choose --start_steps as --end_steps times 2, 4, 8 and so on"
        )
    return sizes


def _guidance(asked: Sequence[float] | None, config: ModelConfig) -> tuple[tuple[float, ...], bool, float]:
    """(scales, whether the first teacher is guided, how far its guidance is rescaled), as `Halvings` has them."""
    learnt, told = config.sampling.distilled_guidance, config.unet.time_cond_proj_dim is not None
    if asked and (learnt or told) and tuple(asked) != learnt and not (told and not learnt and len(asked) == 2):
        has = "is told a guidance scale" if told else "has guidance in its weights"
        raise UserError(f"the teacher {has}: leave out --scale {' '.join(f'{scale:g}' for scale in asked)}")
    scales = learnt or tuple(asked or ()) or ((config.guidance_scale,) if not told else ())
    if not scales:
        raise UserError("the teacher is told a guidance scale: give the least and the largest one, as --scale 1 8")
    if not np.isfinite(scales).all() or min(scales) < 1 or not (len(scales) == 1 or scales[0] < scales[-1]):
        raise UserError(f"--scale must be one guidance scale or two that rise, at least 1: {scales}; 1 is no guidance")
    if len(scales) > 2:
        raise UserError(f"--scale must be one guidance scale, or the least and the largest, not {len(scales)}")
    guided = not (learnt or told or scales == (1.0,))
    return scales, guided, (config.sampling.guidance_rescale or 0.0) if guided else 0.0


class RatePerStage:
    """A learning rate that begins anew with each stage. Called like a `LearningRate`."""

    def __init__(self, args: argparse.Namespace, plan: Halvings):
        ends = args.start_learning_rate, args.end_learning_rate
        self.plan = plan
        self.rates = [
            LearningRate(args.scheduler, *ends, args.warmup_steps, 0, stage.end - stage.first) for stage in plan.stages
        ]

    def __call__(self, step: int) -> float:
        stage = self.plan.at(step)
        return self.rates[stage.number](step - stage.first)

    def warn(self) -> None:
        """Warn of the first stage whose rate is never what was asked for."""
        min(self.rates, key=lambda rate: rate.total_steps).warn()


def plan_of(args: argparse.Namespace, what: Halvings, batches_per_epoch: int) -> Plan:
    """How long the run is, and when it saves and validates."""
    return Plan(
        total=what.total,
        epoch=max(1, batches_per_epoch // args.gradient_accumulation_steps),
        save_every=args.ckpt_save_interval,
        micro_batches=args.gradient_accumulation_steps,
        validate_every=args.validation_interval if args.validation_prompts else None,
        ends=frozenset(stage.end for stage in what.stages),
    )


def with_told_scale(args: argparse.Namespace, tensors: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The teacher's tensors, and zeros for the layer that is told the guidance scale, where it has no such layer.

    Raises:
        UserError: this layer would not be trained.
    """
    channels = config.unet.time_cond_proj_dim
    if channels is None or GUIDANCE in tensors:
        return tensors
    tensors = {**tensors, GUIDANCE: np.zeros((config.unet.model_channels, channels), np.float32)}
    if GUIDANCE not in trained_unet(args, tensors):
        raise UserError("trainable_modules leaves out the layer that is told the guidance scale: add guidance_embed")
    return tensors


# ---- the task ----


class Distilling:
    """What both tasks below add to a fine-tuning: a teacher, whose targets take the place of latents and noise.

    The teacher has parameters of its own for what is trained. They are part of the resume state.
    """

    figures = ("loss", "x0_loss", "eps_loss", "student_steps")

    def __init__(
        self,
        args: argparse.Namespace,
        config: ModelConfig,
        tensors: dict,
        data: CaptionedImages,
        dtype: str,
        ranks: Ranks,
        plan: Halvings,
    ):
        self.plan, self.stage = plan, plan.stages[0]
        self.entered = 0  # the number of the stage whose teacher is there
        super().__init__(args, config, tensors, data, dtype, ranks)
        self.keep = 0
        self.schedule, self.prediction = build_schedule(config.schedule), get_prediction(config.prediction_type)
        teacher, names = self.twin(tensors, dtype), {param.name for param in self.step.optimizer.params}
        own = {param.name: param for param in teacher.get_parameters() if param.name in names}
        self.learnt = [own[param.name] for param in self.step.optimizer.params]
        for param in self.learnt:
            param.name = f"teacher.{param.name}"
        self.step.kept = tuple(self.learnt)
        self.teacher = BlockwiseUNet(teacher.unet) if self.step.gradients.layer_by_layer else teacher.unet
        self.teach()

    def teach(self) -> None:
        """Make the student the teacher."""
        set_values(self.learnt, (param.asnumpy().copy() for param in self.step.optimizer.params))
        if isinstance(self.teacher, BlockwiseUNet):
            self.teacher.weights.clear()

    def enter(self, step: int) -> None:
        """Begin the stage of this training step, if it is the first one there."""
        self.stage = self.plan.at(step)
        if step == self.stage.first and self.stage.number != self.entered:
            self.step.begin_anew()
            self.teach()
            log.info("the student of %d steps is the teacher of one of %d", 2 * self.stage.steps, self.stage.steps)
        self.entered = self.stage.number

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        self.enter(step)
        of, n = self.inputs_of, self.stage.steps
        scales = self.scales(batch.ordinals)
        cond = self.told(of.condition(batch), scales)
        learnt = target(
            of.latents(batch),
            of.eps(batch),
            np.floor(n * stratified(of.seed, "timestep", batch.ordinals)).astype(int),
            student_steps(n, self.schedule),
            self.schedule,
            self.denoiser(batch, cond, scales),
        )
        arrays = learnt.x0.astype(np.float32), learnt.eps.astype(np.float32), learnt.t, of.weight[learnt.t]
        return tuple(map(Tensor, (*arrays, *cond.given())))

    def scales(self, ordinals: np.ndarray) -> np.ndarray:
        """The guidance scale of each sample, [B]."""
        first, last = self.plan.scales[0], self.plan.scales[-1]
        return np.array([generator(self.inputs_of.seed, "guidance", n).uniform(first, last) for n in ordinals])

    def told(self, condition: Condition, scales: np.ndarray) -> Condition:
        """The condition, with the guidance scales where the networks are told them."""
        return condition.with_guidance(scales, self.config.unet.time_cond_proj_dim) if self.plan.told else condition

    def denoiser(self, batch: Batch, cond: Condition, scales: np.ndarray) -> Denoiser:
        """The teacher, guided where it has not learnt guidance."""
        network = self.teacher, self.schedule, self.prediction
        if self.stage.number or not self.plan.guided:
            return Denoiser(*network, cond)
        uncond = self.told(self.inputs_of.condition(batch, [""] * len(scales)), scales)
        return Denoiser(*network, cond, uncond, scales, self.plan.rescale)

    def measured(self, result: StepResult) -> dict[str, float]:
        return {**super().measured(result), "student_steps": self.stage.steps}

    def export(self, step: int, plan: Plan) -> Path | None:
        """Write the student at the end of its stage; returns its path. None before the end."""
        return super().export(step, plan) if plan.ends_a_stage(step) else None

    def exported(self, step: int, plan: Plan) -> Path:
        return self.path_of(self.stage)

    def path_of(self, stage: Stage) -> Path:
        """The file or folder of a stage's student."""
        return ckpt_folder(self.args) / f"student-{stage.steps}{self.suffix()}"

    def export_bytes(self) -> int:
        return super().export_bytes() * len(self.plan.stages)

    @property
    def replaces(self) -> tuple[Path, ...]:
        return tuple(map(self.path_of, self.plan.stages))

    def words(self) -> dict[str, str]:
        return words_of(self.plan.student(self.config, self.stage))

    def validate(self, step: int) -> None:
        self.validation.config = self.plan.student(self.config, self.plan.at(max(0, step - 1)))
        super().validate(step)


class DistilWeights(Distilling, FineTune):
    """Students with weights of their own."""


class DistilAdapters(Distilling, TrainAdapters):
    """Students that are the first teacher with adapters."""
