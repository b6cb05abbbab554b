"""Adapters from files and folders; their form is told by their content."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.checkpoint import formats, kinds, metadata
from ldm.checkpoint.arrays import FileError, Strings, Tensors
from ldm.checkpoint.diffusers_config import INDEX
from ldm.checkpoint.lora import naming, peft_config
from ldm.checkpoint.lora.adapter import Adapter, Pair
from ldm.checkpoint.lora.naming import Layout
from ldm.diffusion.prediction import DIFFUSERS_NAMES, own_name
from ldm.errors import UserError
from ldm.files import escaped

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
FOLDERS = {  # of a PEFT adapter with several parts
    "unet": "unet",
    "text_encoder_one": "text_encoder",
    "text_encoder": "text_encoder",
    "text_encoder_two": "text_encoder_2",
    "text_encoder_2": "text_encoder_2",
}
_STEMS = ("adapter_model", "pytorch_lora_weights")
_LARGEST_CONFIG = 10_000_000  # bytes of an adapter_config.json


class Source(NamedTuple):
    """A file of an adapter; `config` is the text of PEFT's config beside it, `part` what its folder says."""

    path: Path
    config: str | None = None
    part: str | None = None


def is_adapter(path: str | Path) -> bool:
    """Whether a file or a folder is an adapter, by its content. UserError where it cannot be read.

    A pipeline's folder is none, even with a LoRA's file in it.
    """
    if os.path.isdir(path):
        return is_adapter_folder(Path(path))
    return kinds.is_adapter(formats.read(path, widen=False)[0])


def load(path: str | Path, scale: float = 1.0) -> Adapter:
    """Read an adapter of any form.

    Args:
        path: a file, PEFT's folder of one part or of several, or a folder with diffusers' file.
        scale: for MindONE's files, which do not hold it: the --lora_scale that it was trained with. alpha is scale
            times the rank.

    Raises:
        UserError: it is no plain LoRA, is damaged, contradicts itself, or holds NaN.
    """
    if os.path.isdir(path):
        there = _sources(Path(path))
        if not there:
            raise UserError(f"{path} is a folder, but no LoRA: it has no {CONFIG} and no {_STEMS[1]}.safetensors")
    else:
        there = [_beside(Path(path))]
    pairs, meta, forms = {}, {}, set()
    try:
        for source in there:
            form, found, said = _read(source, scale)
            forms.add(form)
            meta = {**said, **meta}
            if pairs.keys() & found.keys():
                raise FileError("holds a part twice, in two folders; remove one of them")
            pairs.update(found)
        if len(forms) > 1:
            raise FileError(f"mixes the forms {' and '.join(sorted(forms))}; convert them one by one")
    except FileError as error:
        raise UserError(f"{path} {error}") from None
    metadata.check(path, meta)
    return Adapter(pairs, meta, forms.pop(), str(path))


# ---- files and folders ----


def is_adapter_folder(folder: Path) -> bool:
    if (folder / INDEX).is_file():
        return False
    patterns = (CONFIG, *(f"{name}/{CONFIG}" for name in FOLDERS), f"{_STEMS[1]}.*")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _sources(folder: Path) -> list[Source]:
    """The files of an adapter in a folder; none where it is no adapter's."""
    if (folder / CONFIG).is_file():
        return [_in_folder(folder, FOLDERS.get(folder.name))]
    parts = [name for name in FOLDERS if (folder / name / CONFIG).is_file()]
    if parts:
        return [_in_folder(folder / name, FOLDERS[name]) for name in parts]
    files = sorted(path for path in folder.glob(f"{_STEMS[1]}.*") if path.suffix in (".safetensors", ".bin"))
    return [Source(path) for path in files[-1:]]  # .safetensors rather than .bin


def _in_folder(folder: Path, part: str | None) -> Source:
    names = [f"{_STEMS[0]}.{suffix}" for suffix in ("safetensors", "bin")]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has {CONFIG} but no {' and no '.join(names)}: copy the folder whole")
    return Source(file, _text(folder / CONFIG), part)


def _beside(path: Path) -> Source:
    """A file alone; PEFT's has its config beside it."""
    config = path.parent / CONFIG
    mine = path.stem == _STEMS[0] and config.is_file()
    return Source(path, _text(config), FOLDERS.get(path.parent.name)) if mine else Source(path)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"{path} is larger than any {CONFIG}: fetch it again")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or escaped(error)}") from None


# ---- one file ----


def _read(source: Source, scale: float) -> tuple[str, dict[str, Pair], Strings]:
    tensors, strings, _ = formats.read(source.path)
    form, places = naming.entries(tensors)
    groups: dict[str, Tensors] = {}
    for name, place in places.items():
        groups.setdefault(place.module, {})[place.way] = tensors[name]
    meta = _stated(strings)
    layout = stated_layout(source.path, groups, meta, naming.depth_of_counted(groups))
    part = source.part or _part(groups)
    alphas = _alphas(form, source, strings, scale)
    pairs: dict[str, Pair] = {}
    for name, group in groups.items():
        whole = _pair(name, group)
        whole = _without_padding(whole) if form == "mindone" else whole
        for module, which in naming.modules_of(form, name, part, layout):
            pair = whole if which is None else _third(whole, which)
            alpha = alphas(module, pair.rank) if math.isnan(whole.alpha) else whole.alpha
            _add(pairs, module, pair._replace(alpha=alpha))
    thirds = sum(name.endswith("in_proj") for name in groups)
    if thirds:
        told = "%s: %d merged in_proj are split into q, k and v, each with the matrix A of all three, which is exact"
        log.info(told, source.path, thirds)
    return form, pairs, meta


def _add(pairs: dict[str, Pair], module: str, pair: Pair) -> None:
    """PEFT's files may hold a text encoder's tensors twice, under both spellings of their names."""
    there = pairs.setdefault(module, pair)
    same = there is pair or (np.array_equal(there.down, pair.down) and np.array_equal(there.up, pair.up))
    if not same or there.alpha != pair.alpha:
        raise FileError(f"holds {escaped(module)} twice, in two ways")


def _stated(strings: Strings) -> Strings:
    """What the file says, kohya's words included, without digests of it. FileError where it contradicts itself."""
    said = {key: text for key, text in strings.items() if key != peft_config.METADATA and not key.startswith("sshs_")}
    if strings.get("ss_v_parameterization") == "True":
        said.setdefault("prediction_type", own_name(DIFFUSERS_NAMES["v"]))
    if strings.get("ss_zero_terminal_snr") == "True":
        said.setdefault("schedule", json.dumps({"zero_terminal_snr": True}))
    try:
        return metadata.stated({}, said)
    except ValueError as error:
        raise FileError(f"contradicts itself: {escaped(error, 300)}") from None


def stated_layout(path: str | Path, modules: Collection[str], meta: Strings, depth: int) -> Layout:
    """How the names in an adapter's file are meant: as the model's config in it says, or as the names let us guess.

    Args:
        path: the file, for messages.
        modules: the names of its modules, inside or in the file.
        meta: what the file says of itself.
        depth: the guessed number of residual blocks at each level of the UNet.

    Raises:
        UserError: the config in it cannot be read.
    """
    xl, model = bool(family(path, modules, meta)), metadata.model_section(path, meta) or {}
    unet = model.get("unet")
    if not isinstance(unet, dict):
        return naming.file_layout(depth, xl)
    blocks = unet.get("num_res_blocks", 2)
    usable = type(blocks) is int and 0 < blocks < 10
    return naming.file_layout(blocks if usable else depth, xl, refiner=xl and model.get("text_2") is None)


def family(path: str | Path, modules: Collection[str], meta: Strings) -> bool | None:
    """Whether an adapter is of SDXL's family, by its words or by the names of its modules; None where none tell.

    UserError where the config in it cannot be read.
    """
    unet = (metadata.model_section(path, meta) or {}).get("unet")
    if isinstance(unet, dict):
        return unet.get("adm_in_channels") is not None
    return meta.get("ss_base_model_version", "").startswith("sdxl") or naming.is_xl(modules)


def _part(groups: dict[str, Tensors]) -> str:
    """What a PEFT folder of one part is of."""
    text = all(name.startswith(("text_model.", "encoder.")) for name in groups)
    return "text_encoder" if text else "unet"


def _alphas(form: str, source: Source, strings: Strings, scale: float) -> Callable[[str, int], float]:
    """(module, rank) -> alpha, for modules whose alpha is not among the tensors."""
    if form == "mindone":
        return lambda module, rank: scale * rank
    if form == "peft":
        if source.config is None:
            raise FileError(f"has PEFT's names but no {CONFIG} beside it, which says its scale: give PEFT's folder")
        scales = peft_config.read(peft_config.parse(source.config, f"has a {CONFIG} that"), f"has a {CONFIG} that")
        return scales.alpha_of
    if form == "diffusers" and peft_config.METADATA in strings:
        return _by_part(peft_config.parse(strings[peft_config.METADATA], f"has a {peft_config.METADATA} that"))
    return lambda module, rank: float(rank)


def _by_part(table: dict) -> Callable[[str, int], float]:
    parts = {part: config for part in naming.PREFIXES if (config := peft_config.of_part(table, part))}
    scales = {part: peft_config.read(config, f"has a {peft_config.METADATA} that") for part, config in parts.items()}

    def alpha_of(module: str, rank: int) -> float:
        part, _, name = module.partition(".")
        return scales[part].alpha_of(name, rank) if part in scales else float(rank)

    return alpha_of


# ---- one module ----


def _pair(name: str, group: Tensors) -> Pair:
    """The module's two matrices, checked. alpha is NaN where it is not among the tensors."""
    down, up = group.get("down"), group.get("up")
    if down is None or up is None:
        raise FileError(f"is damaged: {escaped(name)} has no {'A (down)' if down is None else 'B (up)'}")
    if down.dtype.kind != "f" or up.dtype.kind != "f":
        raise FileError(f"holds {escaped(name)} as {down.dtype} and {up.dtype}, not as floating-point numbers")
    shapes = f"A {down.shape}, B {up.shape}"
    if down.ndim not in (2, 4) or down.ndim != up.ndim or any(n != 1 for n in up.shape[2:]):
        raise FileError(f"is damaged: {escaped(name)} has {shapes}, which are no LoRA's")
    if up.shape[1] != down.shape[0] or not down.size or not up.size:
        raise FileError(f"is damaged: {escaped(name)} has {shapes}, which do not multiply or have rank 0")
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise FileError(f"is damaged: {escaped(name)} holds NaN or infinity; fetch it again")
    return Pair(down, up, _alpha(name, group["alpha"], len(down)) if "alpha" in group else math.nan)


def _alpha(name: str, array: np.ndarray, rank: int) -> float:
    """kohya's: 0 stands for the rank."""
    if array.size != 1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise FileError(f"is damaged: {escaped(name)} has an alpha that is no finite number")
    return float(array.reshape(())) or float(rank)


def _without_padding(pair: Pair) -> Pair:
    """MindONE has one rank for all layers; what fills up a smaller one is zero in both matrices."""
    used = pair.up.any(0) | pair.down.any(1)
    return pair._replace(down=pair.down[used], up=pair.up[:, used]) if used.any() and pair.up.ndim == 2 else pair


def _third(pair: Pair, which: int) -> Pair:
    """q, k or v of a merged in_proj. What the others alone use of the rank is left out."""
    if len(pair.up) % 3 or pair.up.ndim != 2:
        raise FileError(f"is damaged: an in_proj has B {pair.up.shape}, which is not q, k and v")
    parts = np.split(pair.up, 3)
    mine = parts[which].any(0)
    foreign = ~mine & pair.up.any(0)
    if not mine.any() or not foreign.any():
        return pair._replace(up=parts[which])
    return Pair(pair.down[~foreign], parts[which][:, ~foreign], pair.alpha)
