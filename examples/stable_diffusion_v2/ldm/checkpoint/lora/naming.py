"""What every form calls a layer, and which of our parameters it is.

Stability's names count a UNet's blocks through, diffusers' count them by level, so the way between them needs the
`Layout` of the model at hand. kohya writes modules with ``_`` for ``.``. OpenCLIP has one ``in_proj`` [3 W, W] where
Hugging Face has q, k and v.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from ldm.checkpoint import names
from ldm.checkpoint.arrays import FileError
from ldm.checkpoint.names import OPENCLIP_CLIP, STABILITY_MINDONE, Scheme, by_module, inverted, scheme_of, unet_modules
from ldm.files import escaped
from ldm.parts import TEXT, UNET

Q_K_V = "qkv"
_TEXT_MODEL = "text_model."  # before a text encoder's own names in Hugging Face
_CLIP, _OPENCLIP = f"{TEXT}transformer.{_TEXT_MODEL}", f"{TEXT}model."
_ENCODER = re.compile(rf"{re.escape(TEXT)}(?:embedders\.([01])\.)?(?:model|transformer\.text_model)\.")
_IN_PROJECTION = re.compile(r"(.+\.self_attn\.)in_proj_weight")


class Layout(NamedTuple):
    """How the parameters of a model are named.

    Fields:
        unet: how the blocks of its UNet are counted.
        texts: the prefix of our names of each text encoder, by diffusers' name of the part.
        xl: whether the model is of SDXL's family (base or refiner).
    """

    unet: Scheme
    texts: dict[str, str]
    xl: bool


def layout_of(parameters: Collection[str]) -> Layout:
    """The layout of a model by our names of its parameters. The text encoders may be missing."""
    xl = names.is_xl(parameters)
    found = [each for each in map(_ENCODER.match, parameters) if each]
    return Layout(scheme_of(parameters), {_text_part(each, xl): each[0] for each in found}, xl)


def _text_part(encoder: re.Match, xl: bool) -> str:
    """diffusers' name of a text encoder. SDXL's refiner has one encoder, which is the base's second one."""
    second = encoder[1] == "1" or (xl and encoder[1] is None)
    return "text_encoder_2" if second else "text_encoder"


def parameter(module: str, layout: Layout) -> tuple[str, int | None]:
    """Our name of the weight of a module, and which third of it is the module's: 0, 1, 2 for q, k, v of an in_proj.

    Where the weight is the module's alone the second is None. A name that no rule knows leads to one that no network
    has, and so does a module of a text encoder that the model does not have.
    """
    part, _, name = module.partition(".")
    if part == "unet":
        return UNET + by_module(inverted(unet_modules(layout.unet)))(f"{name}.weight"), None
    prefix = layout.texts.get(part)
    if prefix is None:
        return f"{module}.weight", None
    name, which = f"{_CLIP}{name.removeprefix(_TEXT_MODEL)}.weight", None
    if prefix.endswith(_TEXT_MODEL):
        return prefix + name.removeprefix(_CLIP), None
    if found := names.PROJECTION.fullmatch(name):
        name, which = f"{found[1]}in_proj_weight", Q_K_V.index(found[2])
    return prefix + OPENCLIP_CLIP.to_left(name).removeprefix(_OPENCLIP), which


def module(parameter: str, layout: Layout, which: int | None = None) -> str:
    """The opposite of `parameter`: the module whose weight that is; `which` says which third of an in_proj."""
    if parameter.startswith(UNET):
        name = by_module(unet_modules(layout.unet))(parameter[len(UNET) :])
        return f"unet.{name.removesuffix('.weight')}"
    encoder = _ENCODER.match(parameter)
    if encoder is None:
        return parameter.removesuffix(".weight")
    rest = parameter[encoder.end() :]
    name = _CLIP + rest if encoder[0].endswith(_TEXT_MODEL) else OPENCLIP_CLIP.to_right(_OPENCLIP + rest)
    found = _IN_PROJECTION.fullmatch(name)
    if found and which is not None:
        name = f"{found[1]}{Q_K_V[which]}_proj.weight"
    return f"{_text_part(encoder, layout.xl)}.{_TEXT_MODEL}{name.removeprefix(_CLIP).removesuffix('.weight')}"


# ---- tensors of a file ----

_WAYS = {"A": "down", "B": "up", "down": "down", "up": "up"}
_ENTRIES = {  # every name that a file of that form may have
    "kohya": re.compile(r"(?P<module>lora_(?:unet|te|te1|te2)_\w+)\.(?:lora_(?P<way>down|up)\.weight|alpha)"),
    "peft": re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<way>[AB])(?:\.\w+)?\.weight"),
    "mindone": re.compile(
        r"(?P<module>(?:model\.diffusion_model|cond_stage_model|conditioner)\..+)\.lora_(?P<way>down|up|A|B)\.weight"
    ),
    "diffusers": re.compile(
        r"(?P<module>(?:unet|text_encoder|text_encoder_2|down_blocks|mid_block|up_blocks)\..+?)"
        r"(?:(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(?P<way>A|B|down|up)\.weight|\.alpha)"
    ),
}
# The layers that MindONE puts a LoRA around, of SD 1.x and 2.x and of SDXL. Its in_proj of SDXL has none.
_MINDONE_UNET = (".to_q", ".to_k", ".to_v", ".to_out.0")
MINDONE_LAYERS = (*_MINDONE_UNET, ".attn.in_proj", ".attn.out_proj")
MINDONE_XL_LAYERS = (*_MINDONE_UNET, *(f".self_attn.{x}_proj" for x in ("q", "k", "v", "out")), ".attn.out_proj")
COUNTERS = ("lora_rank",)  # beside the tensors, in MindONE's files


class Entry(NamedTuple):
    """A tensor's place: the module as the file calls it, and "down", "up" or "alpha"."""

    module: str
    way: str


def entries(tensors: Collection[str]) -> tuple[str, dict[str, Entry]]:
    """The form of a file and the place of each of its tensors, by their names.

    Raises:
        FileError: a name is of no form, or of another than the others.
    """
    wanted = [name for name in tensors if name not in COUNTERS]
    form = next((form for form, known in _ENTRIES.items() if any(map(known.fullmatch, wanted))), None)
    found = {name: _ENTRIES[form].fullmatch(name) if form else None for name in wanted}
    strange = [name for name, match in found.items() if not match]
    if strange or not found:
        first = ", ".join(escaped(name) for name in strange[:3]) or "none"
        raise FileError(
            f"is no LoRA that is read here: {len(strange)} of its {len(tensors)} tensors have names that are not known "
            f"(first: {first}); save it as a plain LoRA, of matrices A and B alone"
        )
    return form, {name: Entry(match["module"], _WAYS.get(match["way"], "alpha")) for name, match in found.items()}


# ---- a file's modules ----

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}  # kohya's; SD 1.x and 2.x
_KOHYA = re.compile(r"lora_(unet|te|te1|te2)_(.+)")
_KOHYA_PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
# The words of a module's name that have a _ themselves.
_WORD = re.compile(
    "("
    + "|".join(
        (
            "(?:down|up|mid|transformer|input|output|middle)_blocks?",
            "label_emb",
            "guidance_embed",
            "cond_proj",
            "add_embedding",
            "to_(?:q|k|v|out)",
            "(?:q|k|v|out)_proj",
            "proj_(?:in|out)",
            "conv_(?:in|out|shortcut)",
            "time_(?:embedding|embed|emb_proj)",
            "linear_[12]",
            "(?:in|out|emb)_layers",
            "skip_connection",
            "text_(?:model|projection)",
            "self_attn",
            "[^_]+",
        )
    )
    + ")(?:_|$)"
)
_OLD_PROCESSOR = re.compile(r"(.+)\.processor\.(to_\w+)")


def modules_of(form: str, name: str, part: str | None, layout: Layout) -> Iterator[tuple[str, int | None]]:
    """The modules that a file calls `name`, each with the third of its `up` that is the module's, if it is not all.

    Args:
        part: which part a PEFT folder is of.
        layout: of the file's model. Only names like Stability's need it.
    """
    if form == "mindone":
        weight = _from_mindone(name)
        for which in range(len(Q_K_V)) if weight.endswith("in_proj_weight") else (None,):
            yield module(weight, layout, which), which
    elif form == "kohya":
        part, rest = _KOHYA.fullmatch(name).groups()
        yield _canonical(_KOHYA_PARTS[part], ".".join(_WORD.findall(rest)), layout.unet), None
    elif form == "peft":
        yield _canonical(part, name, layout.unet), None
    else:
        part, _, rest = name.partition(".")
        if part not in PREFIXES:  # the oldest files hold a UNet's alone
            part, rest = "unet", name
        if old := _OLD_PROCESSOR.fullmatch(rest):
            rest = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
        yield _canonical(part, rest, layout.unet), None


def _canonical(part: str, name: str, scheme: Scheme) -> str:
    if part == "unet":
        return f"unet.{by_module(unet_modules(scheme))(name)}"
    return f"{part}.{_TEXT_MODEL}{name.removeprefix(_TEXT_MODEL)}"


def kohya_name(module: str, layout: Layout) -> str:
    """kohya's. In SDXL's the UNet's blocks are counted as Stability does, and the first text encoder has a number."""
    part, _, rest = module.partition(".")
    prefix = PREFIXES[part]
    if layout.xl and part == "unet":
        rest = by_module(inverted(unet_modules(layout.unet)))(f"{rest}.weight").removesuffix(".weight")
    elif layout.xl and part == "text_encoder":
        prefix = "lora_te1"
    return f"{prefix}_{rest.replace('.', '_')}"


_CONDITIONER = "conditioner."  # before the names of text encoders in SDXL's files
_ONLY_ENCODER = "conditioner.embedders.0.model."  # of SDXL's refiner, in files


def mindone_name(module: str, layout: Layout) -> tuple[str, int | None]:
    """MindONE's, and which third of an in_proj it is, as in `parameter`."""
    weight, which = parameter(module, layout)
    if not layout.xl:
        weight = STABILITY_MINDONE.to_right(weight)
    elif weight.startswith(_OPENCLIP):
        weight = weight.replace(_OPENCLIP, _ONLY_ENCODER, 1)
    elif weight.startswith(TEXT):
        weight = weight.replace(TEXT, _CONDITIONER, 1)
    return weight.removesuffix(".weight"), which


def _from_mindone(name: str) -> str:
    """Our name of the weight of a layer in a MindONE file. Mixed precision puts ``_backbone`` into its names."""
    name = f"{name.replace('._backbone', '')}.weight"
    if name.startswith(_ONLY_ENCODER):
        return name.replace(_ONLY_ENCODER, _OPENCLIP, 1)
    if name.startswith(_CONDITIONER):
        return name.replace(_CONDITIONER, TEXT, 1)
    (weight,) = names.from_mindone({name: np.empty(0)})
    return weight


# ---- of which model a file is ----

_MOST_BLOCKS = 9
_COUNTED = re.compile(r".*(input|output)_blocks[._](\d{1,2})[._]")
_LEVELLED = re.compile(r"unet\.(down|up)_blocks\.\d+\.(?:attentions|resnets)\.(\d)\.")
_XL_NAMES = re.compile(r"text_encoder_2\.|lora_te[12]_|conditioner\.embedders\.|.*transformer_blocks[._][1-9]")
_SD_NAMES = re.compile(r"(?:unet\.|lora_unet_)(?:down_blocks[._]0|up_blocks[._]3)[._]attentions[._]")
_SD_TEXTS = {"text_encoder": _OPENCLIP}  # both encoders have OpenCLIP's names in MindONE's files
_XL_TEXTS = {
    "text_encoder": f"{TEXT}embedders.0.transformer.{_TEXT_MODEL}",
    "text_encoder_2": f"{TEXT}embedders.1.model.",
}
_REFINER_TEXTS = {"text_encoder_2": _OPENCLIP}


def file_layout(depth: int, xl: bool = False, refiner: bool = False) -> Layout:
    """A layout for names in files, where only the depth and the family make a difference.

    Args:
        depth: the residual blocks at each level of the UNet.
        xl: whether the file is of SDXL's family.
        refiner: whether it is of SDXL's refiner.
    """
    texts = _XL_TEXTS if xl else _SD_TEXTS
    return Layout(Scheme(16, depth, (True,) * 16), _REFINER_TEXTS if refiner else texts, xl or refiner)


def is_xl(modules: Collection[str]) -> bool | None:
    """Whether an adapter is of SDXL's family, by its modules' names, inside or in files; None where they do not tell.

    SDXL has two text encoders and transformers of several blocks. It has no attention at the first level of its UNet.
    """
    if any(map(_XL_NAMES.match, modules)):
        return True
    return False if any(map(_SD_NAMES.match, modules)) else None


def depth_of_counted(modules: Collection[str]) -> int:
    """Residual blocks at each level, from the numbers of Stability's blocks that have attention.

    The smallest depth whose levels are all complete; if there is none, Stable Diffusion's, 2.
    """
    found = [match.groups() for match in map(_COUNTED.match, modules) if match]
    blocks = {way: {int(n) for each, n in found if each == way} for way in ("input", "output")}
    for depth in range(1, _MOST_BLOCKS):
        inner = {level * (depth + 1) + n for level in {(n - 1) // (depth + 1) for n in blocks["input"]}
                 for n in range(1, depth + 1)}  # fmt: skip
        outer = {level * (depth + 1) + n for level in {n // (depth + 1) for n in blocks["output"]}
                 for n in range(depth + 1)}  # fmt: skip
        if inner == blocks["input"] and outer == blocks["output"]:
            return depth
    return 2


def depth_of_levelled(modules: Collection[str]) -> int:
    """The same from diffusers' names; Stable Diffusion's, 2, where they do not tell."""
    found = [match.groups() for match in map(_LEVELLED.match, modules) if match]
    down, up = (max((int(n) for each, n in found if each == way), default=-1) for way in ("down", "up"))
    return up if up == down + 1 and up > 0 else 2
