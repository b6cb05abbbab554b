"""The tiny SDXL of tests/tiny_sdxl.py by diffusers and transformers, with random weights.

Their configs are in data/reference/tiny_sdxl.json, as diffusers itself writes them.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers
from reference import with_random_vectors

TABLES = json.loads((Path(__file__).parents[1] / "data/reference/tiny_sdxl.json").read_text())
REFINER = {
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 64 + 5 * 16,
    "block_out_channels": [32, 64, 128, 128],
    "attention_head_dim": [1, 2, 4, 4],
    "cross_attention_dim": 64,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 2,
}


def networks(refiner: bool = False) -> dict[str, torch.nn.Module]:
    """{name of the part: network}; every weight is random, norms and biases too. The refiner has one text encoder."""
    torch.manual_seed(0)
    text_classes = {
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    parts = {
        "unet": diffusers.UNet2DConditionModel(**{**TABLES["unet"], **(REFINER if refiner else {})}),
        "vae": diffusers.AutoencoderKL(**TABLES["vae"]),
        **{
            part: cls(transformers.CLIPTextConfig(**TABLES[part]))
            for part, cls in text_classes.items()
            if part == "text_encoder_2" or not refiner
        },
    }
    with_random_vectors(*parts.values())
    return parts


def pipeline(tokenizers: str | Path, refiner: bool = False) -> diffusers.DiffusionPipeline:
    """Their whole pipeline, with the tokenizers of a folder that holds tokenizer/ and tokenizer_2/."""
    parts = networks(refiner)
    for name in ("tokenizer", "tokenizer_2"):
        there = (Path(tokenizers) / name).is_dir()
        parts[name] = transformers.CLIPTokenizer.from_pretrained(Path(tokenizers) / name) if there else None
    parts["scheduler"] = diffusers.DDIMScheduler(**TABLES["scheduler"])
    if refiner:
        cls, words = (
            diffusers.StableDiffusionXLImg2ImgPipeline,
            {"requires_aesthetics_score": True, "text_encoder": None},
        )
    else:
        cls, words = diffusers.StableDiffusionXLPipeline, {}
    return cls(**parts, **words, force_zeros_for_empty_prompt=not refiner)
