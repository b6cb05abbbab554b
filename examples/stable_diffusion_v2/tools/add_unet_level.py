"""Give a trained UNet a new first level, so that it draws at twice the resolution.

    python tools/add_unet_level.py SOURCE DESTINATION [--config configs/tiny-vpred.yaml]

The config describes the larger UNet. SOURCE has the same networks, but its UNet lacks the first level. The larger UNet
begins with about the predictions of the smaller UNet for the means of 2x2 latents. So nothing is lost of what was
learnt at the low resolution, where training is cheap (progressive growing, arXiv 1710.10196, for a UNet).
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ldm import checkpoint, runtime
from ldm.config.model import UNetConfig, add_set, changed, load_model_config
from ldm.config.options import seed
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.parts import UNET
from ldm.weights import read_checkpoint, words_of

log = logging.getLogger("add_unet_level")


def without_first_level(unet: UNetConfig) -> UNetConfig:
    """The config of the smaller UNet; UserError where the larger UNet does not allow a smaller one."""
    factors = unet.attention_resolutions
    if unet.channel_mult[:2] != (1, 1) or 1 in factors or 4 * unet.in_channels > unet.model_channels:
        raise UserError(
            "the larger UNet's channel_mult must begin with 1, 1, its first level be without attention, and "
            "model_channels four times in_channels or more"
        )
    return replace(unet, channel_mult=unet.channel_mult[1:], attention_resolutions=tuple(f // 2 for f in factors))


def grow(old: dict[str, np.ndarray], fresh: dict[str, np.ndarray], config: UNetConfig) -> dict[str, np.ndarray]:
    """The larger UNet's parameters.

    New residual blocks begin as identities. So only the way down to the old UNet and the way up from it are computed: a
    halving that applies the old first convolution, and a doubling that repeats each value.

    Args:
        old: the smaller UNet's parameters, by names as in Stability's files.
        fresh: the larger UNet's, random.
        config: of the larger UNet.
    """
    blocks, width = config.num_res_blocks, config.model_channels
    stage = (blocks + 1) * (len(config.channel_mult) - 1)  # the first output stage of the new level
    new = dict(fresh)
    for name, array in old.items():
        part, number, *rest = name.removeprefix(UNET).split(".")
        if part == "input_blocks":
            number = str(int(number) + blocks + 1)
        new[UNET + ".".join((part, number, *rest))] = array

    def put(layer: str, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> None:
        for name, values in ((f"{UNET}{layer}.weight", weight), (f"{UNET}{layer}.bias", bias)):
            new[name] = np.broadcast_to(values, fresh[name].shape).astype(np.float32)

    first = {name: old[f"{UNET}input_blocks.0.0.{name}"] for name in ("weight", "bias")}
    means, halving = _entrance(first["weight"])
    for name in first:
        del new[f"{UNET}input_blocks.{blocks + 1}.0.{name}"]  # a Downsample takes this place
    entrance = fresh[f"{UNET}input_blocks.0.0.weight"].copy()
    entrance[: len(means)] = means
    put("input_blocks.0.0", entrance)
    halving = np.pad(halving, ((0, 0), (0, width - halving.shape[1]), (0, 0), (0, 0)))
    put(f"input_blocks.{blocks + 1}.0.op", halving, first["bias"])
    centre = np.zeros((1, 1, 3, 3))
    centre[..., 1, 1] = 1
    doubling = 2 if 2 in config.attention_resolutions else 1  # its place in the stage
    put(f"output_blocks.{stage - 1}.{doubling}.conv", np.eye(width)[:, :, None, None] * centre)
    for block in range(stage, stage + blocks + 1):  # passes the lower level, ignores the skip connection
        put(f"output_blocks.{block}.0.skip_connection", np.eye(width, 2 * width)[:, :, None, None])
    return new


def _entrance(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A 3x3 convolution [O, C, 3, 3] of means of 2x2, as two: [4C, C, 3, 3], then [O, 4C, 3, 3] with stride 2.

    The first convolution takes four means of 2x2: they begin one row higher or not, and one column to the left or not.
    For row i of the means, the second convolution is centred at row 2i. It finds row i - 1 one row up, among the higher
    means, and row i at the centre. Row i + 1 begins two rows down, out of reach; the mean that begins one row down
    replaces it. The same holds for columns.
    """
    outputs, channels = weight.shape[:2]
    means = np.zeros((2, 2, channels, channels, 3, 3))
    halving = np.zeros((outputs, 2, 2, channels, 3, 3))
    for y, x in np.ndindex(2, 2):
        means[y, x, :, :, y : y + 2, x : x + 2] = np.eye(channels)[:, :, None, None] / 4
    taps = ((0, 0), (1, 1), (1, 2))  # for the rows i - 1, i and i + 1: (which mean, tap of the second convolution)
    for (row, (y, down)), (column, (x, right)) in product(enumerate(taps), repeat=2):
        halving[:, y, x, :, down, right] = weight[:, :, row, column]
    return means.reshape(-1, channels, 3, 3), halving.reshape(outputs, -1, 3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--config", default="configs/tiny-vpred.yaml", help="the larger model's YAML file")
    add_set(parser.add_argument)
    parser.add_argument("--seed", type=seed, default=42, help="decides the new level's random weights")
    args = parser.parse_args()
    config = changed(load_model_config(args.config), args.set)
    smaller = replace(config, unet=without_first_level(config.unet))
    if args.destination.exists():
        raise UserError(f"{args.destination} exists; remove it or give another name")
    ckpt = read_checkpoint(args.source, smaller)
    runtime.start("CPU")
    old = checkpoint.match(ckpt.tensors, StableDiffusion(smaller, (UNET,)).shapes(), args.source, (UNET,))
    larger = StableDiffusion(config, (UNET,))
    initialize(larger.unet, args.seed)
    new = grow(old, larger.tensors(), config.unet)
    others = {name: array for name, array in ckpt.tensors.items() if not name.startswith(UNET)}
    checkpoint.save(args.destination, {**others, **new}, {**ckpt.meta, **words_of(config)}, "safetensors")
    before, after = (f"{sum(array.size for array in part.values()):,}" for part in (old, new))
    log.info("the UNet of %s has %s parameters, that of %s %s", args.source, before, args.destination, after)


if __name__ == "__main__":
    runtime.run(main)
