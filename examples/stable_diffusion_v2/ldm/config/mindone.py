"""Config files of MindONE, and of CompVis and Stability, from which MindONE's descend.

No other module knows their class names, key names and option names.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config.yaml_file import find_file, nearest, search
from ldm.diffusion.prediction import own_name
from ldm.errors import UserError
from ldm.files import escaped, quoted

log = logging.getLogger(__name__)


class _Keys(NamedTuple):
    """The keys of one section of these files."""

    used: tuple  # from_mindone translates them
    only: dict  # key -> the values that are supported here
    ignored: tuple  # without effect here: run options or the device decide, or MindONE does not use them either


_LATENT_DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
_DREAMBOOTH = "ldm.models.diffusion.ddpm.LatentDiffusionDreamBooth"  # another loss; the weights are Stable Diffusion's
_INPAINT = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
_DEPTH = tuple(f"ldm.models.diffusion.ddpm.Latent{name}Diffusion" for name in ("Depth", "Depth2Image"))
_OPEN_CLIP = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"  # Stability's name of SD 2.x's text encoder
_TEXTUAL_INVERSION = "ldm.modules.textual_inversion.text_encoder.FrozenCLIPEmbedder_CLIPTokenizer"
_OPEN_CLIP_LAYERS = {"last": 24, "penultimate": 23}

_KEYS = {
    "model": _Keys(
        used=("params", "prediction_type"),
        only={"target": (_LATENT_DIFFUSION, _DREAMBOOTH, _INPAINT, *_DEPTH)},
        ignored=("base_learning_rate", "name", "version", "pretrained_ckpt"),
    ),
    "model.params": _Keys(
        used=("linear_start", "linear_end", "timesteps", "beta_schedule", "image_size", "scale_factor")
        + ("parameterization", "unet_config", "first_stage_config", "cond_stage_config"),
        only={
            "conditioning_key": ("crossattn", "hybrid"),  # hybrid: something is joined to the latents too
            "cond_stage_trainable": (False,),
            "concat_keys": (["mask", "masked_image"],),
            "masked_image_key": ("masked_image",),
        },
        ignored=("num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "channels", "monitor")
        + ("use_ema", "use_fp16", "prior_loss_weight", "scheduler_config", "personalization_config", "ckpt_path")
        + ("ignore_keys", "load_only_unet", "unet_trainable", "loss_type", "l_simple_weight", "u_cond_percent")
        + ("finetune_keys", "depth_stage_config"),
    ),
    "model.params.unet_config": _Keys(
        used=("params",), only={"target": ("ldm.modules.diffusionmodules.openaimodel.UNetModel",)}, ignored=()
    ),
    "model.params.unet_config.params": _Keys(
        used=("in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions")
        + ("channel_mult", "num_heads", "num_head_channels", "use_linear_in_transformer", "transformer_depth")
        + ("context_dim", "use_checkpoint", "use_recompute", "dropout"),
        only={
            "use_spatial_transformer": (True,),
            "conv_resample": (True,),
            "dims": (2,),
            "use_scale_shift_norm": (False,),
            "resblock_updown": (False,),
            "num_classes": (None,),
            "n_embed": (None,),
        },
        ignored=("image_size", "legacy", "use_fp16", "use_bf16", "enable_flash_attention", "fa_max_head_dim")
        + ("upcast_attn", "upcast_attention", "upcast_sigmoid", "spatial_transformer_attn_type"),
    ),
    "model.params.first_stage_config": _Keys(
        used=("params",), only={"target": ("ldm.models.autoencoder.AutoencoderKL",)}, ignored=()
    ),
    "model.params.first_stage_config.params": _Keys(
        used=("embed_dim", "ddconfig"),
        only={},
        ignored=("monitor", "use_fp16", "upcast_sigmoid", "lossconfig", "ckpt_path", "ignore_keys"),
    ),
    "model.params.first_stage_config.params.ddconfig": _Keys(
        used=("z_channels", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks"),
        only={
            "double_z": (True,),  # the encoder gives a mean and a variance
            "attn_resolutions": ([],),
            "dropout": (0,),
            "attn_type": ("vanilla", "vanilla-xformers"),
        },
        ignored=("resolution",),
    ),
    "model.params.cond_stage_config": _Keys(
        used=("params", "target"),
        only={"target": ("ldm.modules.encoders.modules.FrozenCLIPEmbedder", _TEXTUAL_INVERSION, _OPEN_CLIP)},
        ignored=(),
    ),
    "model.params.cond_stage_config.params": _Keys(
        used=("context_length", "vocab_size", "width", "layers", "heads", "use_quick_gelu", "max_length", "layer"),
        only={"tokenizer_name": ("BpeTokenizer", "CLIPTokenizer"), "arch": ("ViT-H-14",)},
        ignored=("version", "output_dim", "epsilon", "use_fp16", "upcast_attn", "freeze", "device"),
    ),
}
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}  # their names are CompVis'
_BESIDE_MODEL = ("data", "lightning")  # further sections of CompVis' training files
PADDING = "end"  # MindONE's tokenizer fills short prompts up with nothing else
_OPTIMIZERS = {"momentum": "sgd"}  # MindONE has two words for one


def find_model_file(path: str | Path) -> Path:
    """A model file by its name. MindONE has one file for training and one for sampling; here the latter serves both."""
    twin = re.sub(r"-train\.yaml$", "-inference.yaml", str(path))
    if search(path) is None and search(twin) is not None:
        log.warning("there is no %s; %s is read instead, which serves training and sampling", path, twin)
        path = twin
    return find_file(path)


def is_foreign(model: Any) -> bool:
    """Whether a file's `model` section is MindONE's, CompVis' or Stability's."""
    return isinstance(model, dict) and ("target" in model or "params" in model)


def without_training_sections(data: dict) -> dict:
    """A foreign file without the sections that do not describe the model."""
    return {key: value for key, value in data.items() if key not in _BESIDE_MODEL}


def from_mindone(model: dict) -> dict:
    """Translates the `model` section of a foreign file into one of ours.

    A missing key gets MindONE's default. A file that says the prediction type alone is Stable Diffusion 2.x; many
    checkpoints for A1111 have such a file beside them. UserError for unknown keys, for what is not supported here and
    for two prediction types that contradict each other. The reader of the result checks the values.
    """
    is_short = "target" not in model
    model = _entries(model, "model")
    params = _entries(model.get("params"), "model.params")
    prediction = _prediction_type(model, params)
    if is_short and set(params) == {"parameterization"}:
        log.info("the model file says the prediction type alone; the rest is taken from Stable Diffusion 2.x")
        return {"prediction_type": prediction, "image_size": 768 if prediction == "v" else 512}
    betas = params.get("beta_schedule", "linear")
    if str(betas) not in _BETAS:
        raise UserError(f"model.params.beta_schedule {quoted(betas)} is not supported here, only {', '.join(_BETAS)}")
    vae = _part(params, "first_stage_config")
    vae.update(_entries(vae.pop("ddconfig", None), "model.params.first_stage_config.params.ddconfig"))
    unet = _unet(_part(params, "unet_config"))
    return {
        "prediction_type": prediction,
        "image_size": _image_size(params.get("image_size", 64), vae.get("ch_mult")),
        "scale_factor": params.get("scale_factor", 1.0),
        "schedule": {
            "name": _BETAS[betas],
            "beta_start": params.get("linear_start", 1e-4),
            "beta_end": params.get("linear_end", 2e-2),
            "timesteps": params.get("timesteps", 1000),
        },
        "unet": unet,
        "vae": vae,
        "text": _text(params, unet.get("context_dim")),
    }


def _entries(section: Any, where: str) -> dict:
    """A section's keys that `from_mindone` translates; UserError for unknown keys and unsupported values."""
    if not isinstance(section, dict):
        raise UserError(f"{where} must be a section with keys of its own, got {quoted(section)}")
    used, only, ignored = _KEYS[where]
    known = list(dict.fromkeys([*used, *only, *ignored]))
    for key, value in section.items():
        if key not in known:
            path, near = escaped(f"{where}.{key}"), nearest(key, known)
            raise UserError(f"unknown key '{path}'; the nearest known key is '{where}.{near}'")
        if key in only and value not in only[key]:
            choices = " or ".join(map(repr, only[key]))
            raise UserError(f"{where}.{key}: {quoted(value)} is not supported here, only {choices}")
    if section.get("target") == _DREAMBOOTH:
        log.info("a model file of DreamBooth: the model is read, what it says of DreamBooth's loss is not")
    return {key: value for key, value in section.items() if key in used}


def _part(params: dict, name: str) -> dict:
    where = f"model.params.{name}"
    return _entries(_entries(params.get(name), where).get("params", {}), f"{where}.params")


def _prediction_type(model: dict, params: dict) -> Any:
    """MindONE samples by one switch and trains by another. Here both must agree; without them the type is eps."""
    said = {
        "model.prediction_type": model.get("prediction_type"),
        "model.params.parameterization": params.get("parameterization"),
    }
    said = {path: own_name(name) for path, name in said.items() if name is not None}
    names = list(said.values()) or [own_name("noise")]
    if names[0] != names[-1]:
        both = " and ".join(f"{path} ({escaped(name)})" for path, name in said.items())
        raise UserError(f"{both} contradict each other: remove the wrong one")
    return names[0]


def _image_size(latent_size: Any, ch_mult: Any) -> int:
    """The pictures' side in pixels, from MindONE's, which is the latents' side."""
    if not isinstance(latent_size, int) or not isinstance(ch_mult, list):
        raise UserError("model.params.image_size must be a whole number and the autoencoder's ch_mult a list of them")
    return latent_size * 2 ** (len(ch_mult) - 1)


def _unet(unet: dict) -> dict:
    dropout = unet.pop("dropout", 0)
    if dropout:
        log.warning("the dropout of %s in the model file's UNet is ignored: there is none here", dropout)
    recompute = unet.pop("use_recompute", False) or unet.get("use_checkpoint", False)
    given = {key: value for key, value in unet.items() if value != -1}  # -1 heads: not given
    return {"use_linear_in_transformer": False, **given, "use_checkpoint": recompute}


def _text(params: dict, context_dim: Any) -> dict:
    """The text section. Older files leave out the encoder's sizes; then the UNet's context tells SD 1.x from 2.x."""
    text, encoder = _part(params, "cond_stage_config"), params["cond_stage_config"]
    if "max_length" in text:
        text.setdefault("context_length", text.pop("max_length"))
    layer = text.pop("layer", None)
    if encoder.get("target") == _OPEN_CLIP:
        if layer not in (None, *_OPEN_CLIP_LAYERS):
            raise UserError(f"the text encoder's layer {quoted(layer)} is none of {', '.join(_OPEN_CLIP_LAYERS)}")
        return {"variant": "openclip", "layers": _OPEN_CLIP_LAYERS[layer or "last"], **text}
    if layer not in (None, "last"):
        raise UserError(f"layer {quoted(layer)} of SD 1.x's text encoder is not supported here, only 'last'")
    sd1 = text.get("width", context_dim) == 768
    from_compvis = "lossconfig" in params["first_stage_config"].get("params", {})  # MindONE's files have none
    if sd1 and "tokenizer_name" not in encoder.get("params", {}) and not from_compvis:
        log.warning(
            "the model file names no tokenizer: CLIP's is used, not the Chinese one that MindONE takes then; "
            "give tokenizer_name: BpeTokenizer if that is right"
        )
    quick_gelu = text.pop("use_quick_gelu", sd1)
    sizes = {"width": 768, "layers": 12, "heads": 12} if sd1 else {}
    padding = {} if from_compvis or sd1 else {"padding": PADDING}
    return {"variant": "clip" if quick_gelu else "openclip", **sizes, **text, **padding}


def is_placeholder(value: Any) -> bool:
    """Whether a train file's value is a path that the user should have filled in, as in MindONE's files."""
    return isinstance(value, str) and value.startswith("/path/to/") and not os.path.exists(value)


def remarks(values: dict, options: argparse.Namespace) -> list[str]:
    """Warnings about options of a train file of MindONE's that mean something else here.

    Args:
        values: the file's values by option.
        options: the run's options; the command line may have replaced the file's.
    """
    train_file = re.search(r"-train[\w-]*\.yaml$", str(values.get("model_config")))
    theirs = train_file or any(key in IGNORED_TRAIN_OPTIONS for key in values)
    if theirs and getattr(options, "random_crop", False) and getattr(options, "flip", None) is False:
        return ["random_crop mirrors half of the pictures in MindONE, but not here: add --flip True if they may be"]
    return []


def optimizer(word: str) -> str:
    """Our name of an optimizer of MindONE's; other words unchanged. For `type=`."""
    return _OPTIMIZERS.get(word, word)


# Options of train_text_to_image.py without effect here, and why: for `ldm.config.options.Parser.ignore`.
IGNORED_TRAIN_OPTIONS = {
    "lora_fp16": "--dtype says what adapters compute in; files are float32 unless --ckpt_dtype says otherwise",
    "num_workers": "it is for ModelArts",
    "enable_modelarts": "it is for ModelArts",
    "json_data_path": "it is for ModelArts",
    "callback_size": "every step is logged",
    "profile": "there is no profiler",
    "use_recompute": "use_checkpoint in the model's config decides",
    "replace_small_images": "smaller pictures are left out, without others in their place, so an epoch has fewer steps",
    "filter_small_size": "image_filter_size alone decides which pictures are too small; 0 leaves out none",
    "custom_text_encoder": "the text encoder comes with the checkpoint",
    "dataset_sink_mode": "the training loop runs on the host",
    "max_device_memory": "MindSpore decides",
    "log_level": "progress and warnings always show",
    "loss_scale_factor": "the loss scale is doubled and halved",
    "drop_overflow_update": "a step that overflows is never applied",
    "loss_scaler_type": "the loss scale is dynamic",
}

_DREAMBOOTH_ADVICE = "it is DreamBooth's; fine-tune with --data_path, a folder of pictures and img_txt.csv"
_EMBEDDING_ADVICE = "it is textual inversion's; fine-tune the UNet with --data_path, or see --trainable_modules"

# Options of MindONE's other training scripts that would change the training: for `ldm.config.options.Parser.refuse`.
REFUSED_TRAIN_OPTIONS = {
    **dict.fromkeys(
        ("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt", "with_prior_preservation")
        + ("prior_loss_weight", "num_class_images"),
        _DREAMBOOTH_ADVICE,
    ),
    **dict.fromkeys(
        ("placeholder_token", "initializer_token", "learnable_property", "num_vectors", "template_file"),
        _EMBEDDING_ADVICE,
    ),
    "group_lr_scaler": "it is ControlNet's",
    "scale_lr": "multiply start_learning_rate by batch size, accumulation and devices yourself",
    "train_data_repeats": "raise --epochs instead",
}

# Options of MindONE's drawing that would change the pictures: for `ldm.config.options.Parser.refuse`.
REFUSED_DRAW_OPTIONS = {
    "ti_ckpt_path": "embeddings of textual inversion are not read",
}

# Options of MindONE's drawing that have nothing to set here, and why.
IGNORED_DRAW_OPTIONS = {
    "lora_rank": "the adapter's file says it",
    "log_level": "progress and warnings always show",
    "clip_ckpt_path": "--check_safety has another network",
    "safety_version": "--check_safety has another network",
    "lora_ft_unet": "the adapter's file says it",
    "lora_ft_text_encoder": "the adapter's file says it",
}
