"""Train the autoencoder of a model config on the pictures of a data folder: reconstruction and a little KL.

    python train_autoencoder.py --train_config configs/train/train_config_tiny_vae.yaml --output_path output/tiny_vae

Latent channels that have learned nothing are cut away from what it exports; one over the spread of the others is the
`scale_factor` of the config beside the weights.

    python train_autoencoder.py --train_config configs/train/train_config_tiny_vae_decoder.yaml

With --decoder_only True it finishes the decoder of a trained model: pictures are encoded, their latents noised and
denoised by the model's UNet with their captions, and the decoder learns to make the pictures again from what comes out,
with the errors that the UNet leaves in it. Encoder and UNet stay, and the whole model is exported.
"""

from __future__ import annotations

from ldm import runtime  # first: it sets what MindSpore reads when it is loaded

# isort: split
import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from eval.metrics import psnr
from ldm import checkpoint
from ldm.config import ModelConfig, load_model_config, save_model_config
from ldm.data.batches import Augment, Batch, Batches
from ldm.data.dataset import ON_BAD_IMAGE, CaptionedImages
from ldm.data.images import crop, to_float
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.files import claimed
from ldm.models.layers import initialize
from ldm.models.stable_diffusion import PARTS, VAE, StableDiffusion
from ldm.options import Parser, draw_seed, read_options, require_at_least, seed, steps_or_share, str2bool
from ldm.pictures import grid, make_folder, save_png, to_uint8
from ldm.pipeline import Pipeline, Settings, check_config, sampler_of
from ldm.randomness import generator, spread
from ldm.ranks import Ranks
from ldm.signals import Stopped
from ldm.train.cache import settings_key
from ldm.train.ema import Ema
from ldm.train.latent_channels import alive, keep_channels
from ldm.train.learning_rate import MULTI_STEP, SCHEDULES, LearningRate, tell_changes
from ldm.train.log import ResultLog, loss_curve
from ldm.train.optimizer import OPTIMIZERS, build_optimizer, check_numbers
from ldm.train.state import (
    RESUME_NAME,
    check_room,
    load_state,
    refuse_used_folder,
    resume_path,
    save_state,
    state_bytes,
)
from ldm.train.step import TrainStep
from ldm.weights import describe, read_checkpoint
from ldm.yaml_file import save_yaml

log = logging.getLogger("train_autoencoder")
COLUMNS = ("step", "loss", "psnr", "kl", "learning_rate", "grad_norm", "seconds")
DECODER = (VAE + "decoder.", VAE + "post_quant_conv.")
SHOWN = 8  # pictures in the sheet of reconstructions
SAMPLING_STEPS = 15  # of which latents are denoised with the last, for --decoder_only


class Reconstruction(nn.Cell):
    """What a picture's error costs: its mean absolute value, its mean square, and the mean absolute error of the
    differences between neighbouring pixels, which blurred edges and blotches in flat areas are made of."""

    def __init__(self, squared_weight: float, edge_weight: float):
        super().__init__(auto_prefix=False)
        self.squared_weight, self.edge_weight = squared_weight, edge_weight

    def construct(self, error):
        """(loss, mean squared error per picture [B]) for an error [B, 3, H, W]."""
        squared = (error * error).mean((1, 2, 3))
        loss = error.abs().mean() + self.squared_weight * squared.mean()
        if self.edge_weight:
            rows, columns = error[:, :, 1:] - error[:, :, :-1], error[:, :, :, 1:] - error[:, :, :, :-1]
            loss = loss + self.edge_weight * (rows.abs().mean() + columns.abs().mean())
        return loss, squared


class AutoencoderLoss(nn.Cell):
    """Error of the reconstruction, and the KL divergence to the unit Gaussian (arXiv 1312.6114)."""

    def __init__(self, vae: nn.Cell, reconstruction: Reconstruction, kl_weight: float):
        super().__init__(auto_prefix=False)
        self.vae, self.reconstruction, self.kl_weight = vae, reconstruction, kl_weight

    def construct(self, images, noise):
        """(loss, mean squared error per picture [B], KL in nats per latent value).

        images: [B, 3, H, W] in [-1, 1]; noise: unit Gaussian, [B, C, h, w].
        """
        mean, log_var = self.vae.encode(images)
        loss, squared = self.reconstruction(self.vae.decode(mean + ops.exp(0.5 * log_var) * noise) - images)
        kl = 0.5 * (mean * mean + ops.exp(log_var) - 1.0 - log_var).mean()
        return loss + self.kl_weight * kl, squared, kl


class DecoderLoss(nn.Cell):
    """Error of pictures decoded from given latents."""

    def __init__(self, vae: nn.Cell, reconstruction: Reconstruction):
        super().__init__(auto_prefix=False)
        self.vae, self.reconstruction = vae, reconstruction

    def construct(self, images, latents):
        """(loss, mean squared error per picture [B]).

        images: [B, 3, H, W] in [-1, 1]; latents: unscaled, [B, C, h, w].
        """
        return self.reconstruction(self.vae.decode(latents) - images)


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--train_config", help="YAML file with values for these options; the command line overrides it")
    add("--model_config", default="configs/tiny-vpred.yaml", help="the model's YAML file")
    add("--data_path", required=True, help="a folder with pictures and img_txt.csv")
    add("--output_path", default="output/autoencoder", help="checkpoint, config, log and pictures go there")
    add(
        "--pretrained_model_path", default="", help="start from this checkpoint's autoencoder (default: random weights)"
    )
    add("--image_size", type=int, help="side in pixels (default: the model config's)")
    add("--image_filter_size", type=int, default=0, help="leave out pictures with a shorter side")
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="error", help="what to do about an unreadable picture")
    add("--random_crop", type=str2bool, default=False, help="crop at a random place instead of the middle")
    add("--flip", type=str2bool, default=False, help="mirror half of the pictures")
    add("--train_batch_size", type=int, default=16, help="pictures per step")
    add("--steps", type=int, default=5000, help="training steps")
    add(
        "--decoder_only",
        type=str2bool,
        default=False,
        help="train the decoder alone, on latents that the UNet of pretrained_model_path has denoised",
    )
    add("--denoise_below", type=int, default=500, help="with decoder_only, the latest timestep to denoise from")
    add("--clean_share", type=float, default=0.25, help="with decoder_only, the share of pictures without noise")
    add("--sampler", choices=list(SAMPLERS), default="dpm_solver_pp", help="with decoder_only, what denoises")
    add("--scale", type=float, default=1.0, help="with decoder_only, the guidance scale of the denoising")
    add(
        "--latent_channels",
        type=int,
        help="to train with (default: the model config's); those that learn nothing are not exported",
    )
    add("--kl_weight", type=float, default=1e-6, help="of the divergence from the unit Gaussian")
    add("--squared_weight", type=float, default=1.0, help="of the squared error beside the absolute one")
    add("--edge_weight", type=float, default=0.0, help="of the error in differences between neighbouring pixels")
    add("--optim", choices=list(OPTIMIZERS), default="adamw", help="muon learns faster from random weights")
    add("--betas", type=float, nargs=2, default=[0.9, 0.99], help="decay of the optimizer's averages")
    add("--weight_decay", type=float, default=0.0, help="not applied to norms and biases")
    add(
        "--scheduler",
        choices=[name for name in SCHEDULES if name != MULTI_STEP],
        default="cosine",
        help="of the learning rate, after the warm-up",
    )
    add("--start_learning_rate", type=float, default=1e-3, help="after the warm-up")
    add("--end_learning_rate", type=float, default=1e-5, help="at the last step")
    add("--warmup_steps", type=steps_or_share, default=200, help="in which the rate rises; below 1 a share of all")
    add("--max_grad_norm", type=float, default=1.0, help="larger gradients are scaled down to it")
    add("--ema_decay", type=float, default=0.999, help="of the moving average, which is saved")
    add("--save_interval", type=int, default=1000, help="steps between resume states and pictures")
    add("--resume", nargs="?", const="True", default="False", help="True, or the path of a resume state")
    add("--seed", type=seed, default=42, help="of order, noise and random weights")
    add("--device_target", choices=runtime.DEVICES, help="default: Ascend where there is one, else CPU")
    add("--mode", type=int, choices=(0, 1), default=0, help="0: graph, 1: PyNative")
    return parser


def fixed_pictures(data: CaptionedImages, count: int) -> np.ndarray:
    """float32 [count, 3, S, S] in [-1, 1], the middles of pictures from all over the data."""
    places = np.linspace(0, len(data) - 1, count).astype(int)
    return to_float([crop(data[i][0], data.image_size) for i in places])


def encode(model: StableDiffusion, data: CaptionedImages, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the latents of pictures from all over the data."""
    pictures = fixed_pictures(data, batch_size * min(64, max(1, len(data) // batch_size)))
    parts = [model.encode_images(pictures[i : i + batch_size]) for i in range(0, len(pictures), batch_size)]
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])


class WholeAutoencoder:
    """What is trained, on what, and what comes of it: encoder and decoder, on the latents' Gaussian."""

    exported = "vae.safetensors"

    def __init__(
        self, model: StableDiffusion, config: ModelConfig, args: argparse.Namespace, start: dict[str, np.ndarray] | None
    ):
        self.model, self.config, self.args = model, config, args
        if start is not None:
            model.load(start, args.pretrained_model_path, (VAE,), copy=True)
        else:
            initialize(model.vae, args.seed)
        self.trained, self.untrained_bytes = list(model.vae.get_parameters()), 0
        reconstruction = Reconstruction(args.squared_weight, args.edge_weight)
        self.loss = AutoencoderLoss(model.vae, reconstruction, args.kl_weight)

    def second_input(self, batch: Batch, step: int) -> np.ndarray:
        """What the loss takes beside the pictures."""
        shape = self.model.latent_shape(*batch.images.shape[2:])
        draws = [generator(self.args.seed, "latent", i).standard_normal(shape, np.float32) for i in batch.ordinals]
        return np.stack(draws)

    def export(self, run: Path, tensors: dict[str, np.ndarray], data: CaptionedImages) -> Path:
        """Write the trained tensors without dead channels, and their config, with the scale that gives latents a mean
        square of 1. The model has the same tensors at this time."""
        mean, std = encode(self.model, data, self.args.train_batch_size)
        kept = alive(mean, std) or list(range(mean.shape[1]))
        if len(kept) < mean.shape[1]:
            log.info("of %d latent channels %d say something of the picture; the rest is cut", mean.shape[1], len(kept))
            tensors = keep_channels(tensors, kept)
        scale = self.config.scale_factor / np.sqrt(np.mean(mean[:, kept] ** 2 + std[:, kept] ** 2, dtype=np.float64))
        config = replace(with_latent_channels(self.config, len(kept)), scale_factor=float(scale))
        checkpoint.save(run / self.exported, tensors, describe(config), "safetensors")
        save_model_config(config, run / "model_config.yaml")
        return run / self.exported

    def settings_facts(self) -> dict[str, str]:
        """What the resume state does not hold of the weights: nothing."""
        return {}


class DecoderAlone:
    """The same for the decoder of a whole model, on latents that its UNet has denoised.

    A share of each step's pictures stays as it is; the others are noised to one of the sampler's times below
    `denoise_below`, which the steps take evenly, and denoised from there.
    """

    exported = "model.safetensors"

    def __init__(
        self, model: StableDiffusion, config: ModelConfig, args: argparse.Namespace, start: dict[str, np.ndarray]
    ):
        self.model, self.config, self.whole = model, config, start
        model.load(self.whole, args.pretrained_model_path, copy=True)
        self.trained = [p for p in model.vae.get_parameters() if p.name.startswith(DECODER)]
        self.untrained_bytes = sum(array.nbytes for array in self.whole.values())  # exported all the same
        self.loss = DecoderLoss(model.vae, Reconstruction(args.squared_weight, args.edge_weight))
        self.pipeline, size = Pipeline(config, model), args.image_size
        self.settings = Settings(sampler_of(config, args.sampler), SAMPLING_STEPS, args.scale, size, size, args.seed)
        self.clean_share = args.clean_share
        times = self.settings.sampler.times(self.pipeline.schedule, SAMPLING_STEPS)
        self.fewest_skipped = int((times >= args.denoise_below).sum())
        if self.fewest_skipped == SAMPLING_STEPS:
            raise UserError(f"denoise_below is {args.denoise_below}; the sampler's last time is {times[-1]}")

    def second_input(self, batch: Batch, step: int) -> np.ndarray:
        """Unscaled latents, float32 [B, C, h, w], the clean ones first."""
        latents = self.model.encode_images(batch.images)[0]
        until_now, with_these = (int(i * len(latents) * self.clean_share) for i in (step, step + 1))
        clean, place = with_these - until_now, spread(self.settings.seed, "steps skipped", step)
        if clean < len(latents):
            skipped = self.fewest_skipped + int(place * (SAMPLING_STEPS - self.fewest_skipped))
            numbers = batch.ordinals[clean:].tolist()
            noisy = self.pipeline.redraw(latents[clean:], batch.texts[clean:], numbers, self.settings, skipped)
            latents = np.concatenate([latents[:clean], noisy])
        return self.model.unscaled(latents)

    def export(self, run: Path, tensors: dict[str, np.ndarray], data: CaptionedImages) -> Path:
        """Write the whole model with the trained tensors."""
        if file := checkpoint.changed(self.whole.values()):
            raise UserError(f"{file} was written to during this run, which exports what it does not train from it")
        checkpoint.save(run / self.exported, {**self.whole, **tensors}, describe(self.config), "safetensors")
        return run / self.exported

    def settings_facts(self) -> dict[str, str]:
        """Stands for the weights that the run uses as they are: a resume state does not hold them."""
        rest = {name: array for name, array in self.whole.items() if not name.startswith(DECODER)}
        return {"frozen": settings_key(rest), "spacing": self.settings.sampler.spacing}


def with_latent_channels(config: ModelConfig, channels: int) -> ModelConfig:
    return replace(
        config,
        unet=replace(config.unet, in_channels=channels, out_channels=channels),
        vae=replace(config.vae, z_channels=channels, embed_dim=channels),
    )


def read_start(args: argparse.Namespace, config: ModelConfig) -> dict[str, np.ndarray] | None:
    """The tensors to start from; None where nothing is given. UserError where nothing can be trained from them."""
    path = args.pretrained_model_path
    if not path:
        return None
    tensors = read_checkpoint(path, config).tensors if args.decoder_only else checkpoint.load(path).tensors
    checkpoint.require_finite(tensors, path, PARTS if args.decoder_only else (VAE,))
    return tensors


def main() -> None:
    args = read_options(build_parser())
    draw_seed(args, Ranks())
    config = load_model_config(args.model_config)
    args.image_size = args.image_size or config.image_size
    check_config(config, args.image_size)
    if not args.decoder_only:  # which leaves the UNet as it is
        config = replace(config, image_size=args.image_size)
    require_at_least(1, args, "train_batch_size", "steps", "save_interval")
    if args.decoder_only and (args.latent_channels is not None or not args.pretrained_model_path):
        wrong = "without latent_channels" if args.pretrained_model_path else "with the pretrained_model_path of a model"
        raise UserError(f"decoder_only goes {wrong}: encoder and UNet of that model stay as they are")
    if not 0 <= args.clean_share < 1:
        raise UserError(f"clean_share is {args.clean_share}; give a number from 0 to below 1")
    if args.latent_channels is not None:
        require_at_least(1, args, "latent_channels")
        config = with_latent_channels(config, args.latent_channels)
    check_numbers(tuple(args.betas), weight_decay=args.weight_decay)
    Ema.check(args.ema_decay)
    TrainStep.check(args.max_grad_norm)
    rate = LearningRate(
        args.scheduler, args.start_learning_rate, args.end_learning_rate, args.warmup_steps, 0, args.steps
    )
    start = read_start(args, config)
    run = make_folder(args.output_path)
    runtime.until_end(claimed(run, "training"))
    resume_from = resume_path(args.resume, run)
    refuse_used_folder(run, resume_from)
    data = CaptionedImages(args.data_path, args.image_size, args.image_filter_size, args.on_bad_image)
    log.info(data.summary())
    runtime.start(args.device_target, args.mode)
    model = StableDiffusion(config)
    task = (DecoderAlone if args.decoder_only else WholeAutoencoder)(model, config, args, start)
    train_step = TrainStep(
        task.loss,
        build_optimizer(args.optim, task.trained, tuple(args.betas), weight_decay=args.weight_decay),
        Ema(task.trained, args.ema_decay),
        args.max_grad_norm,
    )
    check_room(run, 2 * (state_bytes(train_step) + task.untrained_bytes), run / RESUME_NAME, run / task.exported)
    settings = {**run_settings(args, config), **data.facts(), **task.settings_facts()}
    first = load_state(resume_from, train_step, settings)["step"] if resume_from else 0
    if resume_from:
        tell_changes(vars(args), resume_from.parent / "args.yaml")
    rate.warn()
    save_yaml(vars(args), run / "args.yaml")

    batches = Batches(data, args.train_batch_size, args.seed, Augment(args.random_crop, args.flip), first)
    shown = fixed_pictures(data, SHOWN)

    def save(result: ResultLog, step: int) -> None:
        with train_step.ema.applied():
            decoded = model.decode(model.encode_images(shown)[0])
            exported = task.export(run, train_step.ema.tensors(), data)
        save_png(grid(to_uint8(np.concatenate([shown, decoded])), rows=2), run / "reconstructions.png")
        save_state(run / RESUME_NAME, train_step, {"step": step}, settings)
        loss_curve(run / "loss_curve.png", result.table())
        log.info("step %d: %s", step, exported)

    train(args, task, train_step, rate, batches, first, save)


def train(
    args: argparse.Namespace,
    task: WholeAutoencoder | DecoderAlone,
    train_step: TrainStep,
    rate: LearningRate,
    batches: Batches,
    first: int,
    save: Callable[[ResultLog, int], None],
) -> None:
    """The loop: all steps from `first` on."""
    stream, result = iter(batches), ResultLog(Path(args.output_path) / "result.log", COLUMNS, first)
    held = runtime.signals.held("when this step is made and saved")
    with held, tqdm(total=args.steps, initial=first, unit="step") as bar:
        for step in range(first, args.steps):
            if asked := runtime.signals.asked:
                if step > first and step % args.save_interval:
                    save(result, step)
                told = "--resume True goes on from there" if step else "there is nothing to save"
                log.info("stopped after step %d of %d; %s", step, args.steps, told)
                raise Stopped(asked)
            began, lr, batch = time.perf_counter(), rate(step), next(stream)
            inputs = Tensor(batch.images), Tensor(task.second_input(batch, step))
            outcome = train_step([inputs], lr, step)
            squared, *kl = outcome.extras
            result.write(
                step=step + 1,
                loss=outcome.loss,
                psnr=psnr(squared),
                kl=kl[0] if kl else np.nan,
                learning_rate=lr,
                grad_norm=outcome.grad_norm,
                seconds=time.perf_counter() - began,
            )
            bar.set_postfix_str(f"loss {outcome.loss:.4f}, PSNR {psnr(squared):.2f} dB", refresh=False)
            bar.update()
            if (step + 1) % args.save_interval == 0 or step + 1 == args.steps:
                save(result, step + 1)


def run_settings(args: argparse.Namespace, config: ModelConfig) -> dict:
    """What of the options must be the same when a run is resumed."""
    names = ("train_batch_size", "image_size", "seed", "optim", "betas", "weight_decay", "ema_decay", "max_grad_norm")
    names += ("random_crop", "flip", "kl_weight", "squared_weight", "edge_weight")
    names += ("decoder_only", "denoise_below", "clean_share", "sampler", "scale")
    return {**asdict(config.vae), **{name: getattr(args, name) for name in names}}


if __name__ == "__main__":
    runtime.run(main)
