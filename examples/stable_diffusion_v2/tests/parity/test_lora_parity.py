"""Adapters that we write, used by PEFT and diffusers on the same base; adapters that they write, read here."""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")
peft = pytest.importorskip("peft", reason="PEFT is not installed: make parity")

import sdxl_reference
from reference import CONFIGS, reference, relative_rms, states
from transformers.integrations import peft as transformers_peft

from ldm.checkpoint import lora
from ldm.checkpoint.lora import Adapter, Pair
from ldm.checkpoint.names import from_diffusers

pytestmark = pytest.mark.parity
LAYERS = re.compile(r".*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out|self_attn\.\w+|mlp\.fc[12])")
FOLDERS = {"unet": "unet", "text_encoder": "text_encoder_one", "text_encoder_2": "text_encoder_two"}


def networks(kind):
    """UNet and text encoders of the base by diffusers' names of the parts, anew: adding an adapter changes them."""
    if kind == "sdxl":
        parts = sdxl_reference.networks()
        return {part: parts[part] for part in FOLDERS}
    unet, _, text = reference(CONFIGS[kind])
    return {"unet": unet, "text_encoder": text}


def tensors_of(kind):
    """The base's tensors by our names."""
    unet, *texts = states(tuple(networks(kind).values()))
    if kind != "sdxl":
        return from_diffusers(unet, {}, *texts, CONFIGS[kind].text.variant)
    return from_diffusers(unet, {}, texts[0], "clip", texts[1])


def random_adapter(tensors):
    """Of all linear layers, in mixed ranks and alphas, large enough to be seen in the output."""
    rng, pairs, layout = np.random.default_rng(0), {}, lora.layout_of(tensors)
    for name, array in tensors.items():
        if not name.endswith("weight") or array.ndim < 2:
            continue
        for which in range(3) if name.endswith("in_proj_weight") else (None,):
            module = lora.module(name, layout, which)
            if LAYERS.fullmatch(module):
                rank, rows = 2 + len(pairs) % 3, len(array) // (1 if which is None else 3)
                down = rng.standard_normal((rank, *array.shape[1:]), np.float32) / np.sqrt(array[0].size)
                up = rng.standard_normal((rows, rank, *(1,) * (array.ndim - 2)), np.float32)
                pairs[module] = Pair(down.astype(np.float32), up, rank * (0.5, 0.25)[len(pairs) % 2])
    return Adapter(pairs, {}, "diffusers")


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def case(request):
    """(kind, base tensors, adapter, the outputs of UNet and text encoders with our merged weights)."""
    kind = request.param
    tensors = tensors_of(kind)
    adapter = random_adapter(tensors)
    assert {module.partition(".")[0] for module in adapter.pairs} == networks(kind).keys()
    merged = with_adapter(kind, tensors, adapter)
    assert all(relative_rms(one, two) > 0.05 for one, two in zip(outputs(networks(kind)), merged))  # it does something
    return kind, tensors, adapter, merged


def with_adapter(kind, tensors, adapter):
    """The outputs of the networks with the weights that we merge."""
    nets, layout, merged = networks(kind), lora.layout_of(tensors), lora.merged(tensors, [(adapter, 1.0)])
    for module in adapter.pairs:
        name, which = lora.parameter(module, layout)
        part, _, path = module.partition(".")
        modules = dict(nets[part].named_modules())  # of encoder one, newer transformers have no "text_model."
        layer = modules[path if path in modules else path.removeprefix("text_model.")]
        weight = merged[name] if which is None else np.split(merged[name], 3)[which]
        layer.weight.data = torch.from_numpy(np.array(weight)).reshape(layer.weight.shape)
    return outputs(nets)


def outputs(nets):
    rng = np.random.default_rng(1)
    unet = nets["unet"]
    config = (unet.base_model if isinstance(unet, peft.PeftModel) else unet).config
    z, context = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in (
        (1, 4, 16, 16), (1, 77, config.cross_attention_dim)))  # fmt: skip
    ids, sizes = torch.arange(77)[None] % 50, torch.tensor([[128.0, 96.0, 0.0, 8.0, 128.0, 128.0]])
    with torch.no_grad():
        texts = [net(input_ids=ids) for part, net in nets.items() if part != "unet"]
        pooled = [text.text_embeds for text in texts if "text_embeds" in text]
        added = {"text_embeds": pooled[0] * 0 + context[:, 0, :64], "time_ids": sizes} if pooled else None
        noise = unet(z, torch.tensor([500]), context, added_cond_kwargs=added).sample
    return [each.numpy() for each in (noise, *(text.last_hidden_state for text in texts), *pooled)]


def check(got, wanted):
    assert len(got) == len(wanted)
    for one, two in zip(got, wanted):
        assert relative_rms(one, two) <= 1e-5


WORDS = {"prediction_type": "v", "resolution": "128x128"}  # others pass over what our files say beside


def test_peft_loads_our_folder(case, tmp_path, recwarn):
    kind, _, adapter, merged = case
    lora.save(tmp_path / "x", adapter, "peft", **WORDS)
    nets = {part: peft.PeftModel.from_pretrained(net, tmp_path / "x" / FOLDERS[part]).eval()
            for part, net in networks(kind).items()}  # fmt: skip
    check(outputs(nets), merged)
    assert not [each for each in recwarn if re.search("adapter keys|pattern", str(each.message))]


def pipeline(kind, monkeypatch):
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0.5.0")  # it wants one that is not published yet
    rest = dict.fromkeys(("vae", "tokenizer"))
    if kind == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **networks(kind), **rest, tokenizer_2=None, scheduler=diffusers.DDIMScheduler(), add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **networks(kind), **rest, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def outputs_of(pipe):
    return outputs({part: getattr(pipe, part) for part in FOLDERS if hasattr(pipe, part)})


def test_diffusers_loads_our_file(case, tmp_path, monkeypatch):
    kind, _, adapter, merged = case
    pipe = pipeline(kind, monkeypatch)
    lora.save(tmp_path / "x.safetensors", adapter, "diffusers", **WORDS)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    check(outputs_of(pipe), merged)


def test_diffusers_loads_our_kohya_file(case, tmp_path, monkeypatch):
    """With one alpha for all layers; of several its reader takes the most common one for almost all."""
    kind, tensors, adapter, _ = case
    pipe = pipeline(kind, monkeypatch)
    even = Adapter({name: pair._replace(alpha=1.5) for name, pair in adapter.pairs.items()}, {}, "kohya")
    lora.save(tmp_path / "x.safetensors", even, "kohya", **WORDS)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    check(outputs_of(pipe), with_adapter(kind, tensors, even))


def test_what_peft_and_diffusers_write_is_read(case, tmp_path, monkeypatch):
    """Their own adapters of the base, saved by PEFT and by diffusers, are what they computed with."""
    kind, tensors, _, _ = case
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v", "proj_in", "conv1"],
                               rank_pattern={"attn1.to_q": 2}, alpha_pattern={"proj_in": 7}, use_rslora=True,
                               init_lora_weights=False)  # fmt: skip
    nets = {}
    for part, net in networks(kind).items():
        text = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "out_proj"], init_lora_weights=False)
        nets[part] = peft.get_peft_model(net, settings if part == "unet" else text).eval()
        nets[part].save_pretrained(tmp_path / "x" / FOLDERS[part], safe_serialization=part == "unet")
    read = lora.load(tmp_path / "x")
    assert read.form == "peft"
    check(with_adapter(kind, tensors, read), outputs(nets))

    pipe = pipeline(kind, monkeypatch)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "proj_out"], init_lora_weights=False)
    pipe.unet.add_adapter(settings)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    metadata = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    read = lora.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert read.form == "diffusers" and {pair.alpha for pair in read.pairs.values()} == {5.0}
    check(with_adapter(kind, tensors, read), outputs_of(pipe))
