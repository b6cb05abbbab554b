"""A training run: its folder, its state, its log, and the loop that all training scripts share."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mindspore import Tensor
from tqdm import tqdm

from ldm import runtime
from ldm.config.yaml_file import save_yaml
from ldm.data.batches import Batch
from ldm.errors import UserError
from ldm.files import claimed
from ldm.parallel.ranks import Ranks
from ldm.pictures import make_folder
from ldm.signals import Stopped
from ldm.train.learning_rate import LearningRate, tell_changes
from ldm.train.log import ResultLog, loss_curve
from ldm.train.state import (
    RESUME_NAME,
    check_room,
    check_settings,
    delete,
    load_state,
    prune,
    refuse_used_folder,
    resume_path,
    save_state,
    state_bytes,
)
from ldm.train.step import StepResult, TrainStep

log = logging.getLogger(__name__)


class Task:
    """What a run trains. Every kind of training is a subclass.

    Attributes:
        step: the training step.
        figures: names of the figures that `measured` returns.
        shown: names of the figures in the progress bar.
        keep: how many of the exported files stay; 0 keeps all.
        replaces: files that `export` replaces.
    """

    step: TrainStep
    figures: tuple[str, ...]
    shown: tuple[str, ...] = ("loss",)
    keep = 0
    replaces: tuple[Path, ...] = ()

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        """The arguments of the loss."""
        raise NotImplementedError

    def measured(self, result: StepResult) -> dict[str, float]:
        """The figures of a step for the log."""
        raise NotImplementedError

    def export(self, step: int, plan: Plan) -> Path | None:
        """Write the weights trained so far; returns the path if the file may be deleted later, else None.

        A task may write none after this step.
        """
        raise NotImplementedError

    def export_bytes(self) -> int:
        """The size of the files that `export` writes."""
        raise NotImplementedError

    def facts(self) -> dict:
        """What must stay the same when the run is resumed, beside its options and its data."""
        return {}

    def changed_source(self) -> str | None:
        """A file that `export` copies from and that was written to during the run; None if there is none."""
        return None

    def validate(self, step: int) -> None:
        """Draw pictures that show how far the training is."""


@dataclass(frozen=True)
class Plan:
    """How long a run is, and when it saves; all in steps.

    total: of the whole run. epoch: of a pass over the data. micro_batches: of one step. save_every: from one save to
    the next. validate_every: likewise; None for no validation, 0 for one at the end alone. by_steps: exported files are
    numbered by steps, not by epochs. ends: of the run's stages, where it saves and validates too.
    """

    total: int
    epoch: int
    save_every: int
    micro_batches: int = 1
    validate_every: int | None = None
    by_steps: bool = True
    ends: frozenset[int] = frozenset()

    def number(self, step: int) -> int:
        """The number of the file that is exported after so many steps."""
        return step if self.by_steps else -(-step // self.epoch)

    def saves(self, done: int) -> bool:
        return done % self.save_every == 0 or self.ends_a_stage(done)

    def validates(self, done: int) -> bool:
        return self.validate_every is not None and (
            done % (self.validate_every or self.total) == 0 or self.ends_a_stage(done)
        )

    def ends_a_stage(self, done: int) -> bool:
        return done == self.total or done in self.ends


class Run:
    """One run. Rank 0 alone writes and draws; the others meet it in the next step.

    Args:
        args: the script's options; `output_path` and `resume` are read here.
        state_folder: the folder of the resume state.
        ranks: all processes of the run.
    """

    def __init__(self, args: argparse.Namespace, state_folder: str | Path, ranks: Ranks | None = None):
        self.args, self.ranks = args, ranks or Ranks()
        self.folder, self.state_folder = Path(args.output_path), make_folder(state_folder)
        self.resume_from = resume_path(args.resume, self.state_folder)
        self.progress = {"step": 0, "written": []}

    def claim(self, settings: dict) -> None:
        """Keep other runs out of the folder, before networks are built.

        Raises:
            UserError: another run uses or has used the folder, or the run to be resumed had other settings.
        """
        if self.ranks.is_main:
            runtime.until_end(claimed(self.args.output_path, "training"))
        refuse_used_folder(self.state_folder, self.resume_from)
        if self.resume_from:
            check_settings(self.resume_from, settings)

    def begin(self, task: Task, settings: dict) -> int:
        """Restore the saved state, if the run is resumed; returns how many steps are made.

        Args:
            task: what is trained.
            settings: what must stay the same when the run is resumed.

        Raises:
            UserError: the state cannot be read or is another run's, or the disk has no room for the run's files.
        """
        self.task, self.settings = task, settings
        self.ranks.agree("settings and data", settings)
        if self.resume_from:
            self.progress = {"written": [], **load_state(self.resume_from, task.step, settings)}
            if self.resume_from.parent.resolve() != self.state_folder.resolve():
                self.progress["written"] = []  # another folder's files are not this run's to delete
        if self.ranks.is_main:
            if self.resume_from:
                tell_changes(vars(self.args), self._args_file(self.resume_from.resolve().parent))
            needed = task.export_bytes() + 2 * state_bytes(task.step)
            check_room(self.state_folder, needed, self.state_folder / RESUME_NAME, *task.replaces)
            save_yaml(vars(self.args), self.folder / "args.yaml")
        return self.progress["step"]

    def _args_file(self, state_folder: Path) -> Path:
        """The file of options of the run whose state lies in `state_folder`."""
        up = len(self.state_folder.resolve().relative_to(self.folder.resolve()).parts)
        return Path(state_folder, *[".."] * up, "args.yaml")

    def train(self, batches: Iterable[Batch], plan: Plan, rate: LearningRate) -> None:
        """The loop over all steps that are not made yet."""
        task, ranks, first = self.task, self.ranks, self.progress["step"]
        self.plan, stream = plan, iter(batches)
        self._announce(rate)
        held = runtime.signals.held("when this step is made and saved")
        with held, tqdm(total=plan.total, initial=first, unit="step") as bar:
            for step in range(first, plan.total):
                if asked := max(ranks.gather("signals", runtime.signals.asked)):
                    self._stop(step, asked)
                began, lr = time.perf_counter(), rate(step)
                micro_batches = [task.inputs(next(stream), step) for _ in range(plan.micro_batches)]
                result = task.step(micro_batches, lr, step)
                if not ranks.is_main:
                    continue
                self._write(step, result, lr, time.perf_counter() - began, bar)
                if plan.saves(step + 1):
                    self.save(step + 1)
                if plan.validates(step + 1):
                    with contextlib.suppress(Stopped):
                        task.validate(step + 1)
        log.info("checkpoints are in %s, the log is %s", self.state_folder, self.folder / "result.log")

    def _announce(self, rate: LearningRate) -> None:
        """Say how many steps are to be made, and begin the log after the last step that was saved."""
        first, plan = self.progress["step"], self.plan
        log.info("%d steps of %d are to be made, %d to an epoch", max(0, plan.total - first), plan.total, plan.epoch)
        if not self.ranks.is_main:
            return
        rate.warn()
        if plan.validate_every is not None and not first:  # shows the start, and whether drawing works
            self.task.validate(0)
        columns = ("step", "epoch", *self.task.figures, "learning_rate", "grad_norm", "seconds")
        self.result = ResultLog(self.folder / "result.log", columns, first)

    def _write(self, step: int, result: StepResult, lr: float, seconds: float, bar: tqdm) -> None:
        """Write a line of the log, and move the progress bar."""
        measured = self.task.measured(result)
        own = {"step": step + 1, "epoch": 1 + step // self.plan.epoch}
        self.result.write(**own, **measured, learning_rate=lr, grad_norm=result.grad_norm, seconds=seconds)
        if not result.applied:
            scale = self.task.step.loss_scale.value
            log.warning("step %d overflowed and was left out; the loss scale is now %g", step + 1, scale)
        shown = ", ".join(f"{name} {measured[name]:.4f}" for name in self.task.shown)
        bar.set_postfix_str(f"{shown}, lr {lr:.2e}, {seconds:.2f} s", refresh=False)
        bar.update()

    def save(self, step: int) -> None:
        """Export, then the resume state.

        Raises:
            UserError: they cannot be written, or the file that the export copies from was written to. The resume state
                does not need this file, so it is saved even then.
        """
        task, written = self.task, self.progress["written"]
        exported = None if task.changed_source() else task.export(step, self.plan)
        changed = task.changed_source()
        if exported and changed:
            delete(exported)
            written = [name for name in written if name != exported.name]
        elif exported:
            names = [*(name for name in written if name != exported.name), exported.name]
            written = prune(exported.parent, names, task.keep)
        self.progress = {"step": step, "written": written}
        save_state(self.state_folder / RESUME_NAME, task.step, self.progress, self.settings)
        if changed:
            raise UserError(
                f"{changed} was written to during this run, whose checkpoints take their frozen part from it: put back "
                f"what was there and go on with --resume True; step {step} is saved"
            )
        loss_curve(self.folder / "loss_curve.png", self.result.table())

    def _stop(self, step: int, asked: int) -> None:
        """Save, and end the run before this step because of a signal."""
        if self.ranks.is_main and step > self.progress["step"]:
            self.save(step)
        told = "--resume True goes on from there" if step else "there is nothing to save"
        log.info("stopped after step %d of %d; %s", step, self.plan.total, told)
        raise Stopped(asked)
