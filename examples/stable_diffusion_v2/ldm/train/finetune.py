"""Fine-tuning of a whole model: its UNet, and its text encoder if asked, on captioned pictures."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn

from ldm import checkpoint, runtime
from ldm.config.model import REFINER_NUMBERS, ModelConfig
from ldm.data.batches import Augment, Batch, Batches
from ldm.data.captions import caption_warnings
from ldm.data.dataset import CaptionedImages
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.diffusion.timestep_bias import timestep_density
from ldm.diffusion.weighting import loss_weight
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.networks.blockwise import MANY_WEIGHTS
from ldm.networks.layers import initialize
from ldm.parallel.ranks import Ranks, follow_parent, without_launcher
from ldm.parts import PARTS, TEXT, UNET, VAE
from ldm.text.tokenizer import Tokenizer
from ldm.train.cache import settings_key
from ldm.train.ema import Ema
from ldm.train.frozen import FrozenOutputs
from ldm.train.gradients import LayerByLayer
from ldm.train.inputs import Inputs
from ldm.train.learning_rate import LearningRate
from ldm.train.optimizer import build_optimizer
from ldm.train.run import Plan, Task
from ldm.train.step import LossScale, StepResult, TrainStep
from ldm.train.text_loss import TextLoss
from ldm.train.trainable import trainable
from ldm.train.validation import Validation
from ldm.weights import Choice, Weights, check_words, open_weights, words_of

log = logging.getLogger(__name__)

OWN_PROCESS_BYTES = 256 << 20  # frozen networks larger than this fill the caches in a process of their own
SUFFIXES = {"mindspore": ".ckpt", "safetensors": ".safetensors", "diffusers": ""}  # of checkpoints, by format


# ---- what the options mean ----


def random_parts(args: argparse.Namespace) -> tuple[str, ...]:
    """The networks that start from random weights."""
    asked = {UNET: args.unet_initialize_random, TEXT: args.text_encoder_initialize_random}
    return tuple(part for part, random in asked.items() if random)


def check_start(args: argparse.Namespace, choice: Choice, weights: Weights) -> None:
    """UserError where the checkpoint to start from is of another model, in the networks that are taken from it."""
    replaced = (*random_parts(args), VAE) if args.vae_path else random_parts(args)
    wanted = tuple(part for part in PARTS if part not in replaced)
    check_words(weights.path, weights.checkpoint, choice.config, choice.origin, wanted)


def start_tensors(args: argparse.Namespace, config: ModelConfig, weights: Weights) -> dict[str, np.ndarray]:
    """The checkpoint's tensors, with the autoencoder that was asked for."""
    tensors = weights.checkpoint.tensors
    return checkpoint.with_vae(tensors, args.vae_path, config.scale_factor) if args.vae_path else tensors


def require_finite_weights(args: argparse.Namespace, tensors: dict[str, np.ndarray]) -> None:
    """`checkpoint.require_finite` of the weights that the run starts from."""
    used = tuple(part for part in PARTS if part not in random_parts(args))
    checkpoint.require_finite(tensors, args.pretrained_model_path, used)


def frozen_tensors(args: argparse.Namespace, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the networks beside the UNet, which go into every exported checkpoint."""
    kept = (VAE,) if args.text_encoder_initialize_random else (VAE, TEXT)
    return {name: array for name, array in tensors.items() if name.startswith(kept)}


def trained_unet(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The names of the UNet's trained parameters, out of all parameters' names."""
    unet = [name.removeprefix(UNET) for name in names if name.startswith(UNET)]
    return [UNET + name for name in trainable(unet, args.trainable_modules)]


def trains_text(args: argparse.Namespace) -> bool:
    """Whether the text encoder is trained, or adapters in it: its features change with every step then."""
    return args.train_text_encoder or (args.use_lora and args.lora_ft_text_encoder)


def timestep_weight(args: argparse.Namespace, config: ModelConfig) -> np.ndarray:
    """The weight of the squared error at each timestep, float64 [T]."""
    schedule, prediction = build_schedule(config.schedule), get_prediction(config.prediction_type)
    return loss_weight(args.loss_weighting, schedule, prediction, args.snr_gamma)


def timestep_bias(args: argparse.Namespace, config: ModelConfig) -> np.ndarray:
    """How often each timestep is trained, float64 [T]."""
    numbers = {name: getattr(args, f"timestep_bias_{name}") for name in ("multiplier", "portion", "begin", "end")}
    return timestep_density(args.timestep_bias_strategy, config.schedule.timesteps, **numbers)


def refuse_refiner(config: ModelConfig) -> None:
    """UserError for SDXL's refiner, which cannot be trained here."""
    if config.size_numbers == REFINER_NUMBERS:
        raise UserError(
            "this is SDXL's refiner, which learns from aesthetic scores that captioned pictures do not have: train the "
            "base model, with configs/sdxl-inference.yaml or configs/sdxl-vpred-inference.yaml as its config"
        )


def require_trainable(config: ModelConfig) -> None:
    """UserError for a model that cannot be fine-tuned here."""
    refuse_refiner(config)
    if config.unet.time_cond_proj_dim:
        raise UserError(
            "this model was distilled for a range of guidance scales (model.unet.time_cond_proj_dim), which captioned "
            "pictures do not have: train the model that it was distilled from"
        )


def caches_latents(args: argparse.Namespace, data: CaptionedImages) -> bool:
    """Whether latents are cached: where no crop can move. Mirrored pictures have rows of their own."""
    return args.cache_latents and (data.square or not args.random_crop)


def open_data(args: argparse.Namespace) -> CaptionedImages:
    """The pictures and captions; UserError where there are none, or one cannot be read.

    Pictures whose latents are cached are read once at most, so they are not kept.
    """
    options = {"cache_bytes": 0} if args.cache_latents and not args.random_crop else {}
    options["keep_squares"] = not args.cache_latents
    return CaptionedImages(args.data_path, args.image_size, args.image_filter_size, args.on_bad_image, **options)


def warn_of_captions(args: argparse.Namespace, data: CaptionedImages, config: ModelConfig) -> None:
    """Say which captions are empty or too long for the text encoder."""
    tokenizer = Tokenizer(config.text.vocab_size, config.text.context_length)
    for line in caption_warnings(data.samples, tokenizer, args.text_chunks):
        log.warning(line)


def run_settings(args: argparse.Namespace, config: ModelConfig, dtype: str, ranks: Ranks) -> dict:
    """The options that must stay the same when a run is resumed: with others it would be another run.

    The division of a step's samples into ranks and micro-batches may change: it does not change the step.
    """
    names = ("image_size", "seed", "optim", "use_ema", "ema_decay")
    names += ("caption_dropout", "random_crop", "flip", "train_text_encoder", "loss_weighting", "snr_gamma")
    names += ("betas", "weight_decay", "clip_grad", "max_grad_norm")
    facts = {"pretrained": Path(args.pretrained_model_path).name, "dtype": dtype}
    facts["samples_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * ranks.size
    facts.update(prediction_type=config.prediction_type, scale_factor=config.scale_factor)
    for part in ("schedule", "unet", "vae", "text", *(("text_2",) if config.text_2 else ())):
        facts.update({f"{part}.{key}": value for key, value in asdict(getattr(config, part)).items()})
    del facts["unet.use_checkpoint"]  # changes memory and time, not the result
    if args.trainable_modules:
        names += ("trainable_modules",)
    if args.text_chunks > 1:
        names += ("text_chunks",)
    if args.use_lora:
        names += tuple(name for name in vars(args) if name.startswith("lora_") and name != "lora_format")
    if args.timestep_bias_strategy != "none":
        names += tuple(name for name in vars(args) if name.startswith("timestep_bias_"))
    return {**facts, **{name: getattr(args, name) for name in names}}


def plan_of(args: argparse.Namespace, batches_per_epoch: int) -> Plan:
    """How long the run is, and when it saves and validates."""
    micro = args.gradient_accumulation_steps
    epoch = max(1, batches_per_epoch // micro)
    return Plan(
        total=args.train_steps or args.epochs * epoch,
        epoch=epoch,
        save_every=args.ckpt_save_interval * (1 if args.step_mode else epoch),
        micro_batches=micro,
        validate_every=(args.validation_epochs * epoch or args.validation_interval)
        if args.validation_prompts
        else None,
        by_steps=args.step_mode,
    )


def learning_rate(args: argparse.Namespace, total: int) -> LearningRate:
    ends = args.start_learning_rate, args.end_learning_rate
    steps = args.warmup_steps, args.decay_steps, total
    return LearningRate(args.scheduler, *ends, *steps, tuple(args.milestones), args.decay_rate)


# ---- networks and caches ----


def build_model(
    args: argparse.Namespace, config: ModelConfig, tensors: dict[str, np.ndarray], parts: tuple[str, ...], dtype: str
) -> StableDiffusion:
    """The networks with the checkpoint's weights; those of `random_parts` have random ones.

    Weights that adapters leave as they are stay views of the file, also in half precision where the UNet is trained
    layer by layer.
    """
    random, model = random_parts(args), StableDiffusion(config, parts)
    stored = (UNET,) if args.use_lora and model.unet and trains_by_layers(args, config, dtype, model.unet) else ()
    loaded = tuple(part for part in parts if part not in random)
    model.load(tensors, args.pretrained_model_path, loaded, not args.use_lora, stored)
    for part, network in ((UNET, model.unet), (TEXT, model.text_encoder)):
        if network and part in random:
            initialize(network, args.seed)
    model.compute_in(dtype)
    return model


def open_caches(
    args: argparse.Namespace, config: ModelConfig, tensors: dict, data: CaptionedImages, dtype: str
) -> FrozenOutputs:
    """The caches of the frozen networks' outputs, for inputs that do not change at random."""
    text = args.cache_text and not (trains_text(args) or args.text_encoder_initialize_random)
    folder = Path(args.cache_path or Path(args.output_path) / "cache")
    latents = caches_latents(args, data)
    what = latents, text, args.flip, args.text_chunks
    return FrozenOutputs(folder, config, tensors, args.image_size, dtype, *what)


def fills_in_child(args: argparse.Namespace, tensors: dict) -> bool:
    """Whether the frozen networks are so large that a child process fills the caches."""
    return sum(array.nbytes for array in frozen_tensors(args, tensors).values()) > OWN_PROCESS_BYTES


def fill_in_child(args: argparse.Namespace, config: ModelConfig, dtype: str, ranks: Ranks) -> None:
    """Fill the caches in a child process, whose end frees the memory of the frozen networks."""
    env = {**without_launcher(), "PYTHONPATH": os.pathsep.join([str(runtime.HERE), os.environ.get("PYTHONPATH", "")])}
    if ranks.size > 1:
        env["DEVICE_ID"] = str(ranks.local_rank)
    code = "from ldm import runtime; from ldm.train import finetune; runtime.run(finetune.child)"
    job = pickle.dumps((args, config, dtype, (ranks.rank, ranks.size)))
    # A session of its own: Ctrl-C reaches this process alone.
    if subprocess.run([sys.executable, "-c", code], env=env, input=job, start_new_session=True).returncode:
        raise UserError("the caches could not be filled; the reason is above")


def child() -> None:
    """The main of the child process that fills the caches; it reads its job from standard input."""
    args, config, dtype, share = pickle.load(sys.stdin.buffer)
    follow_parent()
    runtime.start(args.device_target, args.mode, ascend=runtime.ascend_settings(args))
    tensors = start_tensors(args, config, open_weights(args.pretrained_model_path, raw=True))
    fill_caches(args, config, tensors, open_data(args), dtype, share)


def fill_caches(
    args: argparse.Namespace,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    data: CaptionedImages,
    dtype: str,
    share: tuple[int, int],
) -> None:
    """Compute a share (rank, number of ranks) of the entries that the caches lack."""
    caches = open_caches(args, config, tensors, data, dtype)
    caches.forget_damaged(data, share)
    if any(caches.missing(data, share)):
        model = build_model(args, config, tensors, (VAE, TEXT), dtype)
        caches.fill(model, data, args.train_batch_size, share)


def fill_ahead(
    args: argparse.Namespace, config: ModelConfig, tensors: dict, data: CaptionedImages, dtype: str, ranks: Ranks
) -> None:
    """Fill the caches in child processes where the frozen networks are large.

    Call it before the devices are connected: a child takes the device of its rank, and connected devices would wait for
    one another meanwhile.
    """
    caches, share = open_caches(args, config, tensors, data, dtype), (ranks.rank, ranks.size)
    caches.forget_damaged(data, share)
    if fills_in_child(args, tensors) and any(caches.missing(data, share)):
        fill_in_child(args, config, dtype, ranks)
    ranks.barrier("large caches full")


def prepare(
    args: argparse.Namespace, config: ModelConfig, tensors: dict, data: CaptionedImages, dtype: str, ranks: Ranks
) -> tuple[StableDiffusion, FrozenOutputs]:
    """Fill what the caches still lack; returns the networks that this process needs, and the caches."""
    caches, share = open_caches(args, config, tensors, data, dtype), (ranks.rank, ranks.size)
    to_fill = not fills_in_child(args, tensors) and any(caches.missing(data, share))
    drawing = to_fill or bool(args.validation_prompts and ranks.is_main)
    vae, text = drawing or caches.latents is None, drawing or caches.features is None
    parts = tuple(part for part, wanted in ((VAE, vae), (UNET, True), (TEXT, text)) if wanted)
    model = build_model(args, config, tensors, parts, dtype)
    if to_fill:
        caches.fill(model, data, args.train_batch_size, share)
    ranks.barrier("caches full")
    caches.leave_out_missing(data)
    return model, caches


# ---- the task ----


class FineTune(Task):
    """The UNet of a model, and its text encoder if asked.

    Args:
        args: the options of train_text_to_image.py.
        config: the model's config.
        tensors: of the checkpoint to start from.
        data: captioned pictures.
        dtype: the networks' number type.
        ranks: all processes of the run.
    """

    figures = ("loss", "x0_loss", "eps_loss")

    def __init__(self, args, config: ModelConfig, tensors: dict, data: CaptionedImages, dtype: str, ranks: Ranks):
        self.args, self.config, self.keep = args, config, args.ckpt_max_keep
        self.data, self.ranks = data, ranks
        self.model, self.caches = prepare(args, config, tensors, data, dtype, ranks)
        if args.validation_prompts and ranks.is_main:
            frozen_text = self.caches.features is not None
            self.validation = Validation(args, config, self.model, frozen_text)
        self.frozen = frozen_tensors(args, tensors)  # for networks that were not built
        self.step = build_train_step(args, config, self.model, self.trained_parameters(dtype), dtype, ranks)
        of_times = timestep_bias(args, config), timestep_weight(args, config)
        of_text = trains_text(args), args.text_chunks, config.sampling.zeros_for_empty_prompt
        self.inputs_of = Inputs(self.model, data, args.seed, self.caches, *of_text, *of_times)
        self.frozen_key = settings_key(self.untrained(tensors))

    def trained_parameters(self, dtype: str) -> list[Parameter]:
        """The parameters that the optimizer moves."""
        unet = {param.name: param for param in self.model.unet.get_parameters()}
        trained = [unet[name] for name in trained_unet(self.args, unet)]
        return trained + (self.model.text_encoder.used_parameters() if self.args.train_text_encoder else [])

    def twin(self, tensors: dict, dtype: str) -> StableDiffusion:
        """A second UNet like the one that is trained, its parameters named alike."""
        return build_model(self.args, self.config, tensors, (UNET,), dtype)

    def untrained(self, tensors: dict) -> dict[str, np.ndarray]:
        """The checkpoint's tensors that the run uses and its resume state lacks."""
        trained = {param.name for param in self.step.optimizer.params}
        unet = {name: tensors[name] for name in self.model.shapes() if name.startswith(UNET) and name in tensors}
        return {name: array for name, array in {**self.frozen, **unet}.items() if name not in trained}

    def batches(self, first: int) -> Batches:
        """This rank's batches from a step on. They hold pictures where no cache holds the latents."""
        args, ranks = self.args, self.ranks
        augment = Augment(args.random_crop, args.flip, args.caption_dropout)
        start, pictures = first * args.gradient_accumulation_steps, self.caches.latents is None
        stream = self.data, args.train_batch_size, args.seed, augment, start, ranks.rank, ranks.size
        return Batches(*stream, pictures, cuts=bool(self.config.size_numbers))

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        return self.inputs_of(batch)

    def measured(self, result: StepResult) -> dict[str, float]:
        return dict(zip(self.figures, (result.loss, *result.extras)))

    def facts(self) -> dict:
        """A key of the untrained weights, which a resume state does not hold."""
        return {"frozen": self.frozen_key}

    def changed_source(self) -> str | None:
        return checkpoint.changed(self.frozen.values())

    def export_bytes(self) -> int:
        shapes = {**{name: array.shape for name, array in self.frozen.items()}, **self.model.shapes()}
        return (2 if self.args.ckpt_dtype == "float16" else 4) * int(sum(map(np.prod, shapes.values())))

    def export(self, step: int, plan: Plan) -> Path:
        """Write the checkpoint, with the moving averages where there are any; returns its path."""
        args, ema, path = self.args, self.step.ema, self.exported(step, plan)
        tensors = {**self.frozen, **self.model.tensors(), **(ema.tensors() if ema else {})}
        checkpoint.save(path, tensors, self.words(), args.ckpt_format, args.ckpt_dtype)
        return path

    def exported(self, step: int, plan: Plan) -> Path:
        """The path of the exported file."""
        return ckpt_folder(self.args) / f"sd-{plan.number(step)}{self.suffix()}"

    def suffix(self) -> str:
        """The end of the exported file's name."""
        return SUFFIXES[self.args.ckpt_format]

    def words(self) -> dict[str, str]:
        """What an exported file says of itself."""
        return words_of(self.config)

    def validate(self, step: int) -> None:
        ema = self.step.ema if step else None
        with ema.applied() if ema else nullcontext():
            self.validation.draw(step, self.step.gradients.layer_by_layer)


def ckpt_folder(args: argparse.Namespace) -> Path:
    return Path(args.output_path) / "ckpt" / "rank_0"


def build_train_step(
    args: argparse.Namespace,
    config: ModelConfig,
    model: StableDiffusion,
    trained: list[Parameter],
    dtype: str,
    ranks: Ranks,
) -> TrainStep:
    """The training step of these parameters: loss, optimizer and gradients."""
    by_layers = trains_by_layers(args, config, dtype, model.unet)
    if config.unet.use_checkpoint and not by_layers:
        model.unet.recompute_blocks()
    loss = DiffusionLoss(model.unet, build_schedule(config.schedule), get_prediction(config.prediction_type))
    return TrainStep(
        TextLoss(model.text_encoder, loss, bool(config.size_numbers)) if trains_text(args) else loss,
        build_optimizer(args.optim, trained, tuple(args.betas), weight_decay=args.weight_decay),
        Ema(trained, args.ema_decay) if args.use_ema else None,
        args.max_grad_norm if args.clip_grad else None,
        LossScale(args.init_loss_scale, args.scale_window) if dtype == "float16" else None,
        ranks,
        LayerByLayer(loss, trained) if by_layers else None,
    )


def trains_by_layers(args: argparse.Namespace, config: ModelConfig, dtype: str, unet: nn.Cell) -> bool:
    """Whether a UNet is trained layer by layer: a large one, where MindSpore's recomputation would save no memory."""
    if sum(param.size for param in unet.get_parameters()) <= MANY_WEIGHTS:
        return False
    device = args.device_target or runtime.default_device()
    plain = dtype == "float32" and not trains_text(args)
    return device == "CPU" and args.mode == 0 and config.unet.use_checkpoint and plain
