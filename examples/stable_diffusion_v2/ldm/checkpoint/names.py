"""The names that each project gives to the same parameters. Ours are those of Stability's files of SD 1.x and 2.x.

* Stable Diffusion XL: its single files begin the names of text encoders with ``conditioner.embedders.N.``. Here they
  begin with ``parts.TEXT`` as all others do: those of the base's two encoders go on with ``embedders.N.``, those of the
  refiner's one encoder as those of SD 2.x.
* MindONE (MindSpore ``.ckpt``): two ordered lists of name patterns, read in either direction, one of them for SDXL.
* SD 1.x text encoders (Hugging Face's names, three projections) and SD 2.x ones (OpenCLIP's names, one ``in_proj``) are
  the same network; MindONE writes both with OpenCLIP's names.
* diffusers' folders: Stability counts the blocks, diffusers numbers them by level and place. The table is built for the
  network's depth, from the UNet of CompVis (https://github.com/CompVis/latent-diffusion, openaimodel.py) and the
  autoencoder beside it. Any width, depth and choice of attention levels is possible.

Names that no rule knows stay as they are; ``ldm.checkpoint.match`` reports them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ldm.checkpoint.arrays import widened
from ldm.errors import UserError
from ldm.files import escaped
from ldm.parts import TEXT, UNET, VAE

Tensors = dict[str, np.ndarray]

_OPENCLIP, _CLIP = TEXT + "model.", TEXT + "transformer.text_model."  # the text encoder of SD 2.x, of SD 1.x
_MINDONE_TEXT = TEXT + "transformer."
_PROJECTION = "text_projection"  # of OpenCLIP's encoder, [width, projection]; Hugging Face has its transpose
GUIDANCE = UNET + "guidance_embed.weight"  # of a distilled UNet that is told the guidance scale; the name is ours
LABELS = UNET + "label_emb.0.0.weight"  # the first layer of what a UNet is told beside texts: of SDXL and unCLIP
# The same prefixes in regular expressions.
_RE_UNET, _RE_VAE, _RE_TEXT, _RE_OPENCLIP, _RE_CLIP = map(re.escape, (UNET, VAE, TEXT, _OPENCLIP, _CLIP))
_RE_ENCODER = _RE_TEXT + r"(?:embedders\.[01]\.)?"
_RE_ANY_OPENCLIP, _RE_ANY_CLIP = _RE_ENCODER + r"model\.", _RE_ENCODER + r"transformer\.text_model\."

# Entries of SD files that no network here has.
EXTRAS = re.compile(
    "|".join(
        (
            r"model_ema\..*",  # a second copy of the UNet, which is not used
            r"betas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod",  # the noise schedule
            r"sqrt_recip(m1)?_alphas_cumprod|posterior_.*|lvlb_weights|logvar|scale_factor",
            _RE_TEXT + r".*(logit_scale|text_projection(\.weight)?|position_ids|attn_mask)",  # CLIP's other half
            _RE_OPENCLIP + r"transformer\.resblocks\.23\..*",  # SD 2.x stops at the layer before the last
            r"depth_model\..*",  # the network that finds depths in pictures, in Stability's depth model
            r"denoiser\.sigmas",  # the schedule in files of Stability's generative-models
            rf"({_RE_VAE})?loss\..*",  # the autoencoder's discriminator
            r"epoch_num|step_num|global_step|learning_rate|loss_scale",  # MindSpore's training loop
        )
    )
)


_SD2_BLOCKS = 24  # in the text encoder of SD 2.x' files; the last block does not run and is one of EXTRAS


def is_extra(name: str) -> bool:
    """Whether a name is that of an entry of SD files that no network here has."""
    return EXTRAS.fullmatch(name) is not None


_WB = r"\.(weight|bias)"
_UNET_BLOCK = (
    r"(in_layers\.[02]|emb_layers\.1|out_layers\.[03]|skip_connection|op|conv|norm|proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2)|norm[123]))" + _WB
)
_VAE_BLOCK = r"(norm1|conv1|norm2|conv2|nin_shortcut)" + _WB
# Every name that a network here can have, in Stability's naming.
_PARAMETER = re.compile(
    "|".join(
        (
            _RE_UNET + r"(time_embed\.[02]|label_emb\.0\.[02]|input_blocks\.0\.0|out\.[02])" + _WB,
            re.escape(GUIDANCE),
            _RE_UNET + r"((in|out)put_blocks\.\d+|middle_block)\.\d\." + _UNET_BLOCK,
            _RE_VAE + r"((post_)?quant_conv|(en|de)coder\.(conv_in|conv_out|norm_out))" + _WB,
            _RE_VAE + r"(en|de)coder\.(mid\.block_[12]|(down|up)\.\d+\.block\.\d+)\." + _VAE_BLOCK,
            _RE_VAE + r"(en|de)coder\.mid\.attn_1\.(norm|q|k|v|proj_out)" + _WB,
            _RE_VAE + r"(encoder\.down\.\d+\.downsample|decoder\.up\.\d+\.upsample)\.conv" + _WB,
            _RE_ANY_OPENCLIP
            + r"(token_embedding\.weight|positional_embedding|text_projection|ln_final\.(weight|bias))",
            _RE_ANY_OPENCLIP + r"transformer\.resblocks\.\d+\.(ln_[12]|mlp\.c_(fc|proj)|attn\.out_proj)" + _WB,
            _RE_ANY_OPENCLIP + r"transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias)",
            _RE_ANY_CLIP + r"embeddings\.(token|position)_embedding\.weight",
            _RE_ANY_CLIP + r"final_layer_norm" + _WB,
            _RE_ANY_CLIP + r"encoder\.layers\.\d+\."
            r"(layer_norm[12]|mlp\.fc[12]|self_attn\.([qkv]|out)_proj)" + _WB,
        )
    )
)


def is_parameter(name: str) -> bool:
    """Whether a network here can have a parameter of this name, with some config."""
    return _PARAMETER.fullmatch(name) is not None


class Rules:
    """Pairs of name patterns, which translate in either direction; the first pair that fits decides.

    In a pattern ``{path}`` is any text, ``{i}`` and ``{j}`` are numbers, ``{leaf}`` is weight or bias, ``{norm}`` is
    weight or bias on the left and gamma or beta on the right, ``{fc}`` is c_fc or c_proj, ``{kind}`` is the end of a
    norm's name.
    """

    _TOKENS = {
        "path": ".+",
        "i": r"\d+",
        "j": r"\d+",
        "leaf": "weight|bias",
        "norm": "weight|bias|gamma|beta",
        "fc": "c_fc|c_proj",
        "kind": r"\d|_out|",
    }
    _GAMMA = {"weight": "gamma", "bias": "beta"}
    _WEIGHT = {"gamma": "weight", "beta": "bias"}

    def __init__(self, *pairs: tuple[str, str]):
        self._to_right = [(self._compile(left), right) for left, right in pairs]
        self._to_left = [(self._compile(right), left) for left, right in pairs]

    def to_right(self, name: str) -> str:
        """The right-hand name for a left-hand name; any other name stays as it is."""
        return self._translate(self._to_right, self._GAMMA, name)

    def to_left(self, name: str) -> str:
        """The left-hand name for a right-hand name; any other name stays as it is."""
        return self._translate(self._to_left, self._WEIGHT, name)

    def _compile(self, pattern: str) -> re.Pattern:
        parts = re.split(r"\{(\w+)\}", pattern)  # text, token, text, token, ..., text
        parts[::2] = [re.escape(text) for text in parts[::2]]
        parts[1::2] = [f"(?P<{token}>{self._TOKENS[token]})" for token in parts[1::2]]
        return re.compile("".join(parts))

    @staticmethod
    def _translate(rules: list, norms: dict[str, str], name: str) -> str:
        for pattern, template in rules:
            found = pattern.fullmatch(name)
            if found:
                values = found.groupdict()
                if "norm" in values:
                    values["norm"] = norms.get(values["norm"], values["norm"])
                return template.format(**values)
        return name


_BLOCK, _LAYER = _OPENCLIP + "transformer.resblocks.{i}.", _CLIP + "encoder.layers.{i}."
_MINDONE_BLOCK = _MINDONE_TEXT + "transformer_layer.resblocks.{i}."

STABILITY_MINDONE = Rules(
    (UNET + "{path}.in_layers.0.{norm}", UNET + "{path}.in_layers_norm.{norm}"),
    (UNET + "{path}.in_layers.2.{leaf}", UNET + "{path}.in_layers_conv.conv.{leaf}"),
    (UNET + "{path}.out_layers.0.{norm}", UNET + "{path}.out_layers_norm.{norm}"),
    (UNET + "{path}.out_layers.3.{leaf}", UNET + "{path}.out_layers_conv.conv.{leaf}"),
    (UNET + "{path}.skip_connection.{leaf}", UNET + "{path}.skip_connection.conv.{leaf}"),
    (UNET + "{path}.op.{leaf}", UNET + "{path}.op.conv.{leaf}"),
    (UNET + "input_blocks.0.0.{leaf}", UNET + "input_blocks.0.0.conv.{leaf}"),
    (UNET + "output_blocks.{i}.{j}.conv.{leaf}", UNET + "output_blocks.{i}.{j}.conv.conv.{leaf}"),
    (UNET + "out.0.{norm}", UNET + "out.0.{norm}"),
    (UNET + "out.2.{leaf}", UNET + "out.2.conv.{leaf}"),
    ("{path}.norm{kind}.{norm}", "{path}.norm{kind}.{norm}"),
    (_OPENCLIP + "token_embedding.weight", _MINDONE_TEXT + "embedding_table"),
    (_OPENCLIP + "positional_embedding", _MINDONE_TEXT + "positional_embedding"),
    (_OPENCLIP + "ln_final.{norm}", _MINDONE_TEXT + "ln_final.{norm}"),
    (_BLOCK + "attn.in_proj_{leaf}", _MINDONE_BLOCK + "attn.attn.in_proj.{leaf}"),
    (_BLOCK + "attn.out_proj.{leaf}", _MINDONE_BLOCK + "attn.attn.out_proj.{leaf}"),
    (_BLOCK + "mlp.{fc}.{leaf}", _MINDONE_BLOCK + "{fc}.{leaf}"),
    (_BLOCK + "ln_{j}.{norm}", _MINDONE_BLOCK + "ln_{j}.{norm}"),
)

# SDXL by MindONE: only norms and embeddings have other names.
STABILITY_MINDONE_XL = Rules(
    *(
        (f"{name}.{{norm}}", f"{name}.{{norm}}")
        for name in (
            UNET + "{path}.in_layers.0",
            UNET + "{path}.out_layers.0",
            UNET + "out.0",
            "{path}.norm{kind}",
            "{path}.layer_norm{j}",
            "{path}.final_layer_norm",
            "{path}.ln_{j}",
            "{path}.ln_final",
        )
    ),
    ("{path}.token_embedding.weight", "{path}.token_embedding.embedding_table"),
    ("{path}.position_embedding.weight", "{path}.position_embedding.embedding_table"),
)

OPENCLIP_CLIP = Rules(
    (_OPENCLIP + "token_embedding.weight", _CLIP + "embeddings.token_embedding.weight"),
    (_OPENCLIP + "positional_embedding", _CLIP + "embeddings.position_embedding.weight"),
    (_OPENCLIP + "ln_final.{leaf}", _CLIP + "final_layer_norm.{leaf}"),
    (_BLOCK + "attn.in_proj_{leaf}", _LAYER + "self_attn.in_proj_{leaf}"),  # merged and split elsewhere
    (_BLOCK + "attn.out_proj.{leaf}", _LAYER + "self_attn.out_proj.{leaf}"),
    (_BLOCK + "mlp.c_fc.{leaf}", _LAYER + "mlp.fc1.{leaf}"),
    (_BLOCK + "mlp.c_proj.{leaf}", _LAYER + "mlp.fc2.{leaf}"),
    (_BLOCK + "ln_{j}.{leaf}", _LAYER + "layer_norm{j}.{leaf}"),
)


# ---- wrappers ----

# PyTorch puts these around a network for several devices, compilation, shards and recomputation; MindSpore puts
# _backbone around a layer for mixed precision.
_OUTER = re.compile(r"(module\.)*")
_ANYWHERE = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_backbone)\.")


def _unwrapped(name: str) -> str:
    name = _ANYWHERE.sub("", name)
    return name[_OUTER.match(name).end() :]


def without_wrappers(tensors: Tensors) -> Tensors:
    """The parameters by their names without such wrappers; ValueError where two names become one."""
    return _renamed(tensors, _unwrapped)


# ---- Stable Diffusion XL ----

_EMBEDDERS, _CONDITIONER = TEXT + "embedders.", "conditioner.embedders."
_SINGLE = _CONDITIONER + "0.model."  # the refiner's text encoder, and SD 2.x' in files of Stability's generative-models


def is_xl(tensors: Collection[str]) -> bool:
    """Whether our names are those of a model of SDXL's kind, base or refiner, or of its UNet or its text encoders."""
    return LABELS in tensors or any(name.startswith(_EMBEDDERS) for name in tensors)


def from_conditioner(tensors: Tensors) -> Tensors:
    """The tensors by our names, from those of Stability's generative-models; all other names stay."""
    two = any(name.startswith(_CONDITIONER + "1.") for name in tensors)
    theirs, ours = (_CONDITIONER, _EMBEDDERS) if two else (_SINGLE, _OPENCLIP)
    return _renamed(tensors, lambda name: ours + name[len(theirs) :] if name.startswith(theirs) else name)


def to_conditioner(tensors: Tensors) -> Tensors:
    """The tensors by the names in Stability's single files, which are ours but for SDXL."""
    if not is_xl(tensors):
        return tensors
    two = any(name.startswith(_EMBEDDERS) for name in tensors)
    theirs, ours = (_CONDITIONER, _EMBEDDERS) if two else (_SINGLE, _OPENCLIP)
    return _renamed(tensors, lambda name: theirs + name[len(ours) :] if name.startswith(ours) else name)


# ---- MindONE ----


# Some SD 1.x files leave "text_model." out of Hugging Face's names.
_SHORT_CLIP = re.compile("^" + re.escape(_MINDONE_TEXT) + r"(?=(embeddings|encoder|final_layer_norm)\.)")


def text_variant(tensors: Tensors) -> str | None:
    """The variant (``TextConfig.variant``) of a model's only text encoder, by its names; None where there is none."""
    if any(name.startswith(_OPENCLIP) for name in tensors):
        return "openclip"
    return "clip" if any(name.startswith(_CLIP) for name in tensors) else None


def from_mindone(tensors: Tensors, variant: str | None = None) -> Tensors:
    """The tensors by our names, from MindONE's names, Stability's and near variants.

    MindONE gives both text encoders the same names. Without ``variant`` the width decides: 768 is SD 1.x's.
    """
    table = tensors.get(_MINDONE_TEXT + "embedding_table")
    if table is not None and variant is None:
        variant = "clip" if table.shape[1:] == (768,) else "openclip"
    tensors = _renamed(tensors, STABILITY_MINDONE.to_left)
    if table is not None and variant == "clip":
        tensors = _split(_renamed(tensors, OPENCLIP_CLIP.to_right))
    tensors = _renamed(tensors, lambda name: STABILITY_MINDONE_XL.to_left(_SHORT_CLIP.sub(_CLIP, name)))
    return from_conditioner(tensors)


# In MindONE's train_resume.ckpt beside the network's parameters: copies of some of them, and counters.
_SLOT = re.compile(r"(swap|ema|adam_m|adam_v|grad_accumulated_|zeros_)\.(.+)")
_COUNTER = re.compile(
    "grad_accumulate_step_|scale_sense|current_iterator_step|last_overflow_iterator_step|updates|cur_step"
    "|epoch_num|global_step|learning_rate|loss_scale|lora_rank"
)
_LORA = re.compile(r"(.+)\.lora_(down|up)\.weight")


def is_mindone_state(tensors: Iterable[str]) -> bool:
    """Whether these are the names in a training state of MindONE."""
    return any(found[1] in ("swap", "adam_m") for found in map(_SLOT.fullmatch, tensors) if found)


def from_mindone_state(tensors: Tensors, raw: bool) -> tuple[Tensors, str | None]:
    """(the parameters in a training state of MindONE, by its names; a phrase that says which parameters they are).

    Where MindONE keeps a moving average, the plain names hold the average, and names with ``swap.`` hold the weights.
    `raw` chooses the weights. Layers with a LoRA are called ``<layer>.linear``; the LoRA is added to them with
    MindONE's default scale, 1, because the file does not hold the scale. The tensors of any other file are returned
    unchanged, with None.
    """
    if not is_mindone_state(tensors):
        return tensors, None
    slots = {name: found for name in tensors if (found := _SLOT.fullmatch(name))}
    weights = {name: array for name, array in tensors.items() if name not in slots and not _COUNTER.fullmatch(name)}
    swapped = {found[2]: tensors[name] for name, found in slots.items() if found[1] == "swap"}
    said = "weights"
    if swapped:
        said = "weights themselves, not their moving average" if raw else "weights' moving average (EMA)"
    weights = {name: swapped.get(name, array) if raw else array for name, array in weights.items()}
    merged = _without_lora(weights)
    return merged, said + (", with the LoRA added at scale 1" if len(merged) < len(weights) else "")


def _without_lora(tensors: Tensors) -> Tensors:
    """``<layer>.linear.*`` as ``<layer>.*``. The product of the layer's LoRA, up @ down, is added to its weight."""
    pairs: dict[str, Tensors] = {}
    for name, array in tensors.items():
        if found := _LORA.fullmatch(name):
            pairs.setdefault(f"{found[1]}.linear.weight", {})[found[2]] = array
    merged = {name: array for name, array in tensors.items() if not _LORA.fullmatch(name)}
    for name, pair in pairs.items():
        up, down, weight = pair.get("up"), pair.get("down"), merged.get(name)
        if weight is None or up is None or down is None or _product_shape(up, down) != weight.shape:
            raise ValueError(f"the LoRA of {name} is not whole or does not fit it")
        weight, up, down = map(widened, (weight, up, down))
        if {weight.dtype.kind, up.dtype.kind, down.dtype.kind} != {"f"}:
            raise ValueError(f"the LoRA of {name} is not of floating-point numbers")
        merged[name] = (weight + up.astype(np.float32) @ down.astype(np.float32)).astype(weight.dtype)
    return _renamed(merged, lambda name: re.sub(r"\.linear\.(weight|bias)$", r".\1", name))


def _product_shape(up: np.ndarray, down: np.ndarray) -> tuple[int, ...] | None:
    fits = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
    return (up.shape[0], down.shape[1]) if fits else None


def to_mindone(tensors: Tensors) -> Tensors:
    """The tensors by MindONE's names, from ours."""
    if is_xl(tensors):
        return _renamed(to_conditioner(tensors), STABILITY_MINDONE_XL.to_right)
    tensors = _renamed(_merged(tensors), OPENCLIP_CLIP.to_left)
    return _renamed(tensors, STABILITY_MINDONE.to_right)


def _renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    renamed = {}
    for name, array in tensors.items():
        new = rename(name)
        if new in renamed:
            raise ValueError(f"it holds {new} twice, under two names")
        renamed[new] = array
    return renamed


PROJECTION = re.compile(r"(.+\.self_attn\.)([qkv])_proj\.(weight|bias)")
_IN_PROJECTION = re.compile(r"(.+\.self_attn\.)in_proj_(weight|bias)")


def _merged(tensors: Tensors) -> Tensors:
    """q_proj, k_proj, v_proj [W, W] of Hugging Face's CLIP as one in_proj [3 W, W], as OpenCLIP has it."""
    merged = {}
    for name, array in tensors.items():
        found = PROJECTION.fullmatch(name)
        trio = [tensors.get(f"{found[1]}{x}_proj.{found[3]}") for x in "qkv"] if found else []
        if not found or len({part is not None and part.shape for part in trio}) > 1:
            merged[name] = array
        elif found[2] == "q":
            merged[f"{found[1]}in_proj_{found[3]}"] = np.concatenate(trio)
    return merged


def _split(tensors: Tensors) -> Tensors:
    """The opposite of `_merged`; the three parts are views."""
    split = {}
    for name, array in tensors.items():
        found = _IN_PROJECTION.fullmatch(name)
        if not found or not array.ndim or len(array) % 3:
            split[name] = array
            continue
        for x, part in zip("qkv", np.split(array, 3)):
            split[f"{found[1]}{x}_proj.{found[2]}"] = part
    return split


# ---- diffusers ----

_RESNET = {  # inside a residual block of the UNet
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_PROJECTION = re.compile(_RE_VAE + r"\w+\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


def from_diffusers(
    unet: Tensors,
    vae: Tensors,
    text_encoder: Tensors,
    variant: str,
    text_encoder_2: Tensors | None = None,
    variant_2: str = "openclip",
) -> Tensors:
    """The parameters of a diffusers pipeline's parts (any may be empty) by our names and shapes.

    ``variant`` is a text encoder's (``TextConfig.variant``), which its parameters do not tell. diffusers has older and
    newer names for the autoencoder's attention. Its projections are linear [C, C] there and 1x1 convolutions [C, C, 1,
    1] here. Two text encoders are those of SDXL's base; ``text_encoder_2`` without another is the refiner's.
    """
    levels, depth = _count(unet, r"down_blocks\.#\."), _count(unet, r"down_blocks\.0\.resnets\.#\.")
    attended = tuple(f"up_blocks.{level}.attentions.0.norm.weight" in unet for level in range(levels))
    rename = by_module(inverted(unet_modules(Scheme(levels, depth, attended))))
    tensors = {UNET + name: array for name, array in _renamed(unet, rename).items()}

    old = re.compile(r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    vae = _renamed(vae, lambda name: old.sub(lambda found: _OLD_VAE_ATTENTION[found[0]], name))
    levels, depth = _count(vae, r".+_blocks\.#\."), _count(vae, r".+\.resnets\.#\.")
    for name, array in _renamed(vae, by_module(inverted(_vae_modules(levels, depth)))).items():
        name = VAE + name
        tensors[name] = array[:, :, None, None] if _VAE_PROJECTION.fullmatch(name) and array.ndim == 2 else array

    encoders = [_encoder_from_diffusers(text_encoder, variant)] if text_encoder else []
    encoders += [_encoder_from_diffusers(text_encoder_2, variant_2)] if text_encoder_2 else []
    for n, encoder in enumerate(encoders):
        prefix = f"{_EMBEDDERS}{n}." if len(encoders) == 2 else TEXT
        tensors.update({prefix + name[len(TEXT) :]: array for name, array in encoder.items()})
    return tensors


def _encoder_from_diffusers(tensors: Tensors, variant: str) -> Tensors:
    """Hugging Face's text encoder by the names of a model's only text encoder."""
    text = {_CLIP + re.sub(r"^text_model\.", "", name): array for name, array in tensors.items()}
    if variant != "openclip":
        return text
    text = _renamed(_merged(text), OPENCLIP_CLIP.to_left)
    projection = text.pop(f"{_CLIP}{_PROJECTION}.weight", None)
    return text if projection is None else {**text, _OPENCLIP + _PROJECTION: projection.T}


def to_diffusers(tensors: Tensors, text_layers: int = _SD2_BLOCKS - 1) -> dict[str, Tensors]:
    """The opposite of from_diffusers: {part: tensors by diffusers' newer names}.

    The parts are "unet", "vae", "text_encoder" (empty for SDXL's refiner) and, of SDXL, "text_encoder_2".
    ``text_layers`` is the number of blocks that run in a model's only text encoder. Extras are left out. Raises
    UserError where a parameter belongs to no part.
    """
    last = f"{_OPENCLIP}transformer.resblocks.{_SD2_BLOCKS - 1}."  # it is an extra only where it does not run
    used = (last,) if text_layers >= _SD2_BLOCKS else ()
    used += (_OPENCLIP + _PROJECTION, f"{_EMBEDDERS}1.model.{_PROJECTION}") if is_xl(tensors) else ()
    tensors = {n: array for n, array in tensors.items() if n.startswith(used) or not is_extra(n)}
    prefixes = _encoders(tensors)
    texts = {"text_encoder": {}}
    for part, prefix in prefixes.items():
        own = {TEXT + n[len(prefix) :]: array for n, array in tensors.items() if n.startswith(prefix)}
        texts[part] = _encoder_to_diffusers(own)
    unet, vae = ({n[len(p) :]: a for n, a in tensors.items() if n.startswith(p)} for p in (UNET, VAE))
    lost = [name for name in tensors if not name.startswith((UNET, VAE, *prefixes.values()))]
    lost += [name for text in texts.values() for name in text if name.startswith(TEXT)]
    if lost:
        first = ", ".join(map(escaped, lost[:3]))
        raise UserError(f"{len(lost)} parameters have no place in a diffusers pipeline (first: {first})")

    unet = _renamed(unet, by_module(unet_modules(scheme_of(unet))))

    vae = {n: a[:, :, 0, 0] if _VAE_PROJECTION.fullmatch(VAE + n) and a.ndim == 4 else a for n, a in vae.items()}
    levels, depth = _count(vae, r"\w+\.(?:down|up)\.#\."), _count(vae, r".+\.block\.#\.")
    return {"unet": unet, "vae": _renamed(vae, by_module(_vae_modules(levels, depth))), **texts}


def _encoders(tensors: Tensors) -> dict[str, str]:
    """{diffusers' part: the beginning of our names} of the text encoders that a model has."""
    if any(name.startswith(_EMBEDDERS) for name in tensors):
        return {part: f"{_EMBEDDERS}{n}." for n, part in enumerate(("text_encoder", "text_encoder_2"))}
    return {"text_encoder_2" if is_xl(tensors) else "text_encoder": TEXT}


def _encoder_to_diffusers(tensors: Tensors) -> Tensors:
    """The opposite of _encoder_from_diffusers; a name that has no place there stays."""
    text = _split(_renamed(tensors, OPENCLIP_CLIP.to_right))
    named = {f"text_model.{n[len(_CLIP) :]}" if n.startswith(_CLIP) else n: array for n, array in text.items()}
    projection = named.pop(_OPENCLIP + _PROJECTION, None)
    return named if projection is None else {**named, f"{_PROJECTION}.weight": projection.T}


_VAE_ALONE = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")


def from_part_alone(tensors: Tensors) -> Tensors:
    """A UNet or an autoencoder alone, whose names lack the part's prefix, by Stability's full names.

    The names in the file are Stability's or diffusers'. The tensors of any other file are returned unchanged.
    """
    if "input_blocks.0.0.weight" in tensors:
        return {UNET + name: array for name, array in tensors.items()}
    if "conv_in.weight" in tensors and "down_blocks.0.resnets.0.conv1.weight" in tensors:
        return from_diffusers(tensors, {}, {}, "openclip")
    if "encoder.conv_in.weight" in tensors and "decoder.conv_in.weight" in tensors:
        vae = {name: array for name, array in tensors.items() if _VAE_ALONE.match(name)}
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in vae:
            named = from_diffusers({}, vae, {}, "openclip")
        else:
            named = {VAE + name: array for name, array in vae.items()}
        return {**named, **{name: array for name, array in tensors.items() if name not in vae}}
    return tensors


class Scheme(NamedTuple):
    """How the blocks of a UNet are counted: it has ``depth`` residual blocks at each of ``levels`` levels.

    ``attended`` says which of the upward levels, deepest first, have attention. There the upsampler comes one place
    later.
    """

    levels: int
    depth: int
    attended: tuple[bool, ...]


def scheme_of(unet: Collection[str]) -> Scheme:
    """The scheme of a UNet by Stability's names of its parameters, with or without the part's name before them."""
    unet = {name[len(UNET) :] if name.startswith(UNET) else name for name in unet}
    blocks = _count(unet, r"input_blocks\.#\.")
    depth = next((n for n in range(blocks) if f"input_blocks.{n + 1}.0.op.weight" in unet), max(blocks - 1, 0))
    levels = blocks // (depth + 1)
    attended = tuple(f"output_blocks.{level * (depth + 1)}.1.norm.weight" in unet for level in range(levels))
    return Scheme(levels, depth, attended)


@lru_cache(maxsize=8)
def unet_modules(scheme: Scheme) -> dict[str, str]:
    """{Stability's module: diffusers' module} of a UNet. Nobody may change it: it is kept."""
    levels, depth, attended = scheme
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "guidance_embed": "time_embedding.cond_proj",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level in range(levels):
        down, up, first = f"down_blocks.{level}", f"up_blocks.{level}", level * (depth + 1)
        for n in range(depth):
            resnets[f"input_blocks.{first + n + 1}.0"] = f"{down}.resnets.{n}"
            modules[f"input_blocks.{first + n + 1}.1"] = f"{down}.attentions.{n}"
        modules[f"input_blocks.{first + depth + 1}.0.op"] = f"{down}.downsamplers.0.conv"
        for n in range(depth + 1):
            resnets[f"output_blocks.{first + n}.0"] = f"{up}.resnets.{n}"
            modules[f"output_blocks.{first + n}.1"] = f"{up}.attentions.{n}"
        modules[f"output_blocks.{first + depth}.{2 if attended[level] else 1}.conv"] = f"{up}.upsamplers.0.conv"
    for block, resnet in resnets.items():
        modules.update({f"{block}.{ours}": f"{resnet}.{theirs}" for ours, theirs in _RESNET.items()})
    return modules


def _vae_modules(levels: int, depth: int) -> dict[str, str]:
    """{Stability's module: diffusers' module} of an autoencoder with at most ``depth`` residual blocks at a level."""
    modules = {}
    for half in ("encoder", "decoder"):
        modules[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        modules[f"{half}.mid.block_1"] = f"{half}.mid_block.resnets.0"
        modules[f"{half}.mid.block_2"] = f"{half}.mid_block.resnets.1"
        for ours, theirs in _VAE_ATTENTION.items():
            modules[f"{half}.mid.attn_1.{ours}"] = f"{half}.mid_block.attentions.0.{theirs}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        modules[f"encoder.down.{level}.downsample"] = f"{down}.downsamplers.0"
        modules[f"decoder.up.{level}.upsample"] = f"{up}.upsamplers.0"
        for ours, theirs in ((f"encoder.down.{level}", down), (f"decoder.up.{level}", up)):
            for n in range(depth):
                modules[f"{ours}.block.{n}"] = f"{theirs}.resnets.{n}"
                modules[f"{ours}.block.{n}.nin_shortcut"] = f"{theirs}.resnets.{n}.conv_shortcut"
    return modules


def _count(tensors: Iterable[str], pattern: str) -> int:
    """One more than the largest number (of at most two digits) where ``#`` stands in the pattern, at a name's start."""
    numbered = re.compile(pattern.replace("#", r"(\d{1,2})"))
    return 1 + max((int(found[1]) for found in map(numbered.match, tensors) if found), default=-1)


def inverted(modules: dict[str, str]) -> dict[str, str]:
    """The table that leads back."""
    return {theirs: ours for ours, theirs in modules.items()}


def by_module(modules: dict[str, str]) -> Callable[[str], str]:
    """A renaming that exchanges the longest beginning of a name that is in ``modules``."""

    def rename(name: str) -> str:
        parts = name.split(".")
        for n in range(len(parts) - 1, 0, -1):
            module = modules.get(".".join(parts[:n]))
            if module:
                return ".".join([module, *parts[n:]])
        return name

    return rename
