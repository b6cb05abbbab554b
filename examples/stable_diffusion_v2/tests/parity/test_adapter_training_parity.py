"""One training step of adapters beside PEFT's: the same base, the same A and B, the same noise."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
pytest.importorskip("transformers", reason="transformers is not installed: make parity")
peft = pytest.importorskip("peft", reason="peft is not installed: make parity")

from mindspore import Tensor
from reference import CONFIGS, reference, relative_rms, states

from ldm.checkpoint import lora
from ldm.checkpoint.names import from_diffusers
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import PREDICTIONS, get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.model import StableDiffusion
from ldm.networks import adapter
from ldm.networks.layers import fill
from ldm.parts import UNET
from ldm.train.gradients import WholeGraph

pytestmark = pytest.mark.parity
RANK, ALPHA = 4, 6.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


CASES = [("sd1", "eps"), ("sd2", "v"), ("sd2", "x0")]  # every network and every type; a network knows no type


@pytest.fixture(scope="module")
def pair(request):
    """(our model with adapters, its places by PEFT's names, PEFT's UNet, the config), A and B random and the same."""
    config = CONFIGS[request.param]
    networks = reference(config)
    model = StableDiffusion(config, (UNET,))
    tensors = from_diffusers(*states(networks), config.text.variant)
    model.load({name: array for name, array in tensors.items() if name.startswith(UNET)}, "the reference", (UNET,))
    layout = lora.layout_of(model.shapes())
    places = adapter.attach(model, adapter.chosen(model, ["attention"], (UNET,)), RANK, ALPHA / RANK)
    theirs = peft.get_peft_model(networks[0], peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    params, rng, found = dict(theirs.named_parameters()), np.random.default_rng(0), {}
    for place in places:
        module = lora.module(place.weight, layout).removeprefix("unet.")
        for name, ours in (("lora_A", place.adapter.lora_A), ("lora_B", place.adapter.lora_B)):
            value = rng.standard_normal(ours.shape).astype(np.float32) * np.float32(0.1)
            fill(ours, value, copy=True)
            param = params[f"base_model.model.{module}.{name}.default.weight"]
            param.data = torch.from_numpy(value.copy())
            found[f"{module}.{name}"] = ours, param
    assert len(found) == sum(param.requires_grad for param in params.values()) == 2 * len(places)
    return model, found, theirs, config


@pytest.mark.parametrize(("pair", "name"), CASES, indirect=["pair"])
def test_gradients_are_pefts(pair, name):
    assert {each for _, each in CASES} == {*PREDICTIONS}
    model, found, theirs, config = pair
    rng, schedule, prediction = np.random.default_rng(1), build_schedule(config.schedule), get_prediction(name)
    x0, eps = (rng.standard_normal((2, 4, 16, 16)).astype(np.float32) for _ in range(2))
    context, t = rng.standard_normal((2, 77, config.unet.context_dim)).astype(np.float32), np.array([40, 700], np.int32)
    params = [ours for ours, _ in found.values()]
    loss = DiffusionLoss(model.unet, schedule, prediction)
    batch = tuple(map(Tensor, (x0, eps, t, np.ones(2, np.float32), context)))
    outputs, grads = WholeGraph(loss, params)(Tensor(np.float32(1)), *batch)
    alpha, sigma = (share(t).astype(np.float32)[:, None, None, None] for share in (schedule.alpha, schedule.sigma))
    target = torch.from_numpy(prediction.target(x0, eps, alpha, sigma))
    theirs.zero_grad()
    noisy = torch.from_numpy(alpha * x0 + sigma * eps)
    output = theirs(noisy, torch.from_numpy(t), torch.from_numpy(context)).sample
    wanted = torch.nn.functional.mse_loss(output, target)
    wanted.backward()
    assert float(outputs[0].asnumpy()) == pytest.approx(wanted.item(), rel=1e-5)
    for (_, param), grad in zip(found.values(), grads):
        assert relative_rms(grad.asnumpy(), param.grad.numpy()) <= 1e-3
