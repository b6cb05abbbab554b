"""From the options of a training script to a run that can begin: which model is meant, its checks, its data.

`read`, `settle`, `check`, `Job` and `Job.open` follow each other. Each finds its mistakes before anything more
expensive begins.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

from ldm import runtime
from ldm.checkpoint.diffusers_config import check_model
from ldm.config.model import NEEDS, ModelConfig, changed, load_model_config, save_model_config, to_dict
from ldm.config.options import Parser, read_options, require_at_least
from ldm.config.versions import VERSIONS, existing, find_checkpoint
from ldm.data.batches import Augment
from ldm.diffusion.schedule import build_schedule
from ldm.errors import UserError
from ldm.parallel.ranks import Ranks
from ldm.pipeline import check_config
from ldm.randomness import settled_seed
from ldm.train import adapters, finetune
from ldm.train.ema import Ema
from ldm.train.finetune import FineTune
from ldm.train.optimizer import check_numbers
from ldm.train.run import Run
from ldm.train.step import LossScale, TrainStep
from ldm.train.validation import settings_of
from ldm.weights import Choice, Weights, choose_config, open_weights, pad_text

log = logging.getLogger(__name__)


def read(parser: Parser) -> tuple[argparse.Namespace, Ranks]:
    """The options of the command, with one seed for all ranks; the processes of the run."""
    args = read_options(parser)
    ranks = runtime.join(args.use_parallel)
    args.seed = settled_seed(args.seed, ranks.broadcast)
    return args, ranks


def settle(args: argparse.Namespace) -> tuple[Choice, Weights]:
    """The model that the command means, and its open file; fills in the options that these decide."""
    if args.version and not args.pretrained_model_path:
        config = changed(load_model_config(args.model_config or VERSIONS[args.version].config), args.set)
        wanted = None if args.unet_initialize_random else config.prediction_type
        args.pretrained_model_path = find_checkpoint(args.version, args.download, wanted)
    if not args.pretrained_model_path:
        raise UserError(
            "no pretrained_model_path: give a checkpoint or a --version; random networks still need its VAE"
        )
    weights = open_weights(existing(args.pretrained_model_path), raw=True)
    if args.unet_initialize_random and args.model_config:  # whatever the file's own UNet is
        config = changed(load_model_config(args.model_config), args.set)
        choice = Choice(pad_text(config, args.pretrained_model_path, weights), "the config")
    else:
        choice = choose_config(weights, args.model_config, args.version, args.set)
    args.image_size = args.image_size or choice.config.image_size
    return choice, weights


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Find mistakes in the options that all trainings of a model share; UserError."""
    if config.joined:
        raise UserError(f"this model {NEEDS[config.joined]}, which is not trained here: choose another model")
    if args.use_lora:
        adapters.check(args)
    require_at_least(1, args, "text_chunks", "train_batch_size", "gradient_accumulation_steps", "ckpt_save_interval")
    require_at_least(0, args, "validation_interval")
    check_config(config, args.image_size)
    drawn = settings_of(args, config)
    drawn.sampler.times(build_schedule(config.schedule), drawn.steps)
    weight = finetune.timestep_weight(args, config)
    LossScale(args.init_loss_scale, args.scale_window)
    TrainStep.check(args.max_grad_norm if args.clip_grad else None)
    Ema.check(args.ema_decay)
    check_numbers(tuple(args.betas), weight_decay=args.weight_decay)
    Augment(args.random_crop, args.flip, args.caption_dropout)
    if args.ckpt_format == "diffusers":
        check_model(to_dict(config)["model"])
    if not weight.all():
        log.warning(
            "%s gives the last timestep no weight, for it is noise alone (zero_terminal_snr): the step that drawing "
            "begins with is not trained; --loss_weighting none trains it",
            args.loss_weighting,
        )


class Job:
    """A run of a training script, its folder claimed.

    Args:
        args: the options.
        choice: the model to start from.
        weights: its open file.
        ranks: all processes of the run.
        config: the model that is trained; by default the chosen one.
        more: what must stay the same when the run is resumed, beside `finetune.run_settings`.

    Attributes:
        config: with the size that the model is trained for.
        tensors, data: the start's tensors, and the pictures; after `open`.
        dtype: the networks' number type.
        run: the run.

    Raises:
        UserError: the file is of another model, the folder is another run's, or the state is of other settings.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        choice: Choice,
        weights: Weights,
        ranks: Ranks,
        config: ModelConfig | None = None,
        more: dict | None = None,
    ):
        finetune.check_start(args, choice, weights)
        self.args, self.weights, self.ranks = args, weights, ranks
        self.config = replace(config or choice.config, image_size=args.image_size)
        self.dtype = runtime.compute_dtype(args.dtype, args.device_target, training=True)
        self.run = Run(args, finetune.ckpt_folder(args), ranks)
        self.settings = {**finetune.run_settings(args, self.config, self.dtype, ranks), **(more or {})}
        if not args.cache_only:
            self.run.claim(self.settings)

    def open(self) -> bool:
        """Start MindSpore, read the weights and the list of pictures, fill large caches, and connect the devices.

        Returns:
            whether there is something to train: --cache_only asks for full caches alone.

        Raises:
            UserError: for mistakes in the weights and in the data.
        """
        args, ranks = self.args, self.ranks
        ranks.check_shared(self.run.state_folder)
        device = runtime.start(args.device_target, args.mode, ranks, runtime.ascend_settings(args))
        self.tensors = finetune.start_tensors(args, self.config, self.weights)
        finetune.trained_unet(args, self.tensors)  # finds mistakes before the caches are filled
        self.data = finetune.open_data(args)
        log.info(self.data.summary())
        if ranks.is_main:
            finetune.require_finite_weights(args, self.tensors)
            finetune.warn_of_captions(args, self.data, self.config)
        of_run = args, self.config, self.tensors, self.data, self.dtype
        if args.cache_only:
            finetune.fill_caches(*of_run, (ranks.rank, ranks.size))
            ranks.barrier("caches full")
            return False
        finetune.fill_ahead(*of_run, ranks)
        runtime.connect_devices(ranks, device)
        return True

    def begin(self, task: FineTune) -> int:
        """Restore what was saved, if the run is resumed; returns how many steps are made."""
        first = self.run.begin(task, {**self.settings, **self.data.facts(), **task.facts()})
        if self.ranks.is_main:
            save_model_config(self.config, self.run.folder / "model_config.yaml")
        return first
