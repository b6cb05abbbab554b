"""Adapters that we write, used by PEFT and diffusers on the same base; adapters that they write, read here."""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")
peft = pytest.importorskip("peft", reason="PEFT is not installed: make parity")

from reference import CONFIGS, reference, relative_rms, states
from transformers.integrations import peft as transformers_peft

from ldm.checkpoint import lora
from ldm.checkpoint.lora import Adapter, Pair
from ldm.checkpoint.names import from_diffusers, scheme_of, to_diffusers

pytestmark = pytest.mark.parity
LAYERS = re.compile(r".*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out|self_attn\.\w+|mlp\.fc[12])")


def random_adapter(tensors, variant):
    """Of all linear layers, in mixed ranks and alphas, large enough to be seen in the output."""
    rng, pairs, scheme = np.random.default_rng(0), {}, scheme_of(tensors)
    for name, array in tensors.items():
        if name.startswith("first_stage_model.") or not name.endswith("weight") or array.ndim < 2:
            continue
        for which in range(3) if name.endswith("in_proj_weight") else (None,):
            module = lora.module(name, variant, which, scheme=scheme)
            if LAYERS.fullmatch(module):
                rank, rows = 2 + len(pairs) % 3, len(array) // (1 if which is None else 3)
                down = rng.standard_normal((rank, *array.shape[1:]), np.float32) / np.sqrt(array[0].size)
                up = rng.standard_normal((rows, rank, *(1,) * (array.ndim - 2)), np.float32)
                pairs[module] = Pair(down.astype(np.float32), up, rank * (0.5, 0.25)[len(pairs) % 2])
    return Adapter(pairs, {}, "diffusers")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def case(request):
    """(config, base tensors, adapter, the outputs of UNet and text encoder with our merged weights)."""
    config = CONFIGS[request.param]
    unet, _, text = networks = reference(config)
    variant = config.text.variant
    tensors = from_diffusers(*states(networks), variant)
    adapter = random_adapter(tensors, variant)
    parts = to_diffusers(lora.merged(tensors, [(adapter, 1.0)], variant), config.text.layers)
    merged = outputs(*with_weights(unet, text, parts["unet"], parts["text_encoder"]))
    plain = outputs(*with_weights(unet, text, *(states((unet, text)))))
    assert all(relative_rms(one, two) > 0.05 for one, two in zip(plain, merged))  # the adapter does something
    return config, tensors, adapter, merged


def copies(config):
    """The base's UNet and text encoder, anew: adding an adapter changes them."""
    unet, _, text = reference(config)
    return unet, text


def with_weights(unet, text, unet_weights, text_weights):
    unet, text = (
        type(each).from_config(each.config) if each is unet else type(each)(each.config) for each in (unet, text)
    )
    ours = {name.removeprefix("text_model."): array for name, array in text_weights.items()}
    theirs = {name: ours[name.removeprefix("text_model.")] for name in text.state_dict()}
    unet.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in unet_weights.items()})
    text.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in theirs.items()})
    return unet.eval(), text.eval()


def outputs(unet, text):
    rng = np.random.default_rng(1)
    z = torch.from_numpy(rng.standard_normal((1, 4, 16, 16), np.float32))
    width = (unet.base_model if isinstance(unet, peft.PeftModel) else unet).config.cross_attention_dim
    context = torch.from_numpy(rng.standard_normal((1, 77, width), np.float32))
    ids = torch.arange(77)[None] % 50
    with torch.no_grad():
        return unet(z, torch.tensor([500]), context).sample.numpy(), text(input_ids=ids).last_hidden_state.numpy()


def same(case, unet, text):
    for got, wanted in zip(outputs(unet, text), case[3]):
        assert relative_rms(got, wanted) <= 1e-4


WORDS = {"prediction_type": "v", "resolution": "128x128"}  # others pass over what our files say beside


def test_peft_loads_our_folder(case, tmp_path, recwarn):
    config, _, adapter, _ = case
    lora.save(tmp_path / "x", adapter, "peft", **WORDS)
    unet, text = copies(config)
    unet = peft.PeftModel.from_pretrained(unet, tmp_path / "x/unet")
    text = peft.PeftModel.from_pretrained(text, tmp_path / "x/text_encoder_one")
    same(case, unet.eval(), text.eval())
    assert not [each for each in recwarn if re.search("adapter keys|pattern", str(each.message))]


def pipeline(config, monkeypatch):
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0.5.0")  # it wants one that is not published yet
    unet, text = copies(config)
    scheduler = diffusers.DDIMScheduler()
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=text, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_diffusers_loads_our_file(case, tmp_path, monkeypatch):
    pipe = pipeline(case[0], monkeypatch)
    lora.save(tmp_path / "x.safetensors", case[2], "diffusers", **WORDS)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    same(case, pipe.unet, pipe.text_encoder)


def test_diffusers_loads_our_kohya_file(case, tmp_path, monkeypatch):
    """With one alpha for all layers; of several its reader takes the most common one for almost all."""
    config, tensors, adapter, _ = case
    pipe = pipeline(config, monkeypatch)
    even = Adapter({name: pair._replace(alpha=1.5) for name, pair in adapter.pairs.items()}, {}, "kohya")
    lora.save(tmp_path / "x.safetensors", even, "kohya", **WORDS)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    check(config, tensors, even, outputs(pipe.unet, pipe.text_encoder))


def test_what_peft_and_diffusers_write_is_read(case, tmp_path, monkeypatch):
    """Their own adapters of the base, saved by PEFT and by diffusers, are what they computed with."""
    config, tensors, _, _ = case
    unet, text = copies(config)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v", "proj_in", "conv1"],
                               rank_pattern={"attn1.to_q": 2}, alpha_pattern={"proj_in": 7}, use_rslora=True,
                               init_lora_weights=False)  # fmt: skip
    unet = peft.get_peft_model(unet, settings)
    text = peft.get_peft_model(text, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "out_proj"],
                                                     init_lora_weights=False))  # fmt: skip
    unet.save_pretrained(tmp_path / "x/unet")
    text.save_pretrained(tmp_path / "x/text_encoder_one", safe_serialization=False)
    wanted = outputs(unet.eval(), text.eval())
    read = lora.load(tmp_path / "x")
    assert read.form == "peft"
    check(config, tensors, read, wanted)

    pipe = pipeline(config, monkeypatch)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "proj_out"], init_lora_weights=False)
    pipe.unet.add_adapter(settings)
    wanted = outputs(pipe.unet, pipe.text_encoder)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    metadata = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, **metadata)
    read = lora.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert read.form == "diffusers" and {pair.alpha for pair in read.pairs.values()} == {5.0}
    check(config, tensors, read, wanted)


def check(config, tensors, adapter, wanted):
    variant = config.text.variant
    parts = to_diffusers(lora.merged(tensors, [(adapter, 1.0)], variant), config.text.layers)
    unet, text = copies(config)
    got = outputs(*with_weights(unet, text, parts["unet"], parts["text_encoder"]))
    for one, two in zip(got, wanted):
        assert relative_rms(one, two) <= 1e-4
