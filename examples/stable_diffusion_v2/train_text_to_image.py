"""Fine-tune Stable Diffusion, or train its UNet from random weights, on captioned pictures: v-prediction, eps or x0.

    python train_text_to_image.py \
        --train_config configs/train/train_config_vanilla_v2_vpred.yaml \
        --data_path datasets/pokemon_blip/train \
        --output_path output/vpred_vanilla_finetune_pokemon/txt2img \
        --pretrained_model_path models/sd_v2_768_v-e12e3a9b.ckpt
"""

from __future__ import annotations

from ldm import runtime  # first: it sets what MindSpore reads when it is loaded

# isort: split

import argparse
import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from mindspore import nn
from tqdm import tqdm

from ldm import checkpoint
from ldm.checkpoint.diffusers_config import check_model
from ldm.config import ModelConfig, load_model_config, save_model_config, to_dict
from ldm.data.batches import Augment, Batches
from ldm.data.captions import caption_warnings
from ldm.data.dataset import ON_BAD_IMAGE, CaptionedImages
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import build_schedule
from ldm.diffusion.timestep_bias import STRATEGIES, timestep_density
from ldm.diffusion.weighting import WEIGHTINGS, loss_weight
from ldm.errors import UserError
from ldm.files import claimed, escaped
from ldm.mindone_config import IGNORED_TRAIN_OPTIONS, REFUSED_TRAIN_OPTIONS
from ldm.models.blockwise import MANY_WEIGHTS
from ldm.models.layers import initialize
from ldm.models.stable_diffusion import PARTS, TEXT, UNET, VAE, StableDiffusion
from ldm.options import Parser, draw_seed, read_options, require_at_least, seed, steps_or_share, str2bool, whole
from ldm.pictures import grid, make_folder, save_png
from ldm.pipeline import Pipeline, Settings, check_config, sampler_of
from ldm.ranks import Ranks, follow_parent, without_launcher
from ldm.signals import Stopped
from ldm.text.tokenizer import Tokenizer
from ldm.train.blockwise import BlockwiseGradients
from ldm.train.cache import settings_key
from ldm.train.ema import Ema
from ldm.train.inputs import FrozenOutputs, Inputs
from ldm.train.learning_rate import SCHEDULES, LearningRate, tell_changes
from ldm.train.log import ResultLog, loss_curve
from ldm.train.optimizer import OPTIMIZERS, build_optimizer, check_numbers
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
from ldm.train.step import LossScale, TrainStep
from ldm.train.trainable import trainable
from ldm.versions import VERSIONS, existing, find_checkpoint, version
from ldm.weights import Choice, Weights, check_words, choose_config, describe, open_weights, pad_text
from ldm.yaml_file import save_yaml

log = logging.getLogger("train_text_to_image")
LORA_OPTIONS = ("lora_ft_unet", "lora_ft_text_encoder", "lora_rank", "lora_fp16", "lora_scale")
OWN_PROCESS_BYTES = 256 << 20  # frozen networks larger than this fill the caches in a process of their own
COLUMNS = ("step", "epoch", "loss", "x0_loss", "eps_loss", "learning_rate", "grad_norm", "seconds")
SUFFIXES = {"mindspore": ".ckpt", "safetensors": ".safetensors", "diffusers": ""}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])

    add = parser.add_argument_group("model and data").add_argument
    add("--train_config", help="YAML file with values for these options; the command line overrides it")
    add(
        "-v",
        "--version",
        type=version,
        choices=list(VERSIONS),
        help="a published model: its file in models/, and its config",
    )
    add("--download", action="store_true", help="fetch the version's checkpoint where it is not there")
    add(
        "--model_config",
        help="the model's YAML file, as for sampling (default: the checkpoint's own, or the version's)",
    )
    add("--pretrained_model_path", default="", help="the checkpoint to start from (default: the version's)")
    add("--vae_path", help="an autoencoder's own file or folder, in the place of the checkpoint's")
    add("--unet_initialize_random", type=str2bool, default=False, help="random weights for the UNet")
    add("--text_encoder_initialize_random", type=str2bool, default=False, help="random weights for the text encoder")
    add("--data_path", default="dataset", help="a folder with pictures and img_txt.csv (columns dir,text)")
    add("--output_path", default="output", help="checkpoints, log, configs and validation pictures go there")
    add("--image_size", type=int, help="side in pixels (default: the model config's)")
    add("--image_filter_size", type=int, default=0, help="leave out pictures with a shorter side")
    add("--random_crop", type=str2bool, default=False, help="crop at a random place instead of the middle")
    add("--flip", type=str2bool, default=False, help="mirror half of the pictures")
    add("--caption_dropout", type=float, default=0.0, help="share of captions emptied, for guidance")
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="error", help="what to do about an unreadable picture")
    add("--cache_latents", type=str2bool, default=True, help="encode each picture once, where no change is random")
    add("--cache_text", type=str2bool, default=True, help="encode each caption once, where the encoder is frozen")
    add("--cache_path", help="a folder for both caches, which runs may share (default: cache/ in output_path)")
    add("--cache_only", type=str2bool, default=False, help="fill the caches and stop")
    add("--cache_share", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, help="passes over the data")
    add("--train_steps", type=int, default=0, help="stop after so many steps instead (0: after the epochs)")
    add("--train_batch_size", type=int, default=10, help="of each process")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of that size per step")
    add("--train_text_encoder", type=str2bool, default=False, help="train the text encoder along with the UNet")
    add("--trainable_modules", nargs="*", default=[], help="what to train of the UNet (or all): regular expressions")
    add("--loss_weighting", choices=list(WEIGHTINGS), default="none", help="of the times: min_snr is arXiv 2303.09556")
    add("--snr_gamma", type=float, default=5.0, help="of min_snr")
    add("--timestep_bias_strategy", choices=list(STRATEGIES), default="none", help="which timesteps come more often")
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how many times as often as the others")
    add("--timestep_bias_portion", type=float, default=0.25, help="of all timesteps, with earlier or later")
    add("--timestep_bias_begin", type=int, default=0, help="with range: its first")
    add("--timestep_bias_end", type=int, help="with range: the one after its last (default: after the last of all)")
    add("--optim", choices=list(OPTIMIZERS), default="adamw", help="muon learns faster from random weights")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="decay of the optimizer's averages")
    add("--weight_decay", type=float, default=1e-6, help="not applied to norms and biases")
    add("--scheduler", choices=list(SCHEDULES), default="cosine_decay", help="of the learning rate, after the warm-up")
    add("--start_learning_rate", type=float, default=1e-5, help="after the warm-up")
    add("--end_learning_rate", type=float, default=1e-7, help="after decay_steps")
    add("--warmup_steps", type=steps_or_share, default=1000, help="in which the rate rises; below 1 a share of all")
    add("--decay_steps", type=int, default=0, help="in which it falls (0: to the last step)")
    add("--milestones", type=int, nargs="*", default=[], help="of multi_step_decay: steps after the warm-up")
    add("--decay_rate", type=float, default=0.9, help="of multi_step_decay: what the rate is multiplied by there")
    add("--clip_grad", type=str2bool, default=False, help="scale larger gradients down to max_grad_norm")
    add("--max_grad_norm", type=float, default=1.0, help="with clip_grad")
    add("--use_ema", type=str2bool, default=False, help="save and validate with the weights' moving average")
    add("--ema_decay", type=float, default=0.9999, help="of the moving average")
    add("--init_loss_scale", type=float, default=65536, help="with float16")
    add("--scale_window", type=whole, default=1000, help="with float16: good steps before the loss scale is doubled")
    add("--seed", type=seed, default=3407, help="of order, noise, times, dropout and random weights")

    add = parser.add_argument_group("output").add_argument
    add("--step_mode", type=str2bool, default=False, help="count ckpt_save_interval in steps instead of epochs")
    add("--ckpt_save_interval", type=int, default=1, help="epochs (or steps) from one checkpoint to the next")
    add("--ckpt_max_keep", type=int, default=10, help="the last so many checkpoints are kept (0: all)")
    add("--ckpt_format", choices=list(SUFFIXES), default="mindspore", help="of the checkpoints")
    add("--ckpt_dtype", choices=("float32", "float16"), default="float32", help="of the checkpoints' numbers")
    add("--resume", nargs="?", const="True", default="False", help="True, or the path of a resume state")
    add("--validation_prompts", nargs="*", default=[], help="prompts drawn while training")
    add("--validation_interval", type=int, default=500, help="steps between validation pictures (0: at the end only)")
    add("--validation_sampler", choices=list(SAMPLERS), help="as --sampler when drawing (default: the model's)")
    add("--validation_steps", type=int, help="sampling steps (default: the model's)")
    add("--validation_scale", type=float, help="guidance scale (default: the model's)")

    add = parser.add_argument_group("system").add_argument
    add("--device_target", choices=runtime.DEVICES, help="default: Ascend where there is one, else CPU")
    add("--mode", type=int, choices=(0, 1), default=0, help="0: graph, 1: PyNative")
    add("--dtype", choices=list(runtime.DTYPES), help="default: float16 on Ascend, float32 on a CPU")
    add("--use_parallel", type=str2bool, default=False, help="with scripts/run_train_distributed.sh: one of several")
    add("--use_lora", type=str2bool, default=False, help=argparse.SUPPRESS)
    parser.ignore({**IGNORED_TRAIN_OPTIONS, **dict.fromkeys(LORA_OPTIONS, "it belongs to use_lora")})
    parser.refuse(REFUSED_TRAIN_OPTIONS)
    return parser


class TextLoss(nn.Cell):
    """The diffusion loss behind the text encoder: token ids int32 [B, L] in the place of features."""

    def __init__(self, text_encoder: nn.Cell, loss: nn.Cell):
        super().__init__(auto_prefix=False)
        self.text_encoder, self.loss = text_encoder, loss

    def construct(self, latents, ids, eps, t):
        return self.loss(latents, self.text_encoder(ids), eps, t)


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Whatever can be known to be wrong before the data is read and the networks are built."""
    if args.use_lora:
        raise UserError("use_lora is not available yet; set it to False")
    require_at_least(1, args, "train_batch_size", "gradient_accumulation_steps", "epochs", "ckpt_save_interval")
    require_at_least(0, args, "train_steps", "ckpt_max_keep", "validation_interval")
    check_config(config, args.image_size)
    schedule, prediction = build_schedule(config.schedule), get_prediction(config.prediction_type)
    validation_settings(args, config).sampler.times(schedule, validation_settings(args, config).steps)
    timestep_bias(args, config)
    weight = loss_weight(args.loss_weighting, schedule, prediction, args.snr_gamma)
    learning_rate(args, args.train_steps or 1)
    LossScale(args.init_loss_scale, args.scale_window)
    TrainStep.check(args.max_grad_norm if args.clip_grad else None)
    Ema.check(args.ema_decay)
    check_numbers(tuple(args.betas), weight_decay=args.weight_decay)
    Augment(args.random_crop, args.flip, args.caption_dropout)
    if args.ckpt_format == "diffusers":
        check_model(to_dict(config)["model"])
    if args.trainable_modules and args.unet_initialize_random:
        raise UserError("trainable_modules leaves the other weights as they are; not with unet_initialize_random")
    if not weight.all():
        log.warning(
            "%s gives the last timestep no weight, for it is noise alone (zero_terminal_snr): the step that drawing "
            "begins with is not trained; --loss_weighting none trains it",
            args.loss_weighting,
        )


def validation_settings(args: argparse.Namespace, config: ModelConfig) -> Settings:
    """How validation pictures are drawn: as text_to_image.py would, where no option says otherwise."""
    own, size = config.sampling, args.image_size
    steps = own.steps if args.validation_steps is None else args.validation_steps
    scale = config.guidance_scale if args.validation_scale is None else args.validation_scale
    return Settings(sampler_of(config, args.validation_sampler), steps, scale, size, size, args.seed)


def timestep_bias(args: argparse.Namespace, config: ModelConfig) -> np.ndarray:
    """How often each timestep is trained, float64 [T]."""
    numbers = {name: getattr(args, f"timestep_bias_{name}") for name in ("multiplier", "portion", "begin", "end")}
    return timestep_density(args.timestep_bias_strategy, config.schedule.timesteps, **numbers)


def trained_unet(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Of the UNet's parameters' names those that are trained."""
    unet = [name.removeprefix(UNET) for name in names if name.startswith(UNET)]
    return [UNET + name for name in trainable(unet, args.trainable_modules)]


def require_finite(args: argparse.Namespace, tensors: dict[str, np.ndarray]) -> None:
    """UserError where weights to start from are NaN or infinite: nothing good comes of those, at any learning rate."""
    random = {UNET: args.unet_initialize_random, TEXT: args.text_encoder_initialize_random}
    used = tuple(part for part in PARTS if not random.get(part))
    bad = checkpoint.not_finite({name: array for name, array in tensors.items() if name.startswith(used)})
    if bad:
        raise UserError(
            f"{args.pretrained_model_path}: NaN or infinity in {len(bad)} tensors, first {escaped(bad[0])}: nothing "
            "can be trained from it; start from an earlier checkpoint, or fetch the file again"
        )


def open_caches(args: argparse.Namespace, config: ModelConfig, tensors: dict, dtype: str) -> FrozenOutputs:
    """The caches of what is frozen and does not change at random."""
    text = args.cache_text and not (args.train_text_encoder or args.text_encoder_initialize_random)
    folder = Path(args.cache_path or Path(args.output_path) / "cache")
    return FrozenOutputs(folder, config, tensors, args.image_size, dtype, caches_latents(args), text)


def caches_latents(args: argparse.Namespace) -> bool:
    return args.cache_latents and not (args.random_crop or args.flip)


def read_start(args: argparse.Namespace, choice: Choice, weights: Weights) -> checkpoint.Checkpoint:
    """The checkpoint to start from, with the autoencoder that was asked for; UserError where it is of another model."""
    random = {UNET: args.unet_initialize_random, TEXT: args.text_encoder_initialize_random, VAE: args.vae_path}
    wanted, ckpt = tuple(part for part in PARTS if not random[part]), weights.checkpoint
    check_words(weights.path, ckpt, choice.config, choice.origin, wanted)
    if not args.vae_path:
        return ckpt
    return replace(ckpt, tensors=checkpoint.with_vae(ckpt.tensors, args.vae_path, choice.config.scale_factor))


def frozen_tensors(args: argparse.Namespace, ckpt: checkpoint.Checkpoint) -> dict[str, np.ndarray]:
    """Of the checkpoint's tensors those of the networks beside the UNet, which go into every checkpoint."""
    kept = (VAE,) if args.text_encoder_initialize_random else (VAE, TEXT)
    return {name: array for name, array in ckpt.tensors.items() if name.startswith(kept)}


def wanted_parts(args: argparse.Namespace, caches: FrozenOutputs, to_fill: bool, ranks: Ranks) -> tuple[str, ...]:
    """The networks that this process needs: without the frozen ones where the caches stand in for them."""
    if args.cache_only:
        return VAE, TEXT
    drawing = to_fill or bool(args.validation_prompts and ranks.is_main)
    vae = (VAE,) if drawing or caches.latents is None else ()
    return (*vae, UNET, *((TEXT,) if drawing or caches.features is None else ()))


def build_model(
    args: argparse.Namespace, config: ModelConfig, ckpt: checkpoint.Checkpoint, parts: tuple[str, ...] = PARTS
) -> StableDiffusion:
    """The networks with the checkpoint's weights, or random ones where that is asked for."""
    random = {UNET: args.unet_initialize_random, TEXT: args.text_encoder_initialize_random}
    model = StableDiffusion(config, parts)
    prefixes = tuple(prefix for prefix in parts if not random.get(prefix))
    model.load(ckpt.tensors, args.pretrained_model_path, prefixes, copy=True)
    for prefix, network in ((UNET, model.unet), (TEXT, model.text_encoder)):
        if network and random[prefix]:
            initialize(network, args.seed)
    return model


def fill_elsewhere(args: argparse.Namespace, ranks: Ranks) -> None:
    """Fill the caches in a process of its own, with which the memory of the frozen networks goes away."""
    share = ["--use_parallel", "False", "--seed", str(args.seed), "--cache_share", f"{ranks.rank}/{ranks.size}"]
    command = [sys.executable, *sys.argv, "--cache_only", "True", *share]
    device = {"DEVICE_ID": str(ranks.local_rank)} if ranks.size > 1 else {}
    env = {**without_launcher(), **device}
    if subprocess.run(command, env=env, start_new_session=True).returncode:  # Ctrl-C comes to this process alone
        raise UserError("the caches could not be filled; the reason is above")


def cache_share(args: argparse.Namespace, ranks: Ranks) -> tuple[int, int]:
    """(rank, ranks) of what this process fills."""
    rank, size = map(int, args.cache_share.split("/")) if "cache_share" in args else (ranks.rank, ranks.size)
    return rank, size


def build_train_step(
    args: argparse.Namespace, config: ModelConfig, model: StableDiffusion, dtype: str, ranks: Ranks
) -> TrainStep:
    """What the optimizer moves, by which loss, and how."""
    unet = {param.name: param for param in model.unet.get_parameters()}
    trained = [unet[name] for name in trained_unet(args, unet)]
    trained += list(model.text_encoder.get_parameters()) if args.train_text_encoder else []
    schedule, prediction = build_schedule(config.schedule), get_prediction(config.prediction_type)
    weight = loss_weight(args.loss_weighting, schedule, prediction, args.snr_gamma)
    loss = DiffusionLoss(model.unet, schedule, prediction, weight)
    blockwise = trains_blockwise(args, config, dtype) and sum(param.size for param in unet.values()) > MANY_WEIGHTS
    return TrainStep(
        TextLoss(model.text_encoder, loss) if args.train_text_encoder else loss,
        build_optimizer(args.optim, trained, tuple(args.betas), weight_decay=args.weight_decay),
        Ema(trained, args.ema_decay) if args.use_ema else None,
        args.max_grad_norm if args.clip_grad else None,
        LossScale(args.init_loss_scale, args.scale_window) if dtype == "float16" else None,
        ranks,
        BlockwiseGradients(loss, trained) if blockwise else None,
    )


def trains_blockwise(args: argparse.Namespace, config: ModelConfig, dtype: str) -> bool:
    """Whether a large UNet's activations are to be computed again, where MindSpore's own way of it saves nothing."""
    device = args.device_target or runtime.default_device()
    plain = dtype == "float32" and not args.train_text_encoder
    return device == "CPU" and args.mode == 0 and config.unet.use_checkpoint and plain


def prepare(
    args: argparse.Namespace,
    config: ModelConfig,
    ckpt: checkpoint.Checkpoint,
    data: CaptionedImages,
    dtype: str,
    ranks: Ranks,
) -> tuple[StableDiffusion, FrozenOutputs]:
    """The networks that are needed, and the caches, full."""
    caches, share = open_caches(args, config, ckpt.tensors, dtype), cache_share(args, ranks)
    caches.forget_damaged(data, share)
    to_fill = any(caches.missing(data, share))
    frozen_bytes = sum(array.nbytes for array in frozen_tensors(args, ckpt).values())
    if to_fill and not args.cache_only and frozen_bytes > OWN_PROCESS_BYTES:
        fill_elsewhere(args, ranks)
        to_fill = False
    model = build_model(args, config, ckpt, wanted_parts(args, caches, to_fill, ranks))
    runtime.set_compute_dtype(model, dtype)
    if to_fill:
        caches.fill(model, data, args.train_batch_size, share)
    ranks.barrier("caches full")
    if "cache_share" not in args:
        caches.leave_out_missing(data)
    return model, caches


class Output:
    """What a run leaves in its folder: checkpoints, resume state, loss curve, validation pictures.

    Args:
        args, config: what the run was asked for.
        model, train_step: what it trains.
        frozen: the tensors of the checkpoint that are not trained, for networks that were not built.
        settings: what a resumed run must have in common with this one.
    """

    def __init__(self, args, config: ModelConfig, model: StableDiffusion, train_step: TrainStep, frozen, settings):
        self.args, self.config, self.model, self.train_step = args, config, model, train_step
        self.frozen, self.settings = frozen, settings
        self.folder, self.progress = Path(args.output_path), {"step": 0, "written": []}
        self.ckpt_folder, self.result = ckpt_folder(args), None

    def open_log(self) -> None:
        """Go on with the table of the steps behind the last that was saved."""
        self.result = ResultLog(self.folder / "result.log", COLUMNS, self.progress["step"])

    def resume(self, path: Path | None) -> int:
        """Put the run back to where a resume state left it; how many steps were made."""
        if path:
            self.progress = {"written": [], **load_state(path, self.train_step, self.settings)}
            if path.parent.resolve() != self.ckpt_folder.resolve():
                self.progress["written"] = []  # another folder's files are not this run's to delete
        return self.progress["step"]

    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint."""
        shapes = {**{name: array.shape for name, array in self.frozen.items()}, **self.model.shapes()}
        return (2 if self.args.ckpt_dtype == "float16" else 4) * int(sum(map(np.prod, shapes.values())))

    def save(self, step: int, number: int) -> None:
        """The checkpoint sd-{number} and the resume state.

        Raises:
            UserError: it cannot be written, or somebody has written to the file that its frozen part is a view of.
        """
        args, ema = self.args, self.train_step.ema
        name = f"sd-{number}{SUFFIXES[args.ckpt_format]}"
        self._require_source(step)
        tensors = {**self.frozen, **self.model.tensors(), **(ema.tensors() if ema else {})}  # averages where there are
        checkpoint.save(self.ckpt_folder / name, tensors, describe(self.config), args.ckpt_format, args.ckpt_dtype)
        self._require_source(step, name)
        written = [*(old for old in self.progress["written"] if old != name), name]
        self.progress = {"step": step, "written": prune(self.ckpt_folder, written, args.ckpt_max_keep)}
        self._save_state()
        loss_curve(self.folder / "loss_curve.png", self.result.table())

    def _save_state(self) -> None:
        save_state(self.ckpt_folder / RESUME_NAME, self.train_step, self.progress, self.settings)

    def _require_source(self, step: int, *written: str) -> None:
        """Where the frozen part is no longer what it was, save the state, which does without it, and end the run."""
        file = checkpoint.changed(self.frozen.values())
        if file is None:
            return
        for name in written:
            delete(self.ckpt_folder / name)
        self.progress = {"step": step, "written": [old for old in self.progress["written"] if old not in written]}
        self._save_state()
        raise UserError(
            f"{file} was written to during this run, whose checkpoints take their frozen part from it: put back what "
            f"was there and go on with --resume True; step {step} is saved"
        )

    def save_if_new(self, step: int, number: int) -> None:
        """`save`, where this step is not saved yet."""
        if self.progress["step"] < step:
            self.save(step, number)

    def validate(self, step: int) -> None:
        """One picture per validation prompt, always from the same noise, side by side; none where a signal came."""
        args, ema = self.args, self.train_step.ema if step else None
        path = make_folder(self.folder / "validation") / f"{step:06}.png"
        settings = validation_settings(args, self.config)
        with ema.applied() if ema else contextlib.nullcontext():
            pipeline, prompts = Pipeline(self.config, self.model), args.validation_prompts
            pictures = [pipeline.draw([p], [""], [i], settings, until_asked)[0] for i, p in enumerate(prompts)]
        save_png(grid(np.stack(pictures), 1 if len(pictures) < 5 else 2), path)
        log.info("validation pictures: %s", path)


def until_asked(times: Iterable) -> Iterator:
    """The times of a sampler, until a signal asks this process to end: then Stopped is raised."""
    for t in times:
        if runtime.signals.asked:
            raise Stopped(runtime.signals.asked)
        yield t


def ckpt_folder(args: argparse.Namespace) -> Path:
    return Path(args.output_path) / "ckpt" / "rank_0"


def settle(args: argparse.Namespace) -> tuple[Choice, Weights]:
    """The model that the command means, and its file, open; fills in the options that these decide."""
    if args.version and not args.pretrained_model_path:
        random = args.unet_initialize_random or not args.model_config
        wanted = None if random else load_model_config(args.model_config).prediction_type
        args.pretrained_model_path = find_checkpoint(args.version, args.download, wanted)
    if not args.pretrained_model_path:
        raise UserError(
            "no pretrained_model_path: give a checkpoint or a --version; random networks still need its VAE"
        )
    weights = open_weights(existing(args.pretrained_model_path), raw=True)
    if args.unet_initialize_random and args.model_config:  # whatever the file's own UNet is
        config = load_model_config(args.model_config)
        choice = Choice(pad_text(config, args.pretrained_model_path, weights), "the config")
    else:
        choice = choose_config(weights, args.model_config, args.version)
    args.image_size = args.image_size or choice.config.image_size
    return choice, weights


def main() -> None:
    args = read_options(build_parser())
    ranks = runtime.join(args.use_parallel)
    if "cache_share" in args:
        follow_parent()
    draw_seed(args, ranks)
    with ranks.main_first("settings"):
        choice, weights = settle(args)
        config = choice.config
        check(args, config)
        config = replace(config, image_size=args.image_size)  # what it is trained for
        folder = make_folder(ckpt_folder(args))
        resume_from = resume_path(args.resume, folder)
        if not args.cache_only:
            if ranks.is_main:
                runtime.until_end(claimed(args.output_path, "training"))
            refuse_used_folder(folder, resume_from)
        dtype = runtime.compute_dtype(args.dtype, args.device_target)
        settings = run_settings(args, config, dtype, ranks)
        if resume_from and not args.cache_only:
            check_settings(resume_from, settings)
    ranks.check_shared(folder)
    device = runtime.start(args.device_target, args.mode, ranks)
    runtime.connect_devices(ranks, device)
    ckpt = read_start(args, choice, weights)
    trained_unet(args, ckpt.tensors)  # before the caches are filled
    if ranks.is_main and "cache_share" not in args:
        require_finite(args, ckpt.tensors)
    in_memory = {"cache_bytes": 0} if caches_latents(args) else {}  # then pictures are read once at most
    data = CaptionedImages(args.data_path, args.image_size, args.image_filter_size, args.on_bad_image, **in_memory)
    log.info(data.summary())
    if ranks.is_main and "cache_share" not in args:
        for line in caption_warnings(data.samples, Tokenizer(config.text.vocab_size, config.text.context_length)):
            log.warning(line)

    model, caches = prepare(args, config, ckpt, data, dtype, ranks)
    if args.cache_only:
        return
    train_step = build_train_step(args, config, model, dtype, ranks)
    settings.update(data.facts(), frozen=frozen_key(args, ckpt, train_step))
    ranks.agree("settings and data", settings)
    output = Output(args, config, model, train_step, frozen_tensors(args, ckpt), settings)
    first = output.resume(resume_from)
    if ranks.is_main:
        if resume_from:
            tell_changes(vars(args), resume_from.resolve().parent / "../../args.yaml")
        check_room(folder, output.checkpoint_bytes() + 2 * state_bytes(train_step), folder / RESUME_NAME)
        save_yaml(vars(args), output.folder / "args.yaml")
        save_model_config(config, output.folder / "model_config.yaml")
    augment = Augment(args.random_crop, args.flip, args.caption_dropout)
    start = first * args.gradient_accumulation_steps
    pictures = caches.latents is None
    batches = Batches(data, args.train_batch_size, args.seed, augment, start, ranks.rank, ranks.size, pictures)
    inputs = Inputs(model, data, batches, caches, args.train_text_encoder, timestep_bias(args, config))
    train(args, output, batches, inputs, first)


def train(args: argparse.Namespace, output: Output, batches: Batches, inputs: Inputs, first: int) -> None:
    """The loop: all steps from `first` on. Rank 0 alone writes and draws; the others meet it in the next step."""
    ranks = output.train_step.ranks
    is_main = ranks.is_main
    micro = args.gradient_accumulation_steps
    epoch = max(1, batches.steps_per_epoch // micro)
    total = args.train_steps or args.epochs * epoch
    log.info("%d steps of %d are to be made, %d to an epoch", max(0, total - first), total, epoch)
    rate = learning_rate(args, total)

    def number(step: int) -> int:
        """Of a checkpoint after that many steps."""
        return step if args.step_mode else -(-step // epoch)

    if is_main:
        rate.warn()
    if is_main and args.validation_prompts and not first:  # what there is to improve on, and whether drawing works
        output.validate(0)
    stream = map(inputs, batches)
    if is_main:
        output.open_log()
    held = runtime.signals.held("when this step is made and saved")
    with held, tqdm(total=total, initial=first, unit="step") as bar:
        for step in range(first, total):
            if asked := max(ranks.gather("signals", runtime.signals.asked)):
                if is_main and step > first:
                    output.save_if_new(step, number(step))
                told = "--resume True goes on from there" if step else "there is nothing to save"
                log.info("stopped after step %d of %d; %s", step, total, told)
                raise Stopped(asked)
            began, lr = time.perf_counter(), rate(step)
            outcome = output.train_step([next(stream) for _ in range(micro)], lr, step)
            seconds, done = time.perf_counter() - began, step + 1
            if not is_main:
                continue
            numbers = (done, 1 + step // epoch, outcome.loss, *outcome.extras, lr, outcome.grad_norm, seconds)
            output.result.write(**dict(zip(COLUMNS, numbers)))
            if not outcome.applied:
                scale = output.train_step.loss_scale.value
                log.warning("step %d overflowed and was left out; the loss scale is now %g", done, scale)
            bar.set_postfix_str(f"loss {outcome.loss:.4f}, lr {lr:.2e}, {seconds:.2f} s", refresh=False)
            bar.update()

            if done % (args.ckpt_save_interval * (1 if args.step_mode else epoch)) == 0 or done == total:
                output.save(done, number(done))
            if args.validation_prompts and (done % (args.validation_interval or total) == 0 or done == total):
                with contextlib.suppress(Stopped):
                    output.validate(done)
    log.info("checkpoints are in %s, the log is %s", output.ckpt_folder, output.folder / "result.log")


def learning_rate(args: argparse.Namespace, total: int) -> LearningRate:
    ends = args.start_learning_rate, args.end_learning_rate
    steps = args.warmup_steps, args.decay_steps, total
    return LearningRate(args.scheduler, *ends, *steps, tuple(args.milestones), args.decay_rate)


def frozen_key(args: argparse.Namespace, ckpt: checkpoint.Checkpoint, train_step: TrainStep) -> str:
    """Stands for the weights that the run uses as they are: a resume state does not hold them."""
    used = frozen_tensors(args, ckpt)
    if args.trainable_modules:
        used.update({name: array for name, array in ckpt.tensors.items() if name.startswith(UNET)})
    trained = {param.name for param in train_step.optimizer.params}
    return settings_key({name: array for name, array in used.items() if name not in trained})


def run_settings(args: argparse.Namespace, config: ModelConfig, dtype: str, ranks: Ranks) -> dict:
    """What of the options must be the same when a run is resumed, lest it silently become another one.

    How the samples of a step are divided into ranks and micro-batches may change: a step is the same all the same.
    """
    names = ("image_size", "seed", "optim", "use_ema", "ema_decay")
    names += ("caption_dropout", "random_crop", "flip", "train_text_encoder", "loss_weighting", "snr_gamma")
    names += ("betas", "weight_decay", "clip_grad", "max_grad_norm")
    facts = {"pretrained": Path(args.pretrained_model_path).name, "dtype": dtype}
    facts["samples_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * ranks.size
    facts.update(prediction_type=config.prediction_type, scale_factor=config.scale_factor)
    for part in ("schedule", "unet", "vae", "text"):
        facts.update({f"{part}.{key}": value for key, value in asdict(getattr(config, part)).items()})
    del facts["unet.use_checkpoint"]  # changes memory and time, not the result
    if args.trainable_modules:
        names += ("trainable_modules",)
    if args.timestep_bias_strategy != "none":
        names += tuple(name for name in vars(args) if name.startswith("timestep_bias_"))
    return {**facts, **{name: getattr(args, name) for name in names}}


if __name__ == "__main__":
    runtime.run(main, communicates=True)
