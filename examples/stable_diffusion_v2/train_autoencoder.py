"""Train the autoencoder of a model config on the pictures of a data folder: reconstruction and a little KL.

    python train_autoencoder.py --train_config configs/train/train_config_tiny_vae.yaml --output_path output/tiny_vae

Latent channels that have learned nothing are cut away from what it exports; one over the spread of the others is the
`scale_factor` of the config beside the weights.
"""

from __future__ import annotations

from ldm import runtime  # first: it sets what MindSpore reads when it is loaded

# isort: split
import argparse
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from eval.metrics import psnr
from ldm import checkpoint
from ldm.config import ModelConfig, load_model_config, save_model_config
from ldm.data.batches import Augment, Batches
from ldm.data.dataset import ON_BAD_IMAGE, CaptionedImages
from ldm.data.images import crop, to_float
from ldm.models.layers import initialize
from ldm.models.stable_diffusion import VAE, StableDiffusion
from ldm.options import Parser, read_options, require_at_least, seed, str2bool
from ldm.pictures import grid, make_folder, save_png, to_uint8
from ldm.pipeline import check_config, describe
from ldm.randomness import generator
from ldm.train.ema import Ema
from ldm.train.latent_channels import alive, keep_channels
from ldm.train.learning_rate import SCHEDULES, LearningRate
from ldm.train.log import ResultLog, loss_curve, read_log
from ldm.train.optimizer import OPTIMIZERS, build_optimizer
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
from ldm.yaml_file import save_yaml

log = logging.getLogger("train_autoencoder")
COLUMNS = ("step", "loss", "psnr", "kl", "learning_rate", "grad_norm", "seconds")
SHOWN = 8  # pictures in the sheet of reconstructions


class AutoencoderLoss(nn.Cell):
    """Mean absolute and squared error of the picture, and the KL divergence to the unit Gaussian (arXiv 1312.6114)."""

    def __init__(self, vae: nn.Cell, kl_weight: float, squared_weight: float):
        super().__init__(auto_prefix=False)
        self.vae, self.kl_weight, self.squared_weight = vae, kl_weight, squared_weight

    def construct(self, images, noise):
        """(loss, mean squared error per picture [B], KL in nats per latent value).

        images: [B, 3, H, W] in [-1, 1]; noise: unit Gaussian, [B, C, h, w].
        """
        mean, log_var = self.vae.encode(images)
        error = self.vae.decode(mean + ops.exp(0.5 * log_var) * noise) - images
        squared = (error * error).mean((1, 2, 3))
        kl = 0.5 * (mean * mean + ops.exp(log_var) - 1.0 - log_var).mean()
        return error.abs().mean() + self.squared_weight * squared.mean() + self.kl_weight * kl, squared, kl


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
    add("--train_batch_size", type=int, default=16)
    add("--steps", type=int, default=5000, help="training steps")
    add(
        "--latent_channels",
        type=int,
        help="to train with (default: the model config's); those that learn nothing are not exported",
    )
    add("--kl_weight", type=float, default=1e-6)
    add("--squared_weight", type=float, default=1.0, help="of the squared error beside the absolute one")
    add("--optim", choices=list(OPTIMIZERS), default="adamw")
    add("--betas", type=float, nargs=2, default=[0.9, 0.99])
    add("--weight_decay", type=float, default=0.0)
    add("--scheduler", choices=list(SCHEDULES), default="cosine", help="of the learning rate, after the warm-up")
    add("--start_learning_rate", type=float, default=1e-3)
    add("--end_learning_rate", type=float, default=1e-5)
    add("--warmup_steps", type=int, default=200)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_decay", type=float, default=0.999)
    add("--save_interval", type=int, default=1000, help="steps between resume states and pictures")
    add("--resume", default="False", help="True, or the path of a resume state")
    add("--seed", type=seed, default=42)
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


def export(run: Path, ema: Ema, config: ModelConfig, mean: np.ndarray, std: np.ndarray) -> None:
    """The averaged weights without dead channels, and their config, with the scale that gives latents a mean square
    of 1; mean and std: of latents [N, C, h, w] as they are scaled now."""
    tensors, kept = ema.tensors(), alive(mean, std) or list(range(mean.shape[1]))
    if len(kept) < mean.shape[1]:
        log.info("of %d latent channels %d say something of the picture; the rest is cut", mean.shape[1], len(kept))
        tensors = keep_channels(tensors, kept)
    scale = config.scale_factor / np.sqrt(np.mean(mean[:, kept] ** 2 + std[:, kept] ** 2, dtype=np.float64))
    config = replace(with_latent_channels(config, len(kept)), scale_factor=float(scale))
    checkpoint.save(run / "vae.safetensors", tensors, describe(config), "safetensors")
    save_model_config(config, run / "model_config.yaml")


def with_latent_channels(config: ModelConfig, channels: int) -> ModelConfig:
    return replace(
        config,
        unet=replace(config.unet, in_channels=channels, out_channels=channels),
        vae=replace(config.vae, z_channels=channels, embed_dim=channels),
    )


def main() -> None:
    args = read_options(build_parser())
    config = load_model_config(args.model_config)
    args.image_size = args.image_size or config.image_size
    check_config(config, args.image_size)
    require_at_least(1, args, "train_batch_size", "steps", "save_interval")
    if args.latent_channels is not None:
        require_at_least(1, args, "latent_channels")
        config = with_latent_channels(config, args.latent_channels)
    rate = LearningRate(
        args.scheduler, args.start_learning_rate, args.end_learning_rate, args.warmup_steps, 0, args.steps
    )
    run = make_folder(args.output_path)
    resume_from = resume_path(args.resume, run)
    refuse_used_folder(run, resume_from)
    data = CaptionedImages(args.data_path, args.image_size, args.image_filter_size, args.on_bad_image)
    log.info(data.summary())
    runtime.start(args.device_target, args.mode)
    model = StableDiffusion(config)
    if args.pretrained_model_path:
        model.load(checkpoint.load(args.pretrained_model_path).tensors, args.pretrained_model_path, (VAE,))
    else:
        initialize(model.vae, args.seed)

    trained = list(model.vae.get_parameters())
    train_step = TrainStep(
        AutoencoderLoss(model.vae, args.kl_weight, args.squared_weight),
        build_optimizer(args.optim, trained, tuple(args.betas), weight_decay=args.weight_decay),
        Ema(trained, args.ema_decay),
        args.max_grad_norm,
    )
    check_room(run, 2 * state_bytes(train_step))
    settings = run_settings(args, config, len(data))
    first = load_state(resume_from, train_step, settings)["step"] if resume_from else 0
    save_yaml(vars(args), run / "args.yaml")

    batches = Batches(data, args.train_batch_size, args.seed, Augment(args.random_crop, args.flip), first)
    shape = model.latent_shape(args.image_size, args.image_size)
    stream, shown = iter(batches), fixed_pictures(data, SHOWN)
    result = ResultLog(run / "result.log", COLUMNS, first)
    with tqdm(total=args.steps, initial=first, unit="step") as bar:
        for step in range(first, args.steps):
            began, lr, batch = time.perf_counter(), rate(step), next(stream)
            noise = np.stack(
                [generator(args.seed, "latent", i).standard_normal(shape, np.float32) for i in batch.ordinals]
            )
            outcome = train_step([(Tensor(batch.images), Tensor(noise))], lr, step)
            squared, kl = outcome.extras
            result.write(
                step=step + 1,
                loss=outcome.loss,
                psnr=psnr(squared),
                kl=kl,
                learning_rate=lr,
                grad_norm=outcome.grad_norm,
                seconds=time.perf_counter() - began,
            )
            bar.set_postfix_str(f"loss {outcome.loss:.4f}, PSNR {psnr(squared):.2f} dB", refresh=False)
            bar.update()
            if (step + 1) % args.save_interval == 0 or step + 1 == args.steps:
                with train_step.ema.applied():
                    mean, std = encode(model, data, args.train_batch_size)
                    decoded = model.decode(model.encode_images(shown)[0])
                export(run, train_step.ema, config, mean, std)
                save_png(grid(to_uint8(np.concatenate([shown, decoded])), rows=2), run / "reconstructions.png")
                save_state(run / RESUME_NAME, train_step, {"step": step + 1}, settings)
                loss_curve(run / "loss_curve.png", read_log(run / "result.log"))
    log.info("the autoencoder is %s, its config %s", run / "vae.safetensors", run / "model_config.yaml")


def run_settings(args: argparse.Namespace, config: ModelConfig, pictures: int) -> dict:
    """What must be the same when a run is resumed."""
    names = ("train_batch_size", "image_size", "seed", "optim", "betas", "weight_decay", "ema_decay")
    names += ("random_crop", "flip", "kl_weight", "squared_weight")
    return {**asdict(config.vae), **{name: getattr(args, name) for name in names}, "pictures": pictures}


if __name__ == "__main__":
    runtime.run(main)
