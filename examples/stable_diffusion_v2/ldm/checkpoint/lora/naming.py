"""What every form calls a layer, and which of our parameters it is.

Stability's names count a UNet's blocks through, diffusers' count them by level, so the way between them needs the
`Scheme` of the UNet at hand. kohya writes modules with ``_`` for ``.``. OpenCLIP has one ``in_proj`` [3 W, W] where
Hugging Face has q, k and v.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from ldm.checkpoint import names
from ldm.checkpoint.arrays import FileError
from ldm.checkpoint.names import OPENCLIP_CLIP, STABILITY_MINDONE, Scheme, by_module, inverted, unet_modules
from ldm.files import escaped
from ldm.parts import TEXT, UNET

Q_K_V = "qkv"
_TEXT_MODEL = "text_model."  # before a text encoder's own names in Hugging Face
_CLIP = f"{TEXT}transformer.{_TEXT_MODEL}"
_IN_PROJECTION = re.compile(r"(.+\.self_attn\.)in_proj_weight")


def parameter(module: str, variant: str, scheme: Scheme) -> tuple[str, int | None]:
    """Our name of the weight of a module, and which third of it is the module's: 0, 1, 2 for q, k, v of an in_proj.

    Where the weight is the module's alone the second is None. A name that no rule knows leads to one that no network
    has.

    Args:
        variant: of the text encoder, `TextConfig.variant`.
        scheme: of the UNet, `scheme_of` its parameters' names.
    """
    part, _, name = module.partition(".")
    if part == "unet":
        return UNET + by_module(inverted(unet_modules(scheme)))(f"{name}.weight"), None
    if part != "text_encoder":
        return f"{module}.weight", None
    name = f"{_CLIP}{name.removeprefix(_TEXT_MODEL)}.weight"
    found = names.PROJECTION.fullmatch(name)
    if variant == "openclip" and found:
        return OPENCLIP_CLIP.to_left(f"{found[1]}in_proj_weight"), Q_K_V.index(found[2])
    return (OPENCLIP_CLIP.to_left(name) if variant == "openclip" else name), None


def module(parameter: str, variant: str, which: int | None = None, *, scheme: Scheme) -> str:
    """The opposite of `parameter`: the module whose weight that is; `which` says which third of an in_proj."""
    if parameter.startswith(UNET):
        name = by_module(unet_modules(scheme))(parameter[len(UNET) :])
        return f"unet.{name.removesuffix('.weight')}"
    name = OPENCLIP_CLIP.to_right(parameter) if variant == "openclip" else parameter
    found = _IN_PROJECTION.fullmatch(name)
    if found and which is not None:
        name = f"{found[1]}{Q_K_V[which]}_proj.weight"
    return f"text_encoder.{_TEXT_MODEL}{name.removeprefix(_CLIP).removesuffix('.weight')}"


# ---- tensors of a file ----

_WAYS = {"A": "down", "B": "up", "down": "down", "up": "up"}
_ENTRIES = {  # every name that a file of that form may have
    "kohya": re.compile(r"(?P<module>lora_(?:unet|te|te1|te2)_\w+)\.(?:lora_(?P<way>down|up)\.weight|alpha)"),
    "peft": re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<way>[AB])(?:\.\w+)?\.weight"),
    "mindone": re.compile(
        r"(?P<module>(?:model\.diffusion_model|cond_stage_model)\..+)\.lora_(?P<way>down|up|A|B)\.weight"
    ),
    "diffusers": re.compile(
        r"(?P<module>(?:unet|text_encoder|text_encoder_2|down_blocks|mid_block|up_blocks)\..+?)"
        r"(?:(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(?P<way>A|B|down|up)\.weight|\.alpha)"
    ),
}
# The layers that MindONE puts a LoRA around.
MINDONE_LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".attn.in_proj", ".attn.out_proj")
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


def modules_of(form: str, name: str, part: str | None, scheme: Scheme) -> Iterator[tuple[str, int | None]]:
    """The modules that a file calls `name`, each with the third of its `up` that is the module's, if it is not all.

    Args:
        part: which part a PEFT folder is of.
        scheme: of the UNet, where the file has Stability's names.
    """
    if form == "mindone":  # both text encoders have OpenCLIP's names there
        (weight,) = names.from_mindone({f"{name}.weight": np.empty(0)})
        variant = "openclip" if weight.startswith(f"{TEXT}model.") else "clip"
        merged = weight.endswith("in_proj_weight")
        for which in range(len(Q_K_V)) if merged else (None,):
            yield module(weight, variant, which, scheme=scheme), which
    elif form == "kohya":
        part, rest = _KOHYA.fullmatch(name).groups()
        yield _canonical(_KOHYA_PARTS[part], ".".join(_WORD.findall(rest)), scheme), None
    elif form == "peft":
        yield _canonical(part, name, scheme), None
    else:
        part, _, rest = name.partition(".")
        if part not in PREFIXES:  # the oldest files hold a UNet's alone
            part, rest = "unet", name
        if old := _OLD_PROCESSOR.fullmatch(rest):
            rest = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
        yield _canonical(part, rest, scheme), None


def _canonical(part: str, name: str, scheme: Scheme) -> str:
    if part == "unet":
        return f"unet.{by_module(unet_modules(scheme))(name)}"
    return f"{part}.{_TEXT_MODEL}{name.removeprefix(_TEXT_MODEL)}"


def kohya_name(module: str, two_encoders: bool) -> str:
    """kohya's; with two text encoders the first has a number too."""
    part, _, rest = module.partition(".")
    prefix = "lora_te1" if part == "text_encoder" and two_encoders else PREFIXES[part]
    return f"{prefix}_{rest.replace('.', '_')}"


def mindone_name(module: str, scheme: Scheme) -> tuple[str, int | None]:
    """MindONE's, and which third of an in_proj it is, as in `parameter`."""
    weight, which = parameter(module, "openclip", scheme)
    return STABILITY_MINDONE.to_right(weight).removesuffix(".weight"), which


# ---- how a UNet's blocks are counted ----

_MOST_BLOCKS = 9
_COUNTED = re.compile(r".*(input|output)_blocks[._](\d{1,2})[._]")
_LEVELLED = re.compile(r"unet\.(down|up)_blocks\.\d+\.(?:attentions|resnets)\.(\d)\.")


def file_scheme(depth: int) -> Scheme:
    """A scheme for names in files, where only the depth makes a difference."""
    return Scheme(16, depth, (True,) * 16)


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
