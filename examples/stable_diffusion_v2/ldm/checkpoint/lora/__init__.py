"""Low-rank adapters (LoRA, arXiv 2106.09685): read and written in every form, added to weights and taken from them.

An adapter holds two matrices for each layer that it changes. The layer's weight W becomes W + alpha / r * B A. Inside,
a layer is called by its module's name in diffusers or Hugging Face, with its part before it:
``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q``,
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``. ``text_encoder_2`` is SDXL's second text encoder. NumPy
alone; no network is known here.
"""

from ldm.checkpoint.lora.adapter import FORMS, Adapter, Pair
from ldm.checkpoint.lora.merging import check_family, check_type, difference, merged
from ldm.checkpoint.lora.naming import Layout, layout_of, module, parameter
from ldm.checkpoint.lora.reading import is_adapter, load
from ldm.checkpoint.lora.writing import form_of, save

__all__ = [
    "FORMS",
    "Adapter",
    "Layout",
    "Pair",
    "check_family",
    "check_type",
    "difference",
    "form_of",
    "is_adapter",
    "layout_of",
    "load",
    "merged",
    "module",
    "parameter",
    "save",
]
