"""Parts of narrow models, run as by the scripts, for a dry run as on Ascend (tools/ascend_dryrun).

    python ascend_parts.py PART...

SD 2.x has the depth of the published model, so that the number of launches is its. Every part runs twice. Its launches
at the second time follow its title in the log.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ldm import runtime

sys.path.insert(0, str(Path(__file__).parent))
from mindspore import Tensor, nn
from tiny_sdxl import smaller_sdxl_config

from ldm.config.model import ModelConfig, changed, load_model_config
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.model import StableDiffusion
from ldm.networks import adapter
from ldm.parts import TEXT, UNET, VAE
from ldm.train.ema import Ema
from ldm.train.optimizer import build_optimizer
from ldm.train.step import LossScale, TrainStep

CONFIGS = Path(__file__).parents[1] / "configs"
NARROW_TEXT = ["model.text.width=64", "model.text.heads=2", "model.text.layers=4", "model.text.vocab_size=1024"]
NARROW_TEXT += ["model.unet.context_dim=64"]
NARROW_VAE = ["model.vae.ch=32", "model.vae.num_res_blocks=1"]
SD2 = ["model.unet.model_channels=64", *NARROW_TEXT, *NARROW_VAE]
SD1 = ["model.unet.model_channels=160", "model.unet.num_heads=4", "model.unet.num_res_blocks=1"]
SD1 += [*NARROW_TEXT, *NARROW_VAE]
SHORT_SD1 = [*SD1, "model.unet.channel_mult=[1,2]", "model.unet.attention_resolutions=[2,1]"]
SD1 += ["model.unet.channel_mult=[1,2,4]"]
SHORT = [*SD2, "model.unet.channel_mult=[1,2]", "model.unet.attention_resolutions=[2,1]", "model.unet.num_res_blocks=1"]
KINDS = {
    "sd2": ("v2-vpred-inference", SD2),
    "short": ("v2-vpred-inference", SHORT),
    "sd1": ("v1-inference", SD1),
    "short-sd1": ("v1-inference", SHORT_SD1),
}


def mark(title: str) -> None:
    """Begin a part of the log, after the launches so far."""
    runtime.ms.runtime.synchronize()
    with open(os.environ["STUB_LOG"], "a") as log:
        log.write(f"=== {title}\n")


def twice(title: str, call: Callable) -> None:
    call()
    mark(title)
    call()
    mark("between")


def narrow(kind: str) -> ModelConfig:
    """A model of that kind, with few channels: heads are as wide as in the published one."""
    if kind == "sdxl":
        return smaller_sdxl_config()
    name, changes = KINDS[kind]
    return changed(load_model_config(CONFIGS / f"{name}.yaml"), changes)


def unet_inputs(config: ModelConfig, size: int) -> list[Tensor]:
    rng, batch = np.random.default_rng(0), 2
    shapes = [(batch, 4, size, size), None, (batch, 77, config.unet.context_dim)]
    if config.unet.adm_in_channels:
        shapes.append((batch, config.unet.adm_in_channels))
    times = np.full(batch, 500, np.int32)
    return [Tensor(rng.standard_normal(shape, np.float32) if shape else times) for shape in shapes]


def draw(kind: str, dtype: str = "float16") -> None:
    """Every network as for drawing."""
    config = narrow(kind)
    model = StableDiffusion(config, (UNET, VAE, TEXT))
    model.compute_in(dtype, weights=True)
    inputs, side = unet_inputs(config, 16), config.text.context_length
    ids = np.zeros((2, *([2] if config.text_2 else []), side), np.int32)
    picture, latents = np.zeros((1, 3, 128, 128), np.float32), np.zeros((1, 4, 16, 16), np.float32)
    networks = model.networks
    twice(f"{kind} unet", lambda: networks.unet(*inputs))
    twice(f"{kind} text", lambda: networks.text(Tensor(ids)))
    twice(f"{kind} encode", lambda: networks.vae_encode(Tensor(picture)))
    twice(f"{kind} decode", lambda: networks.vae(Tensor(latents)))


class Marked:
    """A part of a training step, after its title."""

    layer_by_layer = False

    def __init__(self, title: str, call: Callable):
        self.title, self.call = title, call

    def __call__(self, *args, **named):
        mark(self.title)
        return self.call(*args, **named)


def train(kind: str, lora: bool = False, dtype: str = "float16") -> None:
    """Two steps of the UNet with a loss scale, clipping and a moving average; the second one's parts have titles."""
    config = narrow(kind)
    model = StableDiffusion(config, (UNET,))
    if lora:
        places = adapter.attach(model, adapter.chosen(model, ["attention"], (UNET,)), 4, 1.0)
    model.compute_in(dtype)
    model.unet.recompute_blocks()  # as the configs ask for
    trained = list(adapter.parameters(places) if lora else model.unet.get_parameters())
    loss = DiffusionLoss(model.unet, build_schedule(config.schedule), get_prediction(config.prediction_type))
    scale = LossScale(1024.0, 1000) if dtype == "float16" else None
    step = TrainStep(loss, build_optimizer("adamw", trained), Ema(trained), 1.0, scale)
    latents, times, *condition = unet_inputs(config, 8)
    batch = latents, latents, times, Tensor(np.ones(2, np.float32)), *condition
    step([batch], 1e-5, 1)
    title = f"{kind} lora" if lora else f"{kind} train"
    print(f"{title}: {len(trained)} parameters, {len(step.optimizer.few)} updates")
    for part in ("gradients", "norm", "update"):
        setattr(step, part, Marked(f"{title} {part}", getattr(step, part)))
    step([batch], 1e-5, 2)
    mark("between")


def update(kind: str) -> None:
    """The norm of the gradients and the update of a UNet, without the gradients' graph."""
    params = list(StableDiffusion(narrow(kind), (UNET,)).unet.get_parameters())
    step = TrainStep(nn.Identity(), build_optimizer("adamw", params), Ema(params), 1.0)
    grads = [Tensor(np.zeros(param.shape, np.float32)) for param in step.optimizer.params]
    scalars = Tensor(np.ones(2 + len(step.optimizer.scalars(1e-5)), np.float32))
    twice(f"{kind} norm", lambda: step.norm(*grads))
    twice(f"{kind} update", lambda: (step.optimizer.collect(), step.update(scalars, *grads)))


PARTS = {
    "sd2-update": lambda: update("sd2"),
    **{kind: lambda kind=kind: draw(kind) for kind in ("sd2", "sd1", "sdxl", "short")},
    "sd2-bfloat16": lambda: draw("sd2", "bfloat16"),
    **{f"{kind}-train": lambda kind=kind: train(kind) for kind in ("sd2", "short", "sdxl")},
    **{f"{kind}-lora": lambda kind=kind: train(kind, lora=True) for kind in ("sd2", "short", "sdxl")},
    "short-sd1-bfloat16-train": lambda: train("short-sd1", dtype="bfloat16"),
}


def main() -> None:
    runtime.start("Ascend")
    for part in sys.argv[1:]:
        PARTS[part]()


if __name__ == "__main__":
    runtime.run(main)
