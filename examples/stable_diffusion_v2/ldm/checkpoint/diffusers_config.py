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
UNET, VAE, TEXT, TEXT_2 = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2"))
SCHEDULER = "scheduler/scheduler_config.json"
TOKENS = ("special_tokens_map.json", "tokenizer_config.json")  # that say the padding; transformers 5 writes the second
_SCHEDULE = {  # diffusers' key: the field of ScheduleConfig, and its kind
    "beta_schedule": ("name", "a word"),
    "beta_start": ("beta_start", "a number"),
    "beta_end": ("beta_end", "a number"),
    "num_train_timesteps": ("timesteps", "a whole number"),
    "rescale_betas_zero_snr": ("zero_terminal_snr", "true or false"),
}
_GUIDANCE = "time_cond_proj_dim"  # the width of the embedded guidance scale; ours is named alike
_ZEROS = "force_zeros_for_empty_prompt"
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
    "addition_embed_type": ("text_time",),
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
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (),
    "time_embedding_dim": (),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (),
    "up_block_types": _UP,
}
_UNET_READ = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("attention_head_dim", "num_attention_heads", "use_linear_projection", "transformer_layers_per_block"),
    *("sample_size", _GUIDANCE, "upcast_attention"),  # upcast_attention changes the precision only
    *("addition_embed_type_num_heads", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
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
    if not is_xl(table) and "projection_class_embeddings_input_dim" in table:
        raise table.refusal("projection_class_embeddings_input_dim", "it with addition_embed_type text_time alone")


def check_vae(table: Table) -> None:
    """UserError where the autoencoder here does not support a value."""
    table.check(_VAE_FIXED, _VAE_READ)


def check_text_encoder(table: Table) -> None:
    """UserError where the text encoders here do not support a value."""
    table.check(_TEXT_FIXED, strict=False)  # every version of transformers adds keys


def is_xl(unet: Table) -> bool:
    """Whether the UNet is told of the pooled text and of sizes, as SDXL's."""
    return "addition_embed_type" in unet


def prediction_type(scheduler: Table) -> str:
    """By our name; an unknown word unchanged."""
    return own_name(scheduler.get("prediction_type", "a word", DIFFUSERS_NAMES["eps"]))


def schedule(scheduler: Table) -> dict:
    """The fields of ScheduleConfig that a scheduler's config tells."""
    scheduler.check(_SCHEDULER_FIXED, strict=False)
    if scheduler.get("_class_name", "a word", "").startswith("EDM"):
        raise scheduler.refusal("_class_name", "no schedule of EDM's kind")
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


def model_config(unet: Table, vae: Table, texts: list[Table], scheduler: Table, index: Table | None = None) -> dict:
    """The whole model's config, the "model" section of a model file.

    `texts` are the text encoders' configs, the first one first; `index` is the pipeline's own file.
    """
    scale, size, xl = scale_factor(vae), image_size(unet, vae), is_xl(unet)
    encoders = [_text_config(table, xl, last=n == len(texts) - 1) for n, table in enumerate(texts)]
    sampling = _sampling_config(scheduler, index if xl else None)
    return {
        "prediction_type": prediction_type(scheduler),
        **({"image_size": size} if size else {}),
        "scale_factor": 0.18215 if scale is None else scale,
        "schedule": schedule(scheduler),
        **({"sampling": sampling} if sampling else {}),
        "unet": _unet_config(unet),
        "vae": _vae_config(vae, xl),
        **dict(zip(("text", "text_2"), encoders)),
    }


def _sampling_config(scheduler: Table, index: Table | None) -> dict:
    told = {}
    if scheduler.get("timestep_spacing", "a word") == "trailing":  # others are defaults that nobody has chosen
        told["spacing"] = "trailing"
    if index is not None:
        told["zeros_for_empty_prompt"] = index.get(_ZEROS, "true or false", True)
    return told


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
    return {
        "in_channels": table.get("in_channels", "a whole number", 4),
        "out_channels": table.get("out_channels", "a whole number", 4),
        "model_channels": width,
        "num_res_blocks": table.get("layers_per_block", "a whole number", 2),
        "attention_resolutions": [2**level for level in reversed(attends)],
        "channel_mult": multiples,
        **_heads(table, [width * multiple for multiple in multiples], {*attends, levels - 1}),
        "use_linear_in_transformer": table.get("use_linear_projection", "true or false", False),
        "transformer_depth": _depth(table, levels),
        "context_dim": table.get("cross_attention_dim", "a whole number", 1280),
        **(_vector(table) if is_xl(table) else {}),
        **({_GUIDANCE: table.get(_GUIDANCE, "a whole number")} if _GUIDANCE in table else {}),
    }


def _depth(table: Table, levels: int) -> int | list[int]:
    """The number of blocks in a transformer: of all levels, or of each."""
    depth = table.content.get("transformer_layers_per_block", 1)
    if isinstance(depth, list) and len(depth) == levels and all(map(_is_whole, depth)):
        return depth if len(set(depth)) > 1 else depth[0]
    if not _is_whole(depth):
        raise table.refusal("transformer_layers_per_block", "one number for all levels, or one for each")
    return depth


def _vector(table: Table) -> dict:
    """What makes the vector that is added to the time embedding."""
    keys = {"adm_in_channels": "projection_class_embeddings_input_dim", "size_channels": "addition_time_embed_dim"}
    told = {ours: table.get(theirs, "a whole number") for ours, theirs in keys.items()}
    missing = [theirs for ours, theirs in keys.items() if told[ours] is None]
    if missing:
        raise UserError(f"{table.path}: {missing[0]} is missing, though addition_embed_type is text_time")
    return told


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


def _vae_config(table: Table, xl: bool) -> dict:
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
        # diffusers writes its default for SD too, and heeds it for SDXL alone
        **({"force_upcast": table.get("force_upcast", "true or false", True)} if xl else {}),
    }


def _text_config(table: Table, xl: bool, last: bool) -> dict:
    width = table.get("hidden_size", "a whole number", 512)
    inner = table.get("intermediate_size", "a whole number", 4 * width)
    if inner % width:
        raise table.refusal("intermediate_size", "a multiple of hidden_size there")
    layers = table.get("num_hidden_layers", "a whole number", 12)
    return {
        "variant": variant(table),
        "vocab_size": table.get("vocab_size", "a whole number", 49408),
        "context_length": table.get("max_position_embeddings", "a whole number", 77),
        "width": width,
        "layers": layers,
        "heads": table.get("num_attention_heads", "a whole number", 8),
        "mlp_ratio": inner // width,
        **({"context_layer": layers - 1} if xl else {}),  # diffusers reads SDXL's encoders before their last layer
        **({"projection": table.get("projection_dim", "a whole number", 512)} if xl and last else {}),
    }


# ---- writing ----


def text_parts(model: dict) -> dict[str, dict]:
    """{diffusers' part: config} of a model's text encoders. SDXL's refiner has the second one alone."""
    if model.get("text_2"):
        return {"text_encoder": model["text"], "text_encoder_2": model["text_2"]}
    return {"text_encoder_2" if model["unet"].get("adm_in_channels") else "text_encoder": model["text"]}


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
        *_text_faults(model),
    )
    for wrong, words in faults:
        if wrong:
            raise UserError(f"diffusers has no network like this one: {words}; write .safetensors or .ckpt instead")


def _text_faults(model: dict) -> list[tuple[bool, str]]:
    """(whether it is so, words) for what a config's text encoders may have and diffusers' may not."""
    parts, faults = text_parts(model), []
    xl = "text_encoder_2" in parts
    if xl:
        pooled = parts["text_encoder_2"]
        faults.append((not pooled.get("projection"), "its last text encoder has no projection"))
        faults.append((pooled["variant"] != "openclip", "the text encoder with the projection is no openclip"))
    for text in parts.values():
        layer, wanted = text.get("context_layer"), text["layers"] - 1 if xl else None
        words = f"a text encoder's context_layer is {layer}, and diffusers' is {wanted} of its {text['layers']}"
        faults.append((layer != wanted, words))
    return faults


def files(model: dict) -> dict[str, str]:
    """Every file of a pipeline but the weights, from a model config as plain data."""
    tables = {INDEX: _index(model), UNET: _unet(model), VAE: _vae(model), SCHEDULER: _scheduler(model)}
    plain = {}
    for part, text in text_parts(model).items():
        tokenizer, place = _tokenizer(text), part.replace("text_encoder", "tokenizer")
        plain[f"{place}/merges.txt"] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer.merges())
        tables[f"{part}/config.json"] = _text_encoder(text, tokenizer)
        tables[f"{place}/vocab.json"] = tokenizer.vocab()
        tables[f"{place}/{TOKENS[0]}"] = _special_tokens(text)
        tables[f"{place}/{TOKENS[1]}"] = _tokenizer_config(text)
    written = {name: json.dumps(table, indent=2, ensure_ascii=False) + "\n" for name, table in tables.items()}
    return {**plain, **written}


def _tokenizer(text: dict) -> Tokenizer:
    return Tokenizer(text["vocab_size"], text["context_length"], padding_of(text["variant"], text.get("padding")))


def _index(model: dict) -> dict:
    parts = text_parts(model)
    there = "text_encoder" in parts
    joined = model["unet"]["in_channels"] - model["unet"]["out_channels"]
    kind = {0: "", 1: "Depth2Img"}.get(joined, "Inpaint")
    table = {
        "_class_name": f"StableDiffusion{kind}Pipeline",
        "_diffusers_version": _VERSION,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"] if there else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if there else [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if "text_encoder_2" in parts:
        table |= _xl_index(model)
    elif joined == 1:
        table |= {"depth_estimator": [None, None]}
    else:
        table |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    return dict(sorted(table.items()))


def _xl_index(model: dict) -> dict:
    """What the index of SDXL has beside that of SD, or instead of it."""
    refiner = _is_refiner(model)
    return {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        _ZEROS: bool(model.get("sampling", {}).get("zeros_for_empty_prompt")),
        **({"requires_aesthetics_score": True} if refiner else {}),
    }


def _is_refiner(model: dict) -> bool:
    """Whether the UNet is told of five numbers, of which the last one is the aesthetic score."""
    unet, pooled = model["unet"], text_parts(model)["text_encoder_2"]["projection"]
    return unet["adm_in_channels"] - pooled == 5 * unet["size_channels"]


def _unet(model: dict) -> dict:
    unet = model["unet"]
    widths = [mult * unet["model_channels"] for mult in unet["channel_mult"]]
    xl = bool(unet.get("adm_in_channels"))
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
        # The scores of SD 2.1 exceed float16, says its own config; those of SDXL do not.
        "upcast_attention": unet["use_linear_in_transformer"] and not xl,
        "use_linear_projection": unet["use_linear_in_transformer"],
        **({_GUIDANCE: unet[_GUIDANCE]} if unet.get(_GUIDANCE) else {}),
        **(_addition(unet) if xl else {}),
    }


def _addition(unet: dict) -> dict:
    """What is added to the time embedding of SDXL."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": unet["size_channels"],
        "projection_class_embeddings_input_dim": unet["adm_in_channels"],
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
        **({"force_upcast": vae["force_upcast"]} if model["unet"].get("adm_in_channels") else {}),
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
        "architectures": ["CLIPTextModelWithProjection" if text.get("projection") else "CLIPTextModel"],
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
        "projection_dim": text.get("projection") or text["width"],
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
