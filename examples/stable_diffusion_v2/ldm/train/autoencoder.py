"""Training of an autoencoder: all of it, or its decoder alone on latents that a UNet has denoised."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm import checkpoint
from ldm.config.model import ModelConfig, save_model_config
from ldm.data.batches import Batch
from ldm.data.dataset import CaptionedImages
from ldm.data.images import crop, to_float
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.parts import PARTS, VAE
from ldm.pictures import grid, psnr, save_png, to_uint8
from ldm.pipeline import Pipeline, Settings, sampler_of
from ldm.randomness import generator, stratified
from ldm.train.cache import settings_key
from ldm.train.ema import Ema
from ldm.train.latent_channels import alive, keep_channels
from ldm.train.optimizer import build_optimizer
from ldm.train.run import Plan, Task
from ldm.train.step import StepResult, TrainStep
from ldm.weights import read_checkpoint, words_of

log = logging.getLogger(__name__)
DECODER = (VAE + "decoder.", VAE + "post_quant_conv.")
SHOWN = 8  # pictures in the sheet of reconstructions
SAMPLING_STEPS = 15  # of the sampler that denoises latents for --decoder_only, which skips the first ones


class Reconstruction(nn.Cell):
    """The loss of a picture's error: its mean absolute value, its mean square, and the mean absolute error of the
    differences between neighbouring pixels. The third term is large for blurred edges and blotches in flat areas."""

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


def fixed_pictures(data: CaptionedImages, count: int) -> np.ndarray:
    """The middle squares of pictures spread evenly over the data, float32 [count, 3, S, S] in [-1, 1]."""
    places = np.linspace(0, len(data) - 1, count).astype(int)
    return to_float([crop(data[i][0], data.image_size) for i in places])


def encode(model: StableDiffusion, data: CaptionedImages, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [N, C, h, w] of the latents of pictures spread evenly over the data."""
    pictures = fixed_pictures(data, batch_size * min(64, max(1, len(data) // batch_size)))
    parts = [model.encode_images(pictures[i : i + batch_size]) for i in range(0, len(pictures), batch_size)]
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])


def read_start(args: argparse.Namespace, config: ModelConfig) -> dict[str, np.ndarray] | None:
    """The tensors to start from; None without `pretrained_model_path`. UserError where they cannot be trained."""
    path = args.pretrained_model_path
    if not path:
        return None
    tensors = read_checkpoint(path, config).tensors if args.decoder_only else checkpoint.load(path).tensors
    checkpoint.require_finite(tensors, path, PARTS if args.decoder_only else (VAE,))
    return tensors


class AutoencoderTask(Task):
    """What `WholeAutoencoder` and `DecoderAlone` share.

    Args:
        args: the options of train_autoencoder.py.
        config: the model's config.
        model: all of its networks.
        data: the pictures.
        start: the tensors to start from; None for random weights.
    """

    figures = ("loss", "psnr", "kl")
    shown = ("loss", "psnr")
    exported: str  # name of the exported file
    untrained_bytes = 0  # of exported weights that are not trained

    def __init__(self, args, config: ModelConfig, model: StableDiffusion, data: CaptionedImages, start: dict | None):
        self.args, self.config, self.model, self.data, self.start = args, config, model, data, start
        self.folder = Path(args.output_path)
        self.replaces = (self.folder / self.exported,)
        loss, trained = self.load()
        optimizer = build_optimizer(args.optim, trained, tuple(args.betas), weight_decay=args.weight_decay)
        self.step = TrainStep(loss, optimizer, Ema(trained, args.ema_decay), args.max_grad_norm)
        self.shown_pictures = fixed_pictures(data, SHOWN)

    def load(self) -> tuple[nn.Cell, list[Parameter]]:
        """Load the networks' weights; returns the loss and the parameters that it trains."""
        raise NotImplementedError

    def second_input(self, batch: Batch, step: int) -> np.ndarray:
        """The second argument of the loss, after the pictures."""
        raise NotImplementedError

    def write(self, tensors: dict[str, np.ndarray]) -> Path:
        """Export these trained tensors, which the model holds at this time; returns the path."""
        raise NotImplementedError

    def inputs(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        return Tensor(batch.images), Tensor(self.second_input(batch, step))

    def measured(self, result: StepResult) -> dict[str, float]:
        squared, *kl = result.extras
        return {"loss": result.loss, "psnr": psnr(squared), "kl": kl[0] if kl else np.nan}

    def export_bytes(self) -> int:
        return 2 * self.untrained_bytes

    def export(self, step: int, plan: Plan) -> None:
        """Write the averaged weights, and a sheet of pictures above their reconstructions."""
        with self.step.ema.applied():
            decoded = self.model.decode(self.model.encode_images(self.shown_pictures)[0])
            path = self.write(self.step.ema.tensors())
        save_png(
            grid(to_uint8(np.concatenate([self.shown_pictures, decoded])), rows=2), self.folder / "reconstructions.png"
        )
        log.info("step %d: %s", step, path)


class WholeAutoencoder(AutoencoderTask):
    """Encoder and decoder together, on latents drawn from the encoder's Gaussian."""

    exported = "vae.safetensors"

    def load(self) -> tuple[nn.Cell, list[Parameter]]:
        args, vae = self.args, self.model.vae
        if self.start is not None:
            self.model.load(self.start, args.pretrained_model_path, (VAE,), copy=True)
        else:
            initialize(vae, args.seed)
        reconstruction = Reconstruction(args.squared_weight, args.edge_weight)
        return AutoencoderLoss(vae, reconstruction, args.kl_weight), list(vae.get_parameters())

    def second_input(self, batch: Batch, step: int) -> np.ndarray:
        """Unit Gaussian noise [B, C, h, w]."""
        shape = self.model.latent_shape(*batch.images.shape[2:])
        draws = [generator(self.args.seed, "latent", i).standard_normal(shape, np.float32) for i in batch.ordinals]
        return np.stack(draws)

    def write(self, tensors: dict[str, np.ndarray]) -> Path:
        """Cut dead latent channels, and set the config's scale so that scaled latents have a mean square of 1."""
        mean, std = encode(self.model, self.data, self.args.train_batch_size)
        kept = alive(mean, std) or list(range(mean.shape[1]))
        if len(kept) < mean.shape[1]:
            log.info("of %d latent channels %d say something of the picture; the rest is cut", mean.shape[1], len(kept))
            tensors = keep_channels(tensors, kept)
        scale = self.config.scale_factor / np.sqrt(np.mean(mean[:, kept] ** 2 + std[:, kept] ** 2, dtype=np.float64))
        config = replace(with_latent_channels(self.config, len(kept)), scale_factor=float(scale))
        checkpoint.save(self.folder / self.exported, tensors, words_of(config), "safetensors")
        save_model_config(config, self.folder / "model_config.yaml")
        return self.folder / self.exported


class DecoderAlone(AutoencoderTask):
    """The decoder of a whole model, on latents that its UNet has denoised.

    The latents of a share of each step's pictures stay clean. The others are noised to one of the sampler's times below
    `denoise_below` and denoised from there. The steps take these times evenly.
    """

    exported = "model.safetensors"

    def load(self) -> tuple[nn.Cell, list[Parameter]]:
        args, config, model = self.args, self.config, self.model
        self.whole = self.start
        self.untrained_bytes = sum(array.nbytes for array in self.whole.values())
        model.load(self.whole, args.pretrained_model_path, copy=True)
        self.pipeline, size = Pipeline(config, model), args.image_size
        self.settings = Settings(sampler_of(config, args.sampler), SAMPLING_STEPS, args.scale, size, size, args.seed)
        times = self.settings.sampler.times(self.pipeline.schedule, SAMPLING_STEPS)
        self.fewest_skipped = int((times >= args.denoise_below).sum())
        if self.fewest_skipped == SAMPLING_STEPS:
            raise UserError(f"denoise_below is {args.denoise_below}; the sampler's last time is {times[-1]}")
        trained = [param for param in model.vae.get_parameters() if param.name.startswith(DECODER)]
        return DecoderLoss(model.vae, Reconstruction(args.squared_weight, args.edge_weight)), trained

    def second_input(self, batch: Batch, step: int) -> np.ndarray:
        """Unscaled latents, float32 [B, C, h, w], the clean ones first."""
        latents = self.model.encode_images(batch.images)[0]
        until_now, with_these = (int(i * len(latents) * self.args.clean_share) for i in (step, step + 1))
        clean, place = with_these - until_now, stratified(self.settings.seed, "steps skipped", step)
        if clean < len(latents):
            skipped = self.fewest_skipped + int(place * (SAMPLING_STEPS - self.fewest_skipped))
            numbers = batch.ordinals[clean:].tolist()
            noisy = self.pipeline.redraw(latents[clean:], batch.texts[clean:], numbers, self.settings, skipped)
            latents = np.concatenate([latents[:clean], noisy])
        return self.model.unscaled(latents)

    def changed_source(self) -> str | None:
        return checkpoint.changed(self.whole.values())

    def write(self, tensors: dict[str, np.ndarray]) -> Path:
        """Write the whole model."""
        path = self.folder / self.exported
        checkpoint.save(path, {**self.whole, **tensors}, words_of(self.config), "safetensors")
        return path

    def facts(self) -> dict[str, str]:
        """A key of the untrained weights, which a resume state does not hold, and the spacing of the times."""
        rest = {name: array for name, array in self.whole.items() if not name.startswith(DECODER)}
        return {"frozen": settings_key(rest), "spacing": self.settings.sampler.spacing}


def with_latent_channels(config: ModelConfig, channels: int) -> ModelConfig:
    return replace(
        config,
        unet=replace(config.unet, in_channels=channels, out_channels=channels),
        vae=replace(config.vae, z_channels=channels, embed_dim=channels),
    )


def run_settings(args: argparse.Namespace, config: ModelConfig) -> dict:
    """The options that must stay the same when a run is resumed."""
    names = ("train_batch_size", "image_size", "seed", "optim", "betas", "weight_decay", "ema_decay", "max_grad_norm")
    names += ("random_crop", "flip", "kl_weight", "squared_weight", "edge_weight")
    names += ("decoder_only", "denoise_below", "clean_share", "sampler", "scale")
    return {**asdict(config.vae), **{name: getattr(args, name) for name in names}}
