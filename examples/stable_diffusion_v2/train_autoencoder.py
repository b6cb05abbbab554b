"""Train the autoencoder of a model config on the pictures of a data folder: reconstruction and a little KL.

    python train_autoencoder.py --train_config configs/train/train_config_tiny_vae.yaml --output_path output/tiny_vae

The exported weights lack the latent channels that have learned nothing. The config beside them has a `scale_factor` of
one over the spread of the others.

    python train_autoencoder.py --train_config configs/train/train_config_tiny_vae_decoder.yaml

With --decoder_only True it finishes the decoder of a trained model. Pictures are encoded; their latents are noised, and
denoised by the model's UNet with their captions. From these latents, with the UNet's errors in them, the decoder learns
to make the pictures again. Encoder and UNet stay as they are, and the whole model is exported.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace

from ldm import runtime
from ldm.config.model import ModelConfig, add_set, changed, load_model_config
from ldm.config.options import Parser, read_options, require_at_least, seed, steps_or_share, str2bool
from ldm.data.batches import Augment, Batches
from ldm.data.dataset import ON_BAD_IMAGE, CaptionedImages
from ldm.diffusion.samplers import DEFAULT_SAMPLER, SAMPLERS
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.parallel.ranks import Ranks
from ldm.pipeline import check_config
from ldm.randomness import settled_seed
from ldm.train.autoencoder import DecoderAlone, WholeAutoencoder, read_start, run_settings, with_latent_channels
from ldm.train.ema import Ema
from ldm.train.learning_rate import MULTI_STEP, SCHEDULES, LearningRate
from ldm.train.optimizer import OPTIMIZERS, check_numbers
from ldm.train.run import Plan, Run
from ldm.train.step import TrainStep

log = logging.getLogger("train_autoencoder")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--train_config", help="YAML file with values for these options; the command line overrides it")
    add("--model_config", default="configs/tiny-vpred.yaml", help="the model's YAML file")
    add_set(add)
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
    add("--sampler", choices=list(SAMPLERS), default=DEFAULT_SAMPLER, help="with decoder_only, what denoises")
    add("--scale", type=float, default=1.0, help="with decoder_only, the guidance scale of the denoising")
    add(
        "--latent_channels",
        type=int,
        help="latent channels (default: the model config's); those that learn nothing are not exported",
    )
    _add_training(add)
    add("--save_interval", type=int, default=1000, help="steps between resume states and pictures")
    add("--resume", nargs="?", const="True", default="False", help="True, or the path of a resume state")
    add("--seed", type=seed, default=42, help="decides order, noise and random weights")
    runtime.add_device_options(add)
    return parser


def _add_training(add: Callable) -> None:
    add("--kl_weight", type=float, default=1e-6, help="weight of the divergence from the unit Gaussian")
    add("--squared_weight", type=float, default=1.0, help="weight of the squared error; the absolute error has 1")
    add("--edge_weight", type=float, default=0.0, help="weight of the error in differences between neighbouring pixels")
    add("--optim", choices=list(OPTIMIZERS), default="adamw", help="muon learns faster from random weights")
    add("--betas", type=float, nargs=2, default=[0.9, 0.99], help="decay of the optimizer's averages")
    add("--weight_decay", type=float, default=0.0, help="not applied to norms and biases")
    add(
        "--scheduler",
        choices=[name for name in SCHEDULES if name != MULTI_STEP],
        default="cosine",
        help="how the learning rate goes on after the warm-up",
    )
    add("--start_learning_rate", type=float, default=1e-3, help="learning rate after the warm-up")
    add("--end_learning_rate", type=float, default=1e-5, help="learning rate at the last step")
    add(
        "--warmup_steps",
        type=steps_or_share,
        default=200,
        help="steps in which the rate rises; a number below 1 is a share of all steps",
    )
    add("--max_grad_norm", type=float, default=1.0, help="larger gradients are scaled down to it")
    add("--ema_decay", type=float, default=0.999, help="decay of the moving average, which is saved")


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Find mistakes before the data is read and the networks are built; UserError."""
    runtime.find_device(args.device_target)
    check_config(config, args.image_size)
    require_at_least(1, args, "train_batch_size", "steps", "save_interval")
    if args.decoder_only and (args.latent_channels is not None or not args.pretrained_model_path):
        wrong = "without latent_channels" if args.pretrained_model_path else "with the pretrained_model_path of a model"
        raise UserError(f"decoder_only goes {wrong}: encoder and UNet of that model stay as they are")
    if not 0 <= args.clean_share < 1:
        raise UserError(f"clean_share is {args.clean_share}; give a number from 0 to below 1")
    if args.latent_channels is not None:
        require_at_least(1, args, "latent_channels")
    check_numbers(tuple(args.betas), weight_decay=args.weight_decay)
    Ema.check(args.ema_decay)
    TrainStep.check(args.max_grad_norm)


def main() -> None:
    args = read_options(build_parser())
    args.seed = settled_seed(args.seed, Ranks().broadcast)
    config = changed(load_model_config(args.model_config), args.set)
    args.image_size = args.image_size or config.image_size
    check(args, config)
    if not args.decoder_only:  # decoder_only leaves the UNet as it is
        config = replace(config, image_size=args.image_size)
    if args.latent_channels is not None:
        config = with_latent_channels(config, args.latent_channels)
    ends, steps = (args.start_learning_rate, args.end_learning_rate), (args.warmup_steps, 0, args.steps)
    rate, settings = LearningRate(args.scheduler, *ends, *steps), run_settings(args, config)
    start = read_start(args, config)
    run = Run(args, args.output_path)
    run.claim(settings)
    data = CaptionedImages(args.data_path, args.image_size, args.image_filter_size, args.on_bad_image)
    log.info(data.summary())
    runtime.start(args.device_target, args.mode, ascend=runtime.ascend_settings(args))
    kind = DecoderAlone if args.decoder_only else WholeAutoencoder
    task = kind(args, config, StableDiffusion(config), data, start)
    first = run.begin(task, {**settings, **data.facts(), **task.facts()})
    batches = Batches(data, args.train_batch_size, args.seed, Augment(args.random_crop, args.flip), first)
    run.train(batches, Plan(args.steps, batches.steps_per_epoch, args.save_interval), rate)


if __name__ == "__main__":
    runtime.run(main)
