"""The two sides of `benchmark.py`: SD 2.x here and in diffusers, with the same random weights, in a process each."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parents[1]
UNET, HALF, DECODER, TRAINING = NETWORKS = ("UNet", "bfloat16", "decoder", "training")
TITLES = {
    UNET: "UNet, batch {batch}",
    HALF: "UNet in bfloat16, batch {batch}",
    DECODER: "decoder",
    TRAINING: "training step of the whole UNet, batch 1, AdamW, recomputing",
}
LEARNING_RATE, CONFIG = 1e-5, HERE / "configs" / "v2-inference.yaml"


class Answer(NamedTuple):
    """Of one call; `seconds`: on the clock, of the CPU."""

    output: np.ndarray
    seconds: tuple[float, float]
    peak: float  # GiB


class Work(NamedTuple):
    """What is measured: one of NETWORKS at a size, with so many threads on each side."""

    network: str
    size: int
    batch: int
    threads: int

    def inputs(self) -> list[np.ndarray]:
        """z [B, 4, size, size]; of the UNet also t [B] and context [B, 77, 1024]; in training eps after z."""
        rng, batch = np.random.default_rng(0), self.batch if self.network in (UNET, HALF) else 1
        z, eps = (rng.standard_normal((batch, 4, self.size, self.size), np.float32) for _ in range(2))
        told = [np.full(batch, 500, np.int32), rng.standard_normal((batch, 77, 1024), np.float32)]
        return {DECODER: [z], TRAINING: [z, eps, *told]}.get(self.network, [z, *told])

    def title(self) -> str:
        return f"{TITLES[self.network].format(batch=self.batch)}, {self.size}×{self.size} latents"


def serve(pipe, call: Callable[[], np.ndarray]) -> None:
    """Answer each request by one call."""
    while pipe.recv():
        began = time.perf_counter(), time.process_time()
        output = call()
        seconds = time.perf_counter() - began[0], time.process_time() - began[1]
        pipe.send(Answer(output, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def diffusers_network(network: str):
    import diffusers
    import torch

    torch.manual_seed(0)
    if network == DECODER:
        widths, kinds = (128, 256, 512, 512), {"down_block_types": ["DownEncoderBlock2D"] * 4}
        kinds |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4}
        return diffusers.AutoencoderKL(block_out_channels=widths, **kinds).eval()
    heads = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
    return diffusers.UNet2DConditionModel(cross_attention_dim=1024, **heads).eval()


def diffusers_worker(pipe, weights: Path, work: Work) -> None:
    """Writes the weights that both sides use, then serves."""
    import diffusers
    import torch

    from ldm import checkpoint
    from ldm.checkpoint.names import from_diffusers

    torch.set_num_threads(work.threads)
    net = diffusers_network(work.network)
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    states = ({}, state) if work.network == DECODER else (state, {})
    checkpoint.save(weights, from_diffusers(*states, {}, "openclip"), {}, "safetensors")
    del state, states
    inputs = [torch.from_numpy(array) for array in work.inputs()]
    pipe.send(f"diffusers {diffusers.__version__}, PyTorch {torch.__version__}")
    if work.network == TRAINING:
        return serve(pipe, diffusers_training(net, *inputs))
    if work.network == HALF:
        net.to(torch.bfloat16)
        inputs = [each.to(torch.bfloat16) if each.is_floating_point() else each for each in inputs]
    call = net.decode if work.network == DECODER else net

    def forward() -> np.ndarray:
        with torch.no_grad():
            return call(*inputs).sample.float().numpy()

    return serve(pipe, forward)


def diffusers_training(net, z, eps, t, context) -> Callable[[], np.ndarray]:
    """A step with v as the target: arXiv 2202.00512, section 4. Returns the loss."""
    import torch
    from diffusers import DDPMScheduler

    net.train()
    net.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
    words = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule, t = DDPMScheduler(1000, **words), t.long()

    def step() -> np.ndarray:
        v = net(schedule.add_noise(z, eps, t), t, context).sample
        loss = torch.nn.functional.mse_loss(v, schedule.get_velocity(z, eps, t))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().numpy().reshape(1)

    return step


def our_worker(pipe, weights: Path, work: Work) -> None:
    from ldm import runtime

    runtime.start("CPU")
    import mindspore
    from mindspore import Tensor

    from ldm import checkpoint, kernels, parts
    from ldm.config.model import load_model_config
    from ldm.networks.layers import fill
    from ldm.networks.unet import UNet
    from ldm.networks.vae import AutoencoderKL

    config, decodes = load_model_config(CONFIG), work.network == DECODER
    net, prefix = (AutoencoderKL(config.vae), parts.VAE) if decodes else (UNet(config.unet), parts.UNET)
    net.set_train(False)
    runtime.set_compute_dtype(net, "bfloat16" if work.network == HALF else "float32")
    tensors = checkpoint.load(weights).tensors
    for name, parameter in net.parameters_and_names():
        fill(parameter, tensors[prefix + name], copy=work.network == TRAINING)
    del tensors
    inputs = [Tensor(array) for array in work.inputs()]
    how = "native kernels" if kernels.select() is kernels.NATIVE else "no native kernels"
    pipe.send(f"this project, MindSpore {mindspore.__version__}, {how}")
    call = our_training(net, config, *inputs) if work.network == TRAINING else lambda: net(*inputs).asnumpy()
    serve(pipe, call)


def our_training(net, config, z, eps, t, context) -> Callable[[], np.ndarray]:
    """The step of train_text_to_image.py, layer by layer. Returns the loss."""
    from mindspore import Tensor

    from ldm.diffusion.loss import DiffusionLoss
    from ldm.diffusion.prediction import get_prediction
    from ldm.diffusion.schedule import build_schedule
    from ldm.train.gradients import LayerByLayer
    from ldm.train.optimizer import build_optimizer
    from ldm.train.step import TrainStep

    trained = list(net.get_parameters())
    loss = DiffusionLoss(net, build_schedule(config.schedule), get_prediction("v"))
    step = TrainStep(loss, build_optimizer("adamw", trained), gradients=LayerByLayer(loss, trained))
    batch = z, eps, t, Tensor(np.ones(1, np.float32)), context
    return lambda: np.array([step([batch], LEARNING_RATE, 1).loss])
