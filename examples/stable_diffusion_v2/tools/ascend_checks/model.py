"""The embedded tiny model's picture and losses against those of a CPU, and how fast SD 2.x's UNet draws and trains."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from mindspore import Tensor, runtime

from ldm.config.model import ModelConfig, changed, load_model_config
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import build_schedule
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.networks.unet import UNet
from ldm.parts import PARTS, UNET
from ldm.pipeline import Pipeline, settings_for
from ldm.runtime import set_compute_dtype
from ldm.train.ema import Ema
from ldm.train.optimizer import build_optimizer
from ldm.train.step import LossScale, TrainStep
from ldm.weights import choose_config, open_weights
from tools.ascend_checks.machine import Finding, guarded

ROOT = Path(__file__).parents[2]
REFERENCE = Path(__file__).with_name("reference.json")
CHECKPOINT = ROOT / "models/tiny-vpred.safetensors"
SIDE = 8  # blocks of a picture's means, along each side
ADVICE = "mend what failed above first, then try --dtype float32"
WITHIN = 0.01  # of the losses, and of a picture's range


def tiny(dtype: str, parts: tuple[str, ...], weights: bool) -> tuple:
    """(config, model) of the embedded model."""
    found = open_weights(str(CHECKPOINT))
    config = choose_config(found).config
    model = StableDiffusion(config, parts)
    model.load(found.checkpoint.tensors, str(CHECKPOINT), parts, copy=True)
    model.compute_in(dtype, weights)
    return config, model


def picture(dtype: str, weights: bool) -> list[float]:
    """The means of SIDE x SIDE blocks of a drawn picture, in [0, 1]."""
    config, model = tiny(dtype, PARTS, weights)
    settings = settings_for(config, SAMPLERS["ddim"], 1, steps=4)
    image = Pipeline(config, model).draw(["a drawing of a red apple, openmoji style"], [""], [0], settings)[0] / 255
    height, width, colours = image.shape
    blocks = image.reshape(SIDE, height // SIDE, SIDE, width // SIDE, colours)
    return blocks.mean((1, 3)).ravel().round(5).tolist()


def losses(dtype: str) -> list[float]:
    """The losses of five training steps on one batch."""
    config, model = tiny(dtype, (UNET,), False)
    rng, batch = np.random.default_rng(0), 4
    side = config.image_size // model.factor
    latents, eps = (rng.standard_normal((batch, config.unet.in_channels, side, side), np.float32) for _ in range(2))
    context = rng.standard_normal((batch, config.text.context_length, config.unet.context_dim), np.float32)
    times, weight = np.array([100, 300, 600, 900], np.int32), np.ones(batch, np.float32)
    trained = list(model.unet.get_parameters())
    loss = DiffusionLoss(model.unet, build_schedule(config.schedule), get_prediction(config.prediction_type))
    scale = LossScale(1024.0, 1000) if dtype == "float16" else None
    step = TrainStep(loss, build_optimizer("adamw", trained), None, 1.0, scale)
    inputs = tuple(map(Tensor, (latents, eps, times, weight, context)))
    return [step([inputs], 1e-4, n).loss for n in range(5)]


def reference() -> dict:
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


def write_reference() -> None:
    """Store what this device computes in float32; for a CPU."""
    found = {"picture": picture("float32", False), "losses": [round(loss, 6) for loss in losses("float32")]}
    REFERENCE.write_text(json.dumps(found) + "\n", encoding="utf-8")


def check_picture(dtype: str, weights: bool) -> Finding:
    error = float(np.sqrt(np.mean((np.array(picture(dtype, weights)) - reference()["picture"]) ** 2)))
    return Finding(
        f"tiny model's picture, {dtype}", error <= WITHIN, f"differs by {error:.2%} from a CPU's", "see above"
    )


def check_losses(dtype: str) -> Finding:
    given, wanted = np.array(losses(dtype)), np.array(reference()["losses"])
    error = float(np.abs(given / wanted - 1).max())
    said = f"differ by {error:.2%} from a CPU's: {', '.join(f'{loss:.4f}' for loss in given)}"
    return Finding(f"tiny model's five losses, {dtype}", error <= WITHIN, said, ADVICE)


def findings(dtypes: tuple[str, ...], weights: bool) -> Iterator[Finding]:
    for dtype in dtypes:
        yield guarded(f"picture, {dtype}", lambda dtype=dtype: check_picture(dtype, weights))
        yield guarded(f"losses, {dtype}", lambda dtype=dtype: check_losses(dtype))


def sd2(width: int, dtype: str, weights: bool) -> tuple[ModelConfig, UNet]:
    """(config, UNet) of SD 2.x at this width, with random weights."""
    config = changed(load_model_config(ROOT / "configs/v2-inference.yaml"), [f"model.unet.model_channels={width}"])
    net = UNet(config.unet)
    initialize(net, 0)
    set_compute_dtype(net, dtype, weights)
    return config, net


def unet_inputs(batch: int, side: int) -> list[Tensor]:
    rng = np.random.default_rng(0)
    z, context = (rng.standard_normal(shape, np.float32) for shape in ((batch, 4, side, side), (batch, 77, 1024)))
    return [Tensor(z), Tensor(np.full(batch, 500, np.int32)), Tensor(context)]


def drawing_speed(width: int, side: int, dtype: str, runs: int) -> str:
    """Forward passes of two latents of side x side, as guidance makes them."""
    _, net = sd2(width, dtype, weights=dtype != "float32")
    inputs = unet_inputs(2, side)
    return timed(lambda: net(*inputs).asnumpy(), runs)


def training_speed(width: int, side: int, dtype: str, runs: int) -> str:
    """Steps of the whole UNet on one picture: recomputation, clipping, AdamW and a moving average."""
    config, net = sd2(width, dtype, weights=False)
    net.recompute_blocks()
    trained = list(net.get_parameters())
    loss = DiffusionLoss(net, build_schedule(config.schedule), get_prediction(config.prediction_type))
    scale = LossScale(1024.0, 1000) if dtype == "float16" else None
    step = TrainStep(loss, build_optimizer("adamw", trained), Ema(trained), 1.0, scale)
    z, times, context = unet_inputs(1, side)
    batch = z, z, times, Tensor(np.ones(1, np.float32)), context
    return timed(lambda: step([batch], 1e-5, 1), runs)


SPEEDS = {"drawing": drawing_speed, "training": training_speed}


def timed(call: Callable[[], object], runs: int) -> str:
    """Seconds of the first call, which compiles, the median of the others in milliseconds, and peak memory."""
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    then = 1000 * float(np.median(seconds[1:]))
    return f"first call {seconds[0]:.1f} s, then {then:.1f} ms, peak {peak_memory():.1f} GiB"


def peak_memory() -> float:
    """GiB of the device's memory, or of the process where MindSpore counts none, as on a CPU."""
    return (runtime.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**30
