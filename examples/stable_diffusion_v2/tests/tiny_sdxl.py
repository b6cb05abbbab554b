"""Tiny models of the kind of Stable Diffusion XL, base and refiner, and their parameters by our names, by rules alone.

The tiny base is the one that diffusers can read as a single file: ten layers and more in its second text encoder, and
another width in each.
"""

from __future__ import annotations

import numpy as np

from ldm.config.model import (
    ModelConfig,
    SamplingConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ldm.parts import TEXT, UNET, VAE

VAE_CONFIG = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), force_upcast=True)
CLIP = TextConfig("clip", vocab_size=1000, width=32, layers=3, heads=1, context_layer=2)
OPENCLIP = TextConfig("openclip", vocab_size=1000, width=64, layers=11, heads=2, context_layer=10, projection=64)


def tiny_sdxl_config() -> ModelConfig:
    """A tiny base with v-prediction and zero terminal SNR, 10 million parameters."""
    return ModelConfig(
        prediction_type="v",
        image_size=128,
        scale_factor=0.13025,
        schedule=ScheduleConfig(zero_terminal_snr=True),
        sampling=SamplingConfig(spacing="trailing", zeros_for_empty_prompt=True),
        unet=UNetConfig(
            model_channels=32,
            attention_resolutions=(4, 2),
            channel_mult=(1, 2, 4),
            num_head_channels=32,
            transformer_depth=(1, 1, 2),
            context_dim=96,
            adm_in_channels=64 + 6 * 16,
            size_channels=16,
        ),
        vae=VAE_CONFIG,
        text=CLIP,
        text_2=OPENCLIP,
    )


def smaller_sdxl_config() -> ModelConfig:
    """The smallest of SDXL's kind, for tests that train: half a million parameters, 32×32 pixels."""
    return ModelConfig(
        prediction_type="v",
        image_size=32,
        scale_factor=0.13025,
        schedule=ScheduleConfig(zero_terminal_snr=True),
        sampling=SamplingConfig(spacing="trailing", zeros_for_empty_prompt=True),
        unet=UNetConfig(
            model_channels=32,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_head_channels=32,
            transformer_depth=(1, 1),
            context_dim=64,
            adm_in_channels=32 + 6 * 8,
            size_channels=8,
        ),
        vae=VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, force_upcast=True),
        text=TextConfig("clip", vocab_size=1024, width=32, layers=2, heads=1, context_layer=1, padding="end"),
        text_2=TextConfig(
            "openclip", 1024, width=32, layers=2, heads=2, context_layer=1, projection=32, padding="zero"
        ),
    )


def tiny_refiner_config() -> ModelConfig:
    """A tiny refiner with eps-prediction: one text encoder, five numbers of size, no attention at the deepest level."""
    return ModelConfig(
        prediction_type="eps",
        image_size=128,
        scale_factor=0.13025,
        unet=UNetConfig(
            model_channels=32,
            attention_resolutions=(4, 2),
            channel_mult=(1, 2, 4, 4),
            num_head_channels=32,
            transformer_depth=2,
            context_dim=64,
            adm_in_channels=64 + 5 * 16,
            size_channels=16,
        ),
        vae=VAE_CONFIG,
        text=OPENCLIP,
    )


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{our name: shape} of every parameter of a model of SDXL's kind."""
    names = {**_named(UNET, _unet(config.unet)), **_named(VAE, _vae(config.vae))}
    for n, text in enumerate(config.texts):
        prefix = TEXT if config.text_2 is None else f"{TEXT}embedders.{n}."
        names |= _named(prefix, _clip(text) if text.variant == "clip" else _openclip(text))
    return names


def random_tensors(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random numbers for all parameters: norms and biases too, lest a mistake hides."""
    rng = np.random.default_rng(seed)
    return {name: _random(rng, name, shape).astype(dtype) for name, shape in parameters(config).items()}


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    numbers = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        return numbers / np.sqrt(np.prod(shape[1:]))
    return 0.1 * numbers + (1 if name.endswith("weight") else 0)


def _named(prefix: str, names: dict) -> dict:
    return {prefix + name: shape for name, shape in names.items()}


def _layer(name: str, out: int, *into: int) -> dict:
    """A layer with weight and bias; a norm where it has no inputs."""
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def _matrix(name: str, out: int, into: int) -> dict:
    return {f"{name}.weight": (out, into)}


def _unet(unet: UNetConfig) -> dict:
    """The blocks in the order of the paper's U: inwards, the middle, outwards."""
    width, time = unet.model_channels, 4 * unet.model_channels
    names = _layer("time_embed.0", time, width) | _layer("time_embed.2", time, time)
    names |= _layer("label_emb.0.0", time, unet.adm_in_channels) | _layer("label_emb.0.2", time, time)
    names |= _layer("input_blocks.0.0", width, unet.in_channels, 3, 3)
    widths, now, block = [width], width, 1
    for level, mult in enumerate(unet.channel_mult):
        for _ in range(unet.num_res_blocks):
            names |= _resnet(f"input_blocks.{block}.0", now, mult * width, time)
            now = mult * width
            names |= _attention(f"input_blocks.{block}.1", unet, level, now)
            widths, block = [*widths, now], block + 1
        if level < len(unet.channel_mult) - 1:
            names |= _layer(f"input_blocks.{block}.0.op", now, now, 3, 3)
            widths, block = [*widths, now], block + 1
    names |= _resnet("middle_block.0", now, now, time) | _resnet("middle_block.2", now, now, time)
    names |= _transformer("middle_block.1", now, unet.transformer_depths[-1], unet.context_dim)
    block = 0
    for level, mult in reversed(list(enumerate(unet.channel_mult))):
        for n in range(unet.num_res_blocks + 1):
            names |= _resnet(f"output_blocks.{block}.0", now + widths.pop(), mult * width, time)
            now = mult * width
            attention = _attention(f"output_blocks.{block}.1", unet, level, now)
            names |= attention
            if level and n == unet.num_res_blocks:
                names |= _layer(f"output_blocks.{block}.{2 if attention else 1}.conv", now, now, 3, 3)
            block += 1
    return names | _layer("out.0", now) | _layer("out.2", unet.out_channels, now, 3, 3)


def _resnet(name: str, into: int, out: int, time: int) -> dict:
    names = _layer(f"{name}.in_layers.0", into) | _layer(f"{name}.in_layers.2", out, into, 3, 3)
    names |= _layer(f"{name}.emb_layers.1", out, time)
    names |= _layer(f"{name}.out_layers.0", out) | _layer(f"{name}.out_layers.3", out, out, 3, 3)
    return names if into == out else names | _layer(f"{name}.skip_connection", out, into, 1, 1)


def _attention(name: str, unet: UNetConfig, level: int, width: int) -> dict:
    if 2**level not in unet.attention_resolutions:
        return {}
    return _transformer(name, width, unet.transformer_depths[level], unet.context_dim)


def _transformer(name: str, width: int, depth: int, context: int) -> dict:
    names = _layer(f"{name}.norm", width)
    for which in ("proj_in", "proj_out"):
        names |= _layer(f"{name}.{which}", width, width)
    for block in (f"{name}.transformer_blocks.{n}" for n in range(depth)):
        for which, into in (("attn1", width), ("attn2", context)):
            names |= _matrix(f"{block}.{which}.to_q", width, width)
            names |= _matrix(f"{block}.{which}.to_k", width, into) | _matrix(f"{block}.{which}.to_v", width, into)
            names |= _layer(f"{block}.{which}.to_out.0", width, width)
        names |= _layer(f"{block}.ff.net.0.proj", 8 * width, width) | _layer(f"{block}.ff.net.2", width, 4 * width)
        for n in (1, 2, 3):
            names |= _layer(f"{block}.norm{n}", width)
    return names


def _vae(vae: VAEConfig) -> dict:
    widths, z = [vae.ch * mult for mult in vae.ch_mult], vae.z_channels
    names = _layer("quant_conv", 2 * vae.embed_dim, 2 * z, 1, 1) | _layer("post_quant_conv", z, vae.embed_dim, 1, 1)
    names |= _layer("encoder.conv_in", vae.ch, vae.in_channels, 3, 3) | _layer("decoder.conv_in", widths[-1], z, 3, 3)
    now, last = vae.ch, len(widths) - 1
    for level, width in enumerate(widths):
        end = "downsample" if level < last else ""
        names |= _vae_level(f"encoder.down.{level}", now, width, vae.num_res_blocks, end)
        now = width
    for level, width in reversed(list(enumerate(widths))):
        names |= _vae_level(f"decoder.up.{level}", now, width, vae.num_res_blocks + 1, "upsample" if level else "")
        now = width
    for half, first, out in (("encoder", widths[-1], 2 * z), ("decoder", widths[0], vae.out_ch)):
        names |= _layer(f"{half}.norm_out", first) | _layer(f"{half}.conv_out", out, first, 3, 3)
        names |= _vae_block(f"{half}.mid.block_1", widths[-1], widths[-1])
        names |= _vae_block(f"{half}.mid.block_2", widths[-1], widths[-1])
        names |= _layer(f"{half}.mid.attn_1.norm", widths[-1])
        for which in ("q", "k", "v", "proj_out"):
            names |= _layer(f"{half}.mid.attn_1.{which}", widths[-1], widths[-1], 1, 1)
    return names


def _vae_level(name: str, into: int, out: int, blocks: int, end: str) -> dict:
    names = _layer(f"{name}.{end}.conv", out, out, 3, 3) if end else {}
    for n in range(blocks):
        names |= _vae_block(f"{name}.block.{n}", out if n else into, out)
    return names


def _vae_block(name: str, into: int, out: int) -> dict:
    names = _layer(f"{name}.norm1", into) | _layer(f"{name}.conv1", out, into, 3, 3)
    names |= _layer(f"{name}.norm2", out) | _layer(f"{name}.conv2", out, out, 3, 3)
    return names if into == out else names | _layer(f"{name}.nin_shortcut", out, into, 1, 1)


def _clip(text: TextConfig) -> dict:
    width, inner = text.width, text.mlp_ratio * text.width
    names = _matrix("embeddings.token_embedding", text.vocab_size, width)
    names |= _matrix("embeddings.position_embedding", text.context_length, width) | _layer("final_layer_norm", width)
    for layer in (f"encoder.layers.{n}" for n in range(text.layers)):
        for which in "qkv":
            names |= _layer(f"{layer}.self_attn.{which}_proj", width, width)
        names |= _layer(f"{layer}.self_attn.out_proj", width, width)
        names |= _layer(f"{layer}.layer_norm1", width) | _layer(f"{layer}.layer_norm2", width)
        names |= _layer(f"{layer}.mlp.fc1", inner, width) | _layer(f"{layer}.mlp.fc2", width, inner)
    return _named("transformer.text_model.", names)


def _openclip(text: TextConfig) -> dict:
    width, inner = text.width, text.mlp_ratio * text.width
    names = _matrix("token_embedding", text.vocab_size, width) | _layer("ln_final", width)
    names |= {"positional_embedding": (text.context_length, width), "text_projection": (width, text.projection)}
    for block in (f"transformer.resblocks.{n}" for n in range(text.layers)):
        names |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        names |= _layer(f"{block}.attn.out_proj", width, width)
        names |= _layer(f"{block}.ln_1", width) | _layer(f"{block}.ln_2", width)
        names |= _layer(f"{block}.mlp.c_fc", inner, width) | _layer(f"{block}.mlp.c_proj", width, inner)
    return _named("model.", names)
