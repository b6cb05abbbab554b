"""The JSON files of a diffusers pipeline: written from a model's config, and read into one.

A model's config is plain data here, the "model" section of a model file. diffusers' networks have options that ours
lack. A folder that uses such an option is refused, with the option's name: its weights would fit, but its pictures
would be wrong.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm.config.model import GROUPS
from ldm.diffusion.prediction import DIFFUSERS_NAMES, own_name
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.files import escaped, quoted
from ldm.text.tokenizer import END, START, Tokenizer, padding_of

INDEX = "model_index.json"
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENS = "scheduler/scheduler_config.json", "tokenizer/special_tokens_map.json"
_SCHEDULE = {  # diffusers' key: the field of ScheduleConfig, and its kind
    "beta_schedule": ("name", "a word"),
    "beta_start": ("beta_start", "a number"),
    "beta_end": ("beta_end", "a number"),
    "num_train_timesteps": ("timesteps", "a whole number"),
    "rescale_betas_zero_snr": ("zero_terminal_snr", "true or false"),
}
_VERSION = "0.31.0"  # of diffusers, whose keys these are
_PAD_TOKENS = {"zero": "!", "end": END}  # "!" has the id 0
_LARGEST = 1 << 20  # the largest whole number that can be a size of a network

log = logging.getLogger(__name__)


# ---- reading ----


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


_KINDS = {
    "a word": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": _is_whole,
    "a number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9,
    "a list of whole numbers": lambda value: isinstance(value, list) and value != [] and all(map(_is_whole, value)),
    "a list of words": lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value),
}


class Table:
    """The table in a JSON file; UserError where the file cannot be read or holds no table."""

    def __init__(self, path: Path):
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or escaped(error)}") from None
        if not isinstance(content, dict):
            raise UserError(f"cannot read {path}: it holds no table")
        self.content = content

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def get(self, key: str, kind: str, default: Any = None) -> Any:
        """The value of a key, or the default where there is none; UserError where it is not of the kind (of _KINDS)."""
        value = self.content.get(key)
        if value is None:
            return default
        if not _KINDS[kind](value):
            raise UserError(f"{self.path}: {key} must be {kind}, not {quoted(value)}")
        return value

    def refusal(self, key: str, wanted: str) -> UserError:
        """The error for a value that the networks here do not support."""
        value = quoted(self.content.get(key))
        return UserError(f"{self.path}: {escaped(key)} is {value}, the networks here have {wanted}")

    def check(self, fixed: dict[str, tuple], read: Iterable[str] = (), strict: bool = True) -> None:
        """UserError where a key has another value than those in `fixed`, or is unknown and has a value.

        The known keys are those in `fixed` and `read`. Without `strict` unknown keys may have any value.
        """
        known = {*fixed, *read}
        for key, value in self.content.items():
            if value is None or key.startswith("_"):
                continue
            if key in fixed and not _is_one_of(value, fixed[key]):
                raise self.refusal(key, " or ".join(map(str, fixed[key])) or "no such thing")
            if strict and key not in known and value is not False:
                raise UserError(f"{self.path}: {quoted(key)} is {quoted(value)}, a choice that is not known here")


def _is_one_of(value: Any, allowed: tuple) -> bool:
    """Whether a value, or each value of a list, is one of `allowed`; 0 and 1 are not False and True."""
    if isinstance(value, list):
        return value != [] and all(not isinstance(each, list) and _is_one_of(each, allowed) for each in value)
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed)


_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
_MIDDLE = "UNetMidBlock2DCrossAttn"
_UNET_FIXED = {  # the values that the UNet here supports; () allows none
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (),
    "down_block_types": _DOWN,
    "downsample_padding": (1,),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (False,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": (_MIDDLE,),
    "norm_eps": (1e-5,),
    "norm_num_groups": (GROUPS,),
    "num_class_embeds": (),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (),
    "time_embedding_act_fn": (),
    "time_embedding_dim": (),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (),
    "up_block_types": _UP,
}
_UNET_READ = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("attention_head_dim", "num_attention_heads", "use_linear_projection", "transformer_layers_per_block"),
    *("sample_size", "upcast_attention"),  # upcast_attention changes the precision only
    *("addition_embed_type_num_heads", "addition_time_embed_dim"),  # options of an embedding that is not there
    *("decay", "inv_gamma", "min_decay", "power", "optimization_step", "update_after_step", "use_ema_warmup"),  # EMA's
)
_VAE_FIXED = {
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "latents_mean": (),
    "latents_std": (),
    "mid_block_add_attention": (True,),
    "norm_num_groups": (GROUPS,),
    "shift_factor": (0,),
    "up_block_types": ("UpDecoderBlock2D",),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_VAE_READ = (
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "scaling_factor"),
    *("sample_size", "force_upcast"),
)
_TEXT_FIXED = {"hidden_act": ("gelu", "quick_gelu"), "layer_norm_eps": (1e-5,)}
_SCHEDULER_FIXED = {"trained_betas": (), "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2")}


def check_unet(table: Table) -> None:
    """UserError where the UNet here does not support a value."""
    table.check(_UNET_FIXED, _UNET_READ)


def check_vae(table: Table) -> None:
    """UserError where the autoencoder here does not support a value."""
    table.check(_VAE_FIXED, _VAE_READ)


def check_text_encoder(table: Table) -> None:
    """UserError where the text encoders here do not support a value."""
    table.check(_TEXT_FIXED, strict=False)  # every version of transformers adds keys


def prediction_type(scheduler: Table) -> str:
    """By our name; an unknown word unchanged."""
    return own_name(scheduler.get("prediction_type", "a word", DIFFUSERS_NAMES["eps"]))


def schedule(scheduler: Table) -> dict:
    """The fields of ScheduleConfig that a scheduler's config tells."""
    scheduler.check(_SCHEDULER_FIXED, strict=False)
    return {ours: scheduler.get(theirs, kind) for theirs, (ours, kind) in _SCHEDULE.items() if theirs in scheduler}


def scale_factor(vae: Table) -> float | None:
    """The latents' scale; None where the config does not tell it."""
    said = vae.get("scaling_factor", "a number")
    return None if said is None else float(said)


def image_size(unet: Table, vae: Table) -> int | None:
    """The pictures' side in pixels; None where the configs do not tell it."""
    side, widths = unet.content.get("sample_size"), vae.get("block_out_channels", "a list of whole numbers")
    return side * 2 ** (len(widths) - 1) if _is_whole(side) and widths and len(widths) < 10 else None


def padding(tokenizer: Table) -> str | None:
    """The padding of short prompts by the folder's tokenizer; None where it does not tell it."""
    said = tokenizer.content.get("pad_token")
    said = said.get("content") if isinstance(said, dict) else said
    return next((way for way, token in _PAD_TOKENS.items() if token == said), None)


def variant(text_encoder: Table) -> str:
    """TextConfig's name of the variant: SD 1.x's encoder has the quick GELU."""
    return "clip" if text_encoder.get("hidden_act", "a word", "quick_gelu") == "quick_gelu" else "openclip"


def model_config(unet: Table, vae: Table, text_encoder: Table, scheduler: Table) -> dict:
    """The whole model's config, the "model" section of a model file."""
    trailing = (
        scheduler.get("timestep_spacing", "a word") == "trailing"
    )  # other values are defaults that nobody has chosen
    scale, size = scale_factor(vae), image_size(unet, vae)
    return {
        "prediction_type": prediction_type(scheduler),
        **({"image_size": size} if size else {}),
        "scale_factor": 0.18215 if scale is None else scale,
        "schedule": schedule(scheduler),
        **({"sampling": {"spacing": "trailing"}} if trailing else {}),
        "unet": _unet_config(unet),
        "vae": _vae_config(vae),
        "text": _text_config(text_encoder),
    }


def _multiples(table: Table) -> tuple[int, list[int]]:
    """(the width of the first level, the widths of all levels as multiples of it)."""
    widths = table.get("block_out_channels", "a list of whole numbers", [320, 640, 1280, 1280])
    if any(width % widths[0] for width in widths):
        raise table.refusal("block_out_channels", "multiples of the first width")
    return widths[0], [width // widths[0] for width in widths]


def _unet_config(table: Table) -> dict:
    width, multiples = _multiples(table)
    levels = len(multiples)
    types = table.get("down_block_types", "a list of words", [*_DOWN[:1] * (levels - 1), _DOWN[1]])
    up_types = table.get("up_block_types", "a list of words", [_UP[_DOWN.index(word)] for word in reversed(types)])
    if len(types) != levels or [_UP[_DOWN.index(word)] for word in reversed(types)] != up_types:
        raise table.refusal("up_block_types", f"{levels} levels, upwards the mirror image of downwards")
    attends = [level for level in range(levels) if types[level] == _DOWN[0]]
    depth = table.content.get("transformer_layers_per_block", 1)
    if isinstance(depth, list) and len(set(map(str, depth))) == 1:
        depth = depth[0]
    if not _is_whole(depth):
        raise table.refusal("transformer_layers_per_block", "one number for all levels")
    return {
        "in_channels": table.get("in_channels", "a whole number", 4),
        "out_channels": table.get("out_channels", "a whole number", 4),
        "model_channels": width,
        "num_res_blocks": table.get("layers_per_block", "a whole number", 2),
        "attention_resolutions": [2**level for level in reversed(attends)],
        "channel_mult": multiples,
        **_heads(table, [width * multiple for multiple in multiples], {*attends, levels - 1}),
        "use_linear_in_transformer": table.get("use_linear_projection", "true or false", False),
        "transformer_depth": depth,
        "context_dim": table.get("cross_attention_dim", "a whole number", 1280),
    }


def _heads(table: Table, widths: list[int], attends: set[int]) -> dict:
    """`num_heads` or `num_head_channels`; diffusers gives the number of heads, of all levels or of each."""
    key = "num_attention_heads" if "num_attention_heads" in table else "attention_head_dim"
    heads = table.content.get(key) or 8
    if _is_whole(heads):
        return {"num_heads": heads, "num_head_channels": None}
    heads = table.get(key, "a list of whole numbers")
    sizes = {widths[n] / heads[n] for n in attends} if len(heads) == len(widths) else set()
    if len(sizes) == 1 and min(sizes).is_integer():
        return {"num_heads": None, "num_head_channels": int(min(sizes))}
    if len(heads) == len(widths) and len({heads[n] for n in attends}) == 1:
        return {"num_heads": heads[-1], "num_head_channels": None}
    raise table.refusal(key, "as many heads at each level, or heads of one width")


def _vae_config(table: Table) -> dict:
    width, multiples = _multiples(table)
    channels = table.get("latent_channels", "a whole number", 4)
    return {
        "in_channels": table.get("in_channels", "a whole number", 3),
        "out_ch": table.get("out_channels", "a whole number", 3),
        "ch": width,
        "ch_mult": multiples,
        "num_res_blocks": table.get("layers_per_block", "a whole number", 1),
        "z_channels": channels,
        "embed_dim": channels,
    }


def _text_config(table: Table) -> dict:
    width = table.get("hidden_size", "a whole number", 512)
    inner = table.get("intermediate_size", "a whole number", 4 * width)
    if inner % width:
        raise table.refusal("intermediate_size", "a multiple of hidden_size there")
    return {
        "variant": variant(table),
        "vocab_size": table.get("vocab_size", "a whole number", 49408),
        "context_length": table.get("max_position_embeddings", "a whole number", 77),
        "width": width,
        "layers": table.get("num_hidden_layers", "a whole number", 12),
        "heads": table.get("num_attention_heads", "a whole number", 8),
        "mlp_ratio": inner // width,
    }


# ---- writing ----


def check_model(model: dict) -> None:
    """UserError where diffusers' networks cannot be those of a config."""
    unet, vae = model["unet"], model["vae"]
    faults = (
        (unet["channel_mult"][0] != 1, f"model.unet.channel_mult begins with {unet['channel_mult'][0]}, not with 1"),
        (vae["ch_mult"][0] != 1, f"model.vae.ch_mult begins with {vae['ch_mult'][0]}, not with 1"),
        (
            vae["z_channels"] != vae["embed_dim"],
            f"model.vae.z_channels {vae['z_channels']} is not model.vae.embed_dim {vae['embed_dim']}",
        ),
    )
    for wrong, words in faults:
        if wrong:
            raise UserError(f"diffusers has no network like this one: {words}; write .safetensors or .ckpt instead")


def files(model: dict) -> dict[str, str]:
    """Every file of a pipeline but the weights, from a model config as plain data."""
    tokenizer, text = _tokenizer(model["text"]), {}
    text["tokenizer/merges.txt"] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer.merges())
    tables = {
        INDEX: _index(),
        UNET: _unet(model),
        VAE: _vae(model),
        TEXT: _text_encoder(model["text"], tokenizer),
        SCHEDULER: _scheduler(model),
        "tokenizer/vocab.json": tokenizer.vocab(),
        "tokenizer/tokenizer_config.json": _tokenizer_config(model["text"]),
        TOKENS: _special_tokens(model["text"]),
    }
    return {**text, **{name: json.dumps(table, indent=2, ensure_ascii=False) + "\n" for name, table in tables.items()}}


def _tokenizer(text: dict) -> Tokenizer:
    return Tokenizer(text["vocab_size"], text["context_length"], padding_of(text["variant"], text.get("padding")))


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
        "norm_num_groups": GROUPS,
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
        "norm_num_groups": GROUPS,
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
        # Not the type of the stored weights: transformers would load in it, diffusers loads the other parts as float32.
        "torch_dtype": "float32",
        "vocab_size": text["vocab_size"],
    }


def _scheduler(model: dict) -> dict:
    schedule, sampling = model["schedule"], model.get("sampling", {})
    spacing = sampling.get("spacing") or schedule.get("spacing")  # where other files say it
    spacing = spacing or SAMPLERS["ddim"].spacing_for(schedule["zero_terminal_snr"])
    if spacing not in ("leading", "trailing"):  # its times between the first and the last would be others
        log.warning("diffusers' DDIM cannot sample with spacing '%s'; the folder says 'trailing'", spacing)
        spacing = "trailing"
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _VERSION,
        **{theirs: schedule[ours] for theirs, (ours, _) in _SCHEDULE.items()},
        "clip_sample": False,
        "prediction_type": DIFFUSERS_NAMES[model["prediction_type"]],
        "set_alpha_to_one": sampling.get("final_sigma") == "zero",
        "steps_offset": 1,
        "timestep_spacing": spacing,
        "trained_betas": None,
    }


def _special_tokens(text: dict) -> dict:
    pad = _PAD_TOKENS[padding_of(text["variant"], text.get("padding"))]
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
