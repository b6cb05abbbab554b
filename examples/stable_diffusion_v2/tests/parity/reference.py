"""The networks of Stable Diffusion by diffusers and transformers, for our model configs, with random weights.

FULL_SIZE=1.5,2.1,2.1-v in the environment adds the published models at full size (some 20 GiB of memory, minutes).
"""

from __future__ import annotations

import os

import diffusers
import numpy as np
import torch
import transformers

from ldm.config.model import ModelConfig, TextConfig, UNetConfig, VAEConfig, load_model_config
from ldm.config.versions import VERSIONS

THEIR_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def narrow(variant: str, context_dim: int, num_heads=None, num_head_channels=None) -> ModelConfig:
    """All kinds of layers at small width; diffusers' single-file reader tells SD 1.x from 2.x by context_dim."""
    return ModelConfig(
        prediction_type="v",
        image_size=128,
        unet=UNetConfig(
            model_channels=64,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_linear_in_transformer=num_heads is None,
            context_dim=context_dim,
        ),
        vae=VAEConfig(ch=32),
        text=TextConfig(variant=variant, vocab_size=2048, width=context_dim, layers=2, heads=context_dim // 64),
    )


CONFIGS = {
    "sd1": narrow("clip", 768, num_heads=4),
    "sd2": narrow("openclip", 1024, num_head_channels=32),
    **{v: load_model_config(VERSIONS[v].config) for v in os.environ.get("FULL_SIZE", "").split(",") if v},
}


def reference(config: ModelConfig) -> tuple:
    """The same networks by diffusers and transformers, every weight random: norms and biases too."""
    torch.manual_seed(0)
    unet, vae, text = config.unet, config.vae, config.text
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attending = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    heads = unet.num_heads or [width // unet.num_head_channels for width in widths]
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=attending,
        up_block_types=[name.replace("Down", "Up") for name in reversed(attending)],
        cross_attention_dim=unet.context_dim,
        attention_head_dim=heads,
        use_linear_projection=unet.use_linear_in_transformer,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[vae.ch * mult for mult in vae.ch_mult],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    text_model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            projection_dim=text.width,
            hidden_act="quick_gelu" if text.variant == "clip" else "gelu",
            bos_token_id=text.vocab_size - 2,
            eos_token_id=text.vocab_size - 1,
        )
    )
    return with_random_vectors(unet, vae, text_model)


def with_random_vectors(*networks: torch.nn.Module) -> tuple:
    networks = tuple(network.eval() for network in networks)
    for network in networks:
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return networks


def states(networks: tuple) -> list[dict[str, np.ndarray]]:
    """Parameters and buffers by diffusers' names, a table per network."""
    return [{name: tensor.numpy() for name, tensor in network.state_dict().items()} for network in networks]


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
