"""The kinds of files with weights, recognised by the names and shapes in them.

``load`` refuses a file that is no part of a model here, with its kind's advice. ``match`` names the kind where a file
does not fit. The names are those of the file, or those that ``ldm.checkpoint.names`` has translated.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from ldm.checkpoint.arrays import Strings, Tensors
from ldm.checkpoint.names import GUIDANCE, LABELS, is_mindone_state
from ldm.parts import PARTS, TEXT, UNET, VAE

RUN_STATE = "train_state"  # the key among the strings of a run's resume state


class Kind(NamedTuple):
    """A kind of file: its name with the article, and advice to the user. With `serves` it is a part of a model."""

    name: str
    advice: str
    serves: bool = False


GIVE_ADAPTER = (
    "give its base model here and the LoRA as --lora_ckpt_path beside it, or add it to its base with "
    "tools/merge_lora.py and give the result"
)
_MERGE = "merge it into its base model first, for instance with fuse_lora of diffusers, and give the merged model"
_WHOLE = "give the whole model's file or folder"
_OTHER = "choose a model of Stable Diffusion 1.x, 2.x or XL"
_CLIP_USE = f"evaluation takes CLIP as --load_checkpoint; to draw or to train, {_WHOLE}"

RUN = Kind("a run's resume state", "give the checkpoint sd-N beside it; to go on with the run, give it to --resume")
TEXTUAL_INVERSION = Kind(
    "a textual inversion (a word's embedding, no model)", "embeddings of words are not read here: give a model"
)
_CONTROLNET = Kind("a ControlNet", "ControlNets are not read here: give the model that it belongs to")
_EDM = Kind("a model of EDM's kind, whose noise and prediction are others", "choose a model that predicts v or eps")
_UNCLIP = Kind("an unCLIP model (variations of pictures)", _OTHER)
_IMAGE_ADAPTER = "image adapters are not read here: give the model that it belongs to"

# The first pattern that any name matches decides.
_BY_NAME = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (
            r"\.(absmax|quant_map|qweight|qzeros|scale_weight|weight_scale)$|scaled_fp8$|\.quant_state\.",
            Kind("a quantised model", "give its file in float32, float16 or bfloat16"),
        ),
        (r"lora_controlnet|^lllite_", _CONTROLNET),
        (
            r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_\w+|boft_\w+)$",
            Kind("a LyCORIS adapter (LoHa, LoKr or OFT)", _MERGE),
        ),
        (r"^lora_\w+\.(lora_(down|up|mid)\.weight|alpha)$", Kind("a LoRA (kohya's names)", GIVE_ADAPTER)),
        (r"^base_model\.model\..+\.lora_\w+", Kind("a LoRA (PEFT's names)", GIVE_ADAPTER)),
        (
            rf"^({re.escape(UNET)}|{re.escape(TEXT)}|conditioner\.).+\.lora_(down|up|A|B)\.",
            Kind("a LoRA (MindONE's names)", GIVE_ADAPTER),
        ),
        (
            r"\.lora_[AB]\.|\.lora\.(down|up)\.|_lora\.(down|up)\.|lora_linear_layer",
            Kind("a LoRA (diffusers' names)", GIVE_ADAPTER),
        ),
        (r"(^|[._])lora[._]", Kind("a LoRA", GIVE_ADAPTER)),
        (r"^edm_(mean|std|vpred\.sigma_(min|max))$", _EDM),
        (r"^string_to_param\b|^emb_params$|^clip_[gl]$", TEXTUAL_INVERSION),
        (r"^control_model\.|(^|\.)(controlnet|controlnet_\w+|input_hint_block|zero_convs)\.", _CONTROLNET),
        (
            r"^(image_proj|image_proj_model|ip_adapter|ip-adapter)\.|\.to_[kv]_ip\.",
            Kind("an IP adapter", _IMAGE_ADAPTER),
        ),
        (r"^(adapter\.)?body\.\d+\.(in_conv|block[12]|resnets|skep|conv1)\b", Kind("a T2I adapter", _IMAGE_ADAPTER)),
        (
            r"motion_modules?\.",
            Kind("a motion module (AnimateDiff)", "moving pictures are not drawn here: give a model"),
        ),
        (r"^(model\.)?conv_first\.|\.(rdb|RDB)1\.conv1\.", Kind("a picture upscaler", _OTHER)),
        (r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.\d", Kind("a model of Flux' kind", _OTHER)),
        (r"(^|\.)(joint_blocks\.\d|context_embedder\.)", Kind("a model of Stable Diffusion 3's kind", _OTHER)),
        (
            rf"^({re.escape(UNET)}|model\.)?(transformer_)?blocks\.\d",
            Kind("a diffusion transformer", _OTHER),
        ),
        (r"^(taesd_)?(en|de)coder\.layers\.\d+\.(conv\.)?(\d|weight)", Kind("a tiny autoencoder (TAESD)", _WHOLE)),
        (r"^(shared|encoder\.embed_tokens)\.weight$|^encoder\.block\.\d", Kind("a T5 text encoder", _WHOLE)),
        (r"^embedder\.model\.visual\.", _UNCLIP),
        (r"^(module\.)?(visual|vision_model|image_encoder)\.", Kind("a CLIP model", _CLIP_USE)),
        (
            r"^(text_model\.)?(embeddings\.token_embedding|encoder\.layers\.0\.self_attn|text_projection)\b"
            r"|^(model\.)?(token_embedding|transformer\.resblocks\.0)\.",
            Kind("a text encoder alone", _WHOLE),
        ),
    )
)

_ADAPTERS = tuple(kind for _, kind in _BY_NAME if kind.advice == GIVE_ADAPTER)

XL = Kind("a model of Stable Diffusion XL", "choose its config, for instance by --version xl or xl-vpred", True)
REFINER = Kind("the refiner of Stable Diffusion XL", "choose its config, for instance by --version xl-refiner", True)
_BY_LABELS = {2816: XL, 2560: REFINER}  # by the width of the vector that is added to the time embedding
_BY_INPUT = {  # by the UNet's input channels, where it has four output channels
    7: "a picture upscaler of Stable Diffusion",
    8: "a model that edits pictures (InstructPix2Pix) or enlarges them",
}
_XL_INPAINTING = Kind("an inpainting model of Stable Diffusion XL", _OTHER)
_CHOOSE = "choose its config, for instance by --version"
_BY_CONTEXT = {  # by the width of a text's features, and the channels into the UNet beside the latents
    (768, 0): Kind("a model of Stable Diffusion 1.x", f"{_CHOOSE} 1.5", True),
    (1024, 0): Kind("a model of Stable Diffusion 2.x", f"{_CHOOSE} 2.1 or 2.1-v", True),
    (768, 5): Kind("an inpainting model of Stable Diffusion 1.x", f"{_CHOOSE} 1.5-inpaint", True),
    (1024, 5): Kind("an inpainting model of Stable Diffusion 2.x", f"{_CHOOSE} 2.0-inpaint", True),
    (1024, 1): Kind("a depth model of Stable Diffusion 2.x", f"{_CHOOSE} 2.0-depth", True),
}
_BESIDE = "it is one part of a model, which wants the rest too"
_ALONE = {
    UNET: Kind("a UNet alone", f"{_BESIDE}: --ckpt_path UNET --pretrained_model_path REST draws with both", True),
    VAE: Kind("an autoencoder alone", f"{_BESIDE}: give it as --vae_path beside a whole model", True),
    TEXT: Kind("a text encoder alone", _BESIDE, True),
}
_CONTEXT = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
_FIRST, _LAST = UNET + "input_blocks.0.0.weight", UNET + "out.2.weight"
_ROWS = "num_vectors"  # MindONE's name for the number of a textual inversion's rows
_MOST_WORDS, _LONGEST_WORD = 8, 256  # words in a textual inversion, rows of a word's embedding
_WIDTHS = (768, 1024, 1280, 2048, 4096)  # values in a row


def recognise(tensors: Tensors, meta: Strings | None = None) -> Kind | None:
    """The kind of a file, by its strings and the names and shapes of its tensors; None where it is unknown."""
    if meta and RUN_STATE in meta:
        return RUN
    if _is_textual_inversion(tensors, meta or {}):
        return TEXTUAL_INVERSION
    for pattern, kind in _BY_NAME:
        if any(map(pattern.search, tensors)):
            return kind
    return _by_shape(tensors) or _part(tensors)


def is_adapter(tensors: Tensors) -> bool:
    """Whether a file of these names is a LoRA; a training state with one in it is none."""
    return recognise(tensors) in _ADAPTERS and not is_mindone_state(tensors)


def _is_textual_inversion(tensors: Tensors, meta: Strings) -> bool:
    """Whether a file holds only some rows of an embedding, by the name of a word or with the number of its rows."""
    rows = [array for name, array in tensors.items() if name != _ROWS]
    if not 0 < len(rows) <= _MOST_WORDS:
        return False
    named = "placeholder_token" in meta or _ROWS in tensors
    layers = any(name.endswith((".weight", ".bias", ".gamma", ".beta")) for name in tensors)
    shapes = [np.shape(array) for array in rows]
    embeddings = all(shape[-1:] and shape[-1] in _WIDTHS for shape in shapes)
    few = all(len(shape) == 1 or (len(shape) == 2 and shape[0] <= _LONGEST_WORD) for shape in shapes)
    return embeddings and few and (named or not layers)


def _by_shape(tensors: Tensors) -> Kind | None:
    """The kind of a relative of Stable Diffusion, whose UNet has other inputs."""
    into, out = _shape(tensors, _FIRST), _shape(tensors, _LAST)
    if len(into) == 4 and out[:1] == (4,) and into[1] in _BY_INPUT:
        return Kind(f"{_BY_INPUT[into[1]]} ({into[1]} channels go into its UNet)", _OTHER)
    labels, keys = _shape(tensors, LABELS), _shape(tensors, _CONTEXT)
    if labels and out[:1] == (4,) and into[1:2] == (9,):
        return _XL_INPAINTING
    if labels and labels[-1] not in _BY_LABELS and keys[1:] == (1024,):
        return _UNCLIP
    return None


def _part(tensors: Tensors) -> Kind | None:
    """The kind of a part of a model, or of a whole model of a known width."""
    there = [prefix for prefix in PARTS if any(name.startswith(prefix) for name in tensors)]
    if len(there) == 1:
        return _ALONE[there[0]]
    return of_unet(tensors) if len(there) == len(PARTS) else None


def of_unet(tensors: Tensors) -> Kind | None:
    """The kind of the model that a UNet is of, by its widths; None where it is unknown, or there is no UNet."""
    labels, keys = _shape(tensors, LABELS), _shape(tensors, _CONTEXT)
    if labels:
        return _BY_LABELS.get(labels[-1])
    return _BY_CONTEXT.get((keys[1], joined_channels(tensors) or 0)) if len(keys) == 2 else None


def label_width(tensors: Tensors) -> int | None:
    """The width of the vector that a UNet takes beside time and texts, 0 where it takes none; None without a UNet."""
    labels = _shape(tensors, LABELS)
    if labels:
        return labels[-1]
    return 0 if _FIRST in tensors else None


def joined_channels(tensors: Tensors) -> int | None:
    """How many channels go into a UNet beside the latents, which come out of it; None without a UNet."""
    into, out = _shape(tensors, _FIRST), _shape(tensors, _LAST)
    return into[1] - out[0] if len(into) == 4 and out else None


def _shape(tensors: Tensors, *names: str) -> tuple[int, ...]:
    """The shape of the first of these tensors that is there; () where none is."""
    return next((np.shape(tensors[name]) for name in names if name in tensors), ())


# Sizes in a model's config that a shape shows: section, key, tensors (the first that is there counts), axis.
_ONE, _TWO = (TEXT, TEXT + "embedders.0."), (TEXT + "embedders.1.",)  # the first text encoder, and SDXL's second


def _of_encoder(prefixes: tuple[str, ...], openclip: str, clip: str) -> tuple[str, ...]:
    """The names of a text encoder's tensor, of whatever variant it is."""
    return tuple(
        prefix + name for prefix in prefixes for name in (f"model.{openclip}", f"transformer.text_model.{clip}")
    )


def _text_sizes(section: str, prefixes: tuple[str, ...]) -> tuple[tuple, ...]:
    tokens = _of_encoder(prefixes, "token_embedding.weight", "embeddings.token_embedding.weight")
    positions = _of_encoder(prefixes, "positional_embedding", "embeddings.position_embedding.weight")
    return (
        (section, "vocab_size", tokens, 0),
        (section, "width", tokens, 1),
        (section, "context_length", positions, 0),
        (section, "projection", tuple(f"{prefix}model.text_projection" for prefix in prefixes), 1),
    )


_SIZES = (
    ("unet", "model_channels", (_FIRST,), 0),
    ("unet", "in_channels", (_FIRST,), 1),
    ("unet", "out_channels", (_LAST,), 0),
    ("unet", "context_dim", (_CONTEXT,), 1),
    ("unet", "adm_in_channels", (LABELS,), 1),
    ("unet", "time_cond_proj_dim", (GUIDANCE,), 1),
    ("vae", "ch", (VAE + "encoder.conv_in.weight",), 0),
    ("vae", "z_channels", (VAE + "post_quant_conv.weight",), 0),
    ("vae", "embed_dim", (VAE + "post_quant_conv.weight",), 1),
    *_text_sizes("text", _ONE),
    *_text_sizes("text_2", _TWO),
)


def contradiction(tensors: Tensors, model: dict) -> str | None:
    """A phrase for the first size in a model's config (plain data) that the shapes contradict; None where none does."""
    for section, key, names, axis in _SIZES:
        said, shape = (model.get(section) or {}).get(key), _shape(tensors, *names)
        if said is not None and len(shape) > axis and shape[axis] != said:
            return f"model.{section}.{key} is {said}, the weights have {shape[axis]}"
    return None
