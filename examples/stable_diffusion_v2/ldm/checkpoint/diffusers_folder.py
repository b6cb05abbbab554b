"""A diffusers pipeline as a folder: parameters in unet/, vae/ and text_encoder/, and the JSON files that describe them.

Read: one file a part or shards with an index, .safetensors before PyTorch's .bin, full precision before variants such
as fp16. Written: .safetensors, and every file that ``StableDiffusionPipeline.from_pretrained`` asks for.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import yaml

from ldm.checkpoint import formats, names
from ldm.checkpoint.arrays import Strings, Tensors
from ldm.errors import UserError
from ldm.text.tokenizer import END, START, Tokenizer

PARTS = ("unet", "vae", "text_encoder")
INDEX = "model_index.json"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SCHEDULE = {  # diffusers' key: the field of ScheduleConfig
    "beta_schedule": "name",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "num_train_timesteps": "timesteps",
    "rescale_betas_zero_snr": "zero_terminal_snr",
}
_TYPE_NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_VERSION = "0.31.0"  # of diffusers, whose keys these are


# ---- reading ----


def read(folder: str | Path, widen: bool = True) -> tuple[Tensors, Strings]:
    """Parameters by Stability's names, and what the folder says of itself; `widen` as in `formats.read`.

    Raises UserError where it is no pipeline, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    if not any((folder / part).is_dir() for part in PARTS):
        raise UserError(f"{folder} is a folder, but no diffusers pipeline: it has none of {'/, '.join(PARTS)}/")
    parts, strings = {}, {}
    for part in PARTS:
        parts[part], said = _read_part(folder / part, widen) if (folder / part).is_dir() else ({}, {})
        strings.update(said if part == "unet" else {})
    tensors = names.from_diffusers(*parts.values(), _text_variant(folder / "text_encoder", parts["text_encoder"]))
    return tensors, {**strings, **_described(folder, strings)}


def _read_part(folder: Path, widen: bool) -> tuple[Tensors, Strings]:
    tensors, strings = {}, {}
    for path in _weight_files(folder):
        new, said, _ = formats.read(path, widen)
        tensors.update(new)
        strings.update(said)
    return tensors, strings


def _weight_files(folder: Path) -> list[Path]:
    """The files that together hold a part: the first kind that is there."""
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16", ".*"):
            for stem in _STEMS:
                whole = sorted(folder.glob(f"{stem}{variant}.{suffix}"))
                index = sorted(folder.glob(f"{stem}.{suffix}.index{variant}.json"))
                if index:
                    return _shards(index[0])
                if whole and "-of-" not in whole[0].name:
                    return whole[:1]
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise UserError(f"{folder} has no weights ({_STEMS[0]}.safetensors or the like) but {there}")


def _shards(index: Path) -> list[Path]:
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(n, str) and n == os.path.basename(n) for n in files.values()):
        raise UserError(f"{index} has no usable weight_map; fetch the file again")
    shards = [index.parent / name for name in sorted(set(files.values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing or not shards:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards (first: {missing[:1]}); fetch them"
        )
    return shards


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it holds no table")
    return content


def _text_variant(folder: Path, tensors: Tensors) -> str:
    """What TextConfig calls it: SD 1.x's encoder has the quick GELU, and 768 values where nothing says so."""
    if (folder / "config.json").is_file():
        return "clip" if _json(folder / "config.json").get("hidden_act", "quick_gelu") == "quick_gelu" else "openclip"
    norm = next((a for name, a in tensors.items() if name.endswith("final_layer_norm.weight")), None)
    return "clip" if norm is not None and norm.shape == (768,) else "openclip"


def _described(folder: Path, strings: Strings) -> Strings:
    """Prediction type and schedule by the scheduler's config, latents' scale and resolution by the networks'."""
    told = {}
    scheduler = folder / "scheduler/scheduler_config.json"
    if scheduler.is_file():
        config = _json(scheduler)
        kind = config.get("prediction_type", "epsilon")
        ours = {theirs: name for name, theirs in _TYPE_NAMES.items()}.get(kind, str(kind))
        if strings.get("prediction_type", ours) != ours:
            raise UserError(
                f"{folder} contradicts itself: its UNet was trained with prediction_type "
                f"'{strings['prediction_type']}', its scheduler_config.json says '{kind}'; correct one of them"
            )
        told["prediction_type"] = ours
        schedule = {ours: config[theirs] for theirs, ours in _SCHEDULE.items() if theirs in config}
        told["schedule"] = json.dumps({**json.loads(strings.get("schedule", "{}")), **schedule})
    vae = folder / "vae/config.json"
    scale = _json(vae).get("scaling_factor") if vae.is_file() else None
    if isinstance(scale, float):
        told["scale_factor"] = repr(scale)
    if (folder / "unet/config.json").is_file() and vae.is_file():
        side, levels = (_json(folder / f"{part}/config.json").get(key) for part, key in _SIZES)
        if isinstance(side, int) and isinstance(levels, list) and levels:
            told["resolution"] = "x".join([str(side * 2 ** (len(levels) - 1))] * 2)
    return told


_SIZES = (("unet", "sample_size"), ("vae", "block_out_channels"))


# ---- writing ----


def write(folder: str | Path, tensors: Tensors, meta: Strings, dtype: str | None = None) -> None:
    """Write a pipeline, whole or not at all, in the place of one that is there; ``meta`` must have ``model_config``.

    Raises UserError where something else is there, or the disk refuses.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / INDEX).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no diffusers pipeline; remove it or give another name")
    if "model_config" not in meta:
        raise UserError(
            "a diffusers folder describes its networks, and the checkpoint does not: give the model's config"
        )
    model = yaml.safe_load(meta["model_config"])["model"]
    parts = names.to_diffusers(tensors)
    partial, old = (folder.with_name(f"{folder.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        for name, content in _files(model).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(content, encoding="utf-8")
        for part, stem in zip(PARTS, (_STEMS[0], _STEMS[0], _STEMS[1])):
            strings = {"format": "pt", **(meta if part == "unet" else {})}
            formats.write(partial / part / f"{stem}.safetensors", parts[part], strings, "safetensors", dtype)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; nothing is left behind") from None
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(partial, ignore_errors=True)


def _files(model: dict) -> dict[str, str]:
    """Every file of a pipeline but the weights, from a model config as plain data."""
    tokenizer, text = _tokenizer(model["text"]), {}
    text["tokenizer/merges.txt"] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer.merges())
    tables = {
        INDEX: _index(),
        "unet/config.json": _unet(model),
        "vae/config.json": _vae(model),
        "text_encoder/config.json": _text_encoder(model["text"], tokenizer),
        "scheduler/scheduler_config.json": _scheduler(model),
        "tokenizer/vocab.json": tokenizer.vocab(),
        "tokenizer/tokenizer_config.json": _tokenizer_config(model["text"]),
        "tokenizer/special_tokens_map.json": _special_tokens(model["text"]),
    }
    return {**text, **{name: json.dumps(table, indent=2, ensure_ascii=False) + "\n" for name, table in tables.items()}}


def _tokenizer(text: dict) -> Tokenizer:
    return Tokenizer(text["vocab_size"], text["context_length"], "zero" if text["variant"] == "openclip" else "end")


def _index() -> dict:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet(model: dict) -> dict:
    unet = model["unet"]
    widths = [mult * unet["model_channels"] for mult in unet["channel_mult"]]
    attends = [2**level in unet["attention_resolutions"] for level in range(len(widths))]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": _VERSION,
        "act_fn": "silu",
        # Named for the width of a head, it is their number: https://github.com/huggingface/diffusers/issues/2011
        "attention_head_dim": unet["num_heads"] or [width // unet["num_head_channels"] for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": unet["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet["in_channels"],
        "layers_per_block": unet["num_res_blocks"],
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": unet["out_channels"],
        "sample_size": model["image_size"] // 2 ** (len(model["vae"]["ch_mult"]) - 1),
        "transformer_layers_per_block": unet["transformer_depth"],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "upcast_attention": unet["use_linear_in_transformer"],  # SD 2.1's scores exceed float16, says its own config
        "use_linear_projection": unet["use_linear_in_transformer"],
    }


def _vae(model: dict) -> dict:
    vae = model["vae"]
    levels = len(vae["ch_mult"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _VERSION,
        "act_fn": "silu",
        "block_out_channels": [mult * vae["ch"] for mult in vae["ch_mult"]],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": vae["in_channels"],
        "latent_channels": vae["z_channels"],
        "layers_per_block": vae["num_res_blocks"],
        "norm_num_groups": 32,
        "out_channels": vae["out_ch"],
        "sample_size": model["image_size"],
        "scaling_factor": model["scale_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_encoder(text: dict, tokenizer: Tokenizer) -> dict:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.start,
        "eos_token_id": tokenizer.end,
        "hidden_act": "gelu" if text["variant"] == "openclip" else "quick_gelu",
        "hidden_size": text["width"],
        "intermediate_size": text["mlp_ratio"] * text["width"],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": text["context_length"],
        "model_type": "clip_text_model",
        "num_attention_heads": text["heads"],
        "num_hidden_layers": text["layers"],
        "pad_token_id": tokenizer.pad,
        "projection_dim": text["width"],
        "vocab_size": text["vocab_size"],
    }


def _scheduler(model: dict) -> dict:
    schedule = model["schedule"]
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _VERSION,
        **{theirs: schedule[ours] for theirs, ours in _SCHEDULE.items()},
        "clip_sample": False,
        "prediction_type": _TYPE_NAMES[model["prediction_type"]],
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": schedule["spacing"],
        "trained_betas": None,
    }


def _special_tokens(text: dict) -> dict:
    pad = "!" if text["variant"] == "openclip" else END
    return {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}


def _tokenizer_config(text: dict) -> dict:
    return {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": text["context_length"],
        "tokenizer_class": "CLIPTokenizer",
        **_special_tokens(text),
    }
