"""MindONE's config files: its class names, key names and option names are known here and nowhere else."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import UserError
from ldm.yaml_file import find_file, nearest, search

log = logging.getLogger(__name__)


class _Keys(NamedTuple):
    """What MindONE's files may say in one section."""

    used: tuple  # translated by from_mindone
    only: dict  # key -> the one value that we can do
    ignored: tuple  # no effect here: decided by run options, by the device, or unused there as well


_KEYS = {
    "model": _Keys(
        used=("params", "prediction_type"),
        only={"target": "ldm.models.diffusion.ddpm.LatentDiffusion"},
        ignored=("base_learning_rate", "name", "version", "pretrained_ckpt"),
    ),
    "model.params": _Keys(
        used=("linear_start", "linear_end", "timesteps", "beta_schedule", "image_size", "scale_factor")
        + ("parameterization", "unet_config", "first_stage_config", "cond_stage_config"),
        only={"conditioning_key": "crossattn", "cond_stage_trainable": False},
        ignored=("num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "channels", "monitor")
        + ("use_ema", "use_fp16"),
    ),
    "model.params.unet_config": _Keys(
        used=("params",), only={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel"}, ignored=()
    ),
    "model.params.unet_config.params": _Keys(
        used=("in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions")
        + ("channel_mult", "num_heads", "num_head_channels", "use_linear_in_transformer", "transformer_depth")
        + ("context_dim", "use_checkpoint", "use_recompute", "dropout"),
        only={"use_spatial_transformer": True},
        ignored=("image_size", "legacy", "use_fp16", "enable_flash_attention", "upcast_attn", "upcast_sigmoid"),
    ),
    "model.params.first_stage_config": _Keys(
        used=("params",), only={"target": "ldm.models.autoencoder.AutoencoderKL"}, ignored=()
    ),
    "model.params.first_stage_config.params": _Keys(
        used=("embed_dim", "ddconfig"), only={}, ignored=("monitor", "use_fp16", "upcast_sigmoid")
    ),
    "model.params.first_stage_config.params.ddconfig": _Keys(
        used=("double_z", "z_channels", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks"),
        only={"attn_resolutions": [], "dropout": 0},
        ignored=("resolution",),
    ),
    "model.params.cond_stage_config": _Keys(
        used=("params",), only={"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}, ignored=()
    ),
    "model.params.cond_stage_config.params": _Keys(
        used=("context_length", "vocab_size", "width", "layers", "heads", "use_quick_gelu"),
        only={"tokenizer_name": "BpeTokenizer"},
        ignored=("version", "output_dim", "epsilon", "use_fp16", "upcast_attn"),
    ),
}
_PREDICTIONS = {"noise": "eps", "velocity": "v"}
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}  # their names are CompVis'


def find_model_file(path: str | Path) -> Path:
    """A model file by its name. MindONE has one for training and one for sampling, here the latter serves both."""
    twin = re.sub(r"-train\.yaml$", "-inference.yaml", str(path))
    if search(path) is None and search(twin) is not None:
        log.warning("there is no %s; %s is read instead, which serves training and sampling", path, twin)
        path = twin
    return find_file(path)


def from_mindone(model: dict) -> dict:
    """Translates the `model` section of one of MindONE's files into that of ours.

    What a file leaves out gets MindONE's default. Raises UserError for unknown keys, for what is not supported here
    and for two prediction types that contradict each other; values are checked by whoever reads the result.
    """
    model = _entries(model, "model")
    params = _entries(model.get("params"), "model.params")
    betas = params.get("beta_schedule", "linear")
    if str(betas) not in _BETAS:
        raise UserError(f"model.params.beta_schedule {betas!r} is not supported here, only {', '.join(_BETAS)}")
    vae = _part(params, "first_stage_config")
    vae.update(_entries(vae.pop("ddconfig", None), "model.params.first_stage_config.params.ddconfig"))
    unet = _unet(_part(params, "unet_config"))
    text = _part(params, "cond_stage_config")
    has_tokenizer = "tokenizer_name" in params["cond_stage_config"].get("params", {})
    return {
        "prediction_type": _prediction_type(model, params),
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
        "text": _text(text, unet.get("context_dim"), has_tokenizer),
    }


def _entries(section: Any, where: str) -> dict:
    """The keys of a section that are to be translated, after a look at all the others."""
    if not isinstance(section, dict):
        raise UserError(f"{where} must be a section with keys of its own, got {section!r}")
    used, only, ignored = _KEYS[where]
    known = [*used, *only, *ignored]
    for key, value in section.items():
        if key not in known:
            near = nearest(key, known)
            raise UserError(f"unknown key '{where}.{key}'; the nearest known key is '{where}.{near}'")
        if key in only and value != only[key]:
            raise UserError(f"{where}.{key}: {value!r} is not supported here, only {only[key]!r}")
    return {key: value for key, value in section.items() if key in used}


def _part(params: dict, name: str) -> dict:
    where = f"model.params.{name}"
    return _entries(_entries(params.get(name), where).get("params", {}), f"{where}.params")


def _prediction_type(model: dict, params: dict) -> str:
    """MindONE samples by one switch and trains by another; here they must agree. Without either it is eps."""
    said = {
        "model.prediction_type": model.get("prediction_type"),
        "model.params.parameterization": params.get("parameterization"),
    }
    said = {path: _PREDICTIONS.get(str(name), name) for path, name in said.items() if name is not None}
    names = list(said.values()) or ["eps"]
    if names[0] != names[-1]:
        both = " and ".join(f"{path} ({name})" for path, name in said.items())
        raise UserError(f"{both} contradict each other: remove the wrong one")
    return names[0]


def _image_size(latent_size: Any, ch_mult: Any) -> int:
    """In pixels; MindONE's is that of the latent."""
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


def _text(text: dict, context_dim: Any, has_tokenizer: bool) -> dict:
    """Older files leave the encoder's sizes out; what the UNet expects then tells SD 1.x from 2.x, ours by default."""
    sd1 = text.get("width", context_dim) == 768
    if sd1 and not has_tokenizer:
        log.warning(
            "the model file names no tokenizer: CLIP's is used, not the Chinese one that MindONE takes then; "
            "give tokenizer_name: BpeTokenizer if that is right"
        )
    quick_gelu = text.pop("use_quick_gelu", sd1)
    sizes = {"width": 768, "layers": 12, "heads": 12} if sd1 else {}
    return {"variant": "clip" if quick_gelu else "openclip", **sizes, **text}


# Options of train_text_to_image.py that have nothing to set here, and why: for `ldm.options.Parser.ignore`.
IGNORED_TRAIN_OPTIONS = {
    "num_workers": "it is for ModelArts",
    "enable_modelarts": "it is for ModelArts",
    "json_data_path": "it is for ModelArts",
    "callback_size": "every step is logged",
    "profile": "there is no profiler",
    "replace_small_images": "images smaller than image_filter_size are left out",
    "filter_small_size": "image_filter_size alone decides",
    "custom_text_encoder": "the text encoder comes with the checkpoint",
    "dataset_sink_mode": "the training loop runs on the host",
    "enable_flash_attention": "the device decides",
    "max_device_memory": "MindSpore decides",
    "log_level": "progress and warnings always show",
    "loss_scale_factor": "the loss scale is doubled and halved",
    "drop_overflow_update": "a step that overflows is never applied",
    "loss_scaler_type": "the loss scale is dynamic",
}
