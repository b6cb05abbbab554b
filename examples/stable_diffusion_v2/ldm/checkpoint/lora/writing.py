"""Adapters to files and folders, in any of FORMS."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ldm.checkpoint import formats, metadata
from ldm.checkpoint.arrays import Strings, Tensors, stored_type
from ldm.checkpoint.lora import naming, peft_config
from ldm.checkpoint.lora.adapter import FORMS, Adapter, Pair
from ldm.checkpoint.lora.naming import Layout
from ldm.checkpoint.lora.reading import CONFIG, stated_layout
from ldm.diffusion.prediction import DIFFUSERS_NAMES, own_name
from ldm.errors import UserError
from ldm.files import escaped, replacing_folder

log = logging.getLogger(__name__)

_FOLDERS = {"unet": "unet", "text_encoder": "text_encoder_one", "text_encoder_2": "text_encoder_two"}
_V = own_name(DIFFUSERS_NAMES["v"])


def form_of(path: str | Path, form: str | None = None) -> str:
    """The form that a name asks for: .ckpt is MindONE's, .safetensors diffusers' or kohya's, any other PEFT's folder.

    Args:
        form: the user's choice, if any.

    Raises:
        UserError: the choice and the name do not go together.
    """
    suffix = Path(path).suffix
    allowed = {".ckpt": ("mindone",), ".safetensors": ("diffusers", "kohya")}.get(suffix, ("peft",))
    if form is not None and form not in allowed:
        wanted = {"mindone": "NAME.ckpt", "peft": "the name of a folder"}.get(form, "NAME.safetensors")
        raise UserError(f"{path}: a LoRA in the form {form!r} wants {wanted} as its destination")
    return form or allowed[0]


def save(
    path: str | Path, adapter: Adapter, form: str, dtype: str | None = "float32", scale: float = 1.0, **facts: str
) -> None:
    """Write an adapter, whole or not at all, in the place of one that is there.

    Args:
        path: PEFT's is a folder, the others are files.
        form: one of FORMS.
        dtype: NumPy's name of the type of the matrices, None for their own. Matrices with numbers that are too large
            for it are written in float32.
        scale: for MindONE's file, which holds no alpha: the --lora_scale that it is to be drawn with.
        facts: words beside those in `adapter.meta`, as in `checkpoint.save`.

    Raises:
        UserError: something else is there, a layer has no place in that form, or the disk refuses.
    """
    if form not in FORMS:
        raise UserError(f"unknown form of a LoRA {form!r}; choose one of {', '.join(FORMS)}")
    if not adapter.pairs:
        raise ValueError("an adapter without layers")
    meta = {key: text for key, text in {**adapter.meta, **facts}.items() if key and text}
    pairs = {name: _as_type(pair, dtype) for name, pair in adapter.pairs.items()}
    layout = stated_layout(path, pairs, meta, naming.depth_of_levelled(pairs))
    if form == "mindone":
        tensors = _mindone_tensors(path, pairs, layout, scale)
        formats.write(path, {name: _as(array, dtype) for name, array in tensors.items()}, meta, "mindspore")
    elif form == "peft":
        _write_peft(Path(path), pairs, meta)
    elif form == "kohya":
        _tell_of_alphas(path, pairs)
        words = _kohya_words(path, pairs, meta, layout)
        formats.write(path, _kohya_tensors(pairs, layout), {**meta, **words}, "safetensors")
    else:
        described = {"format": "pt", peft_config.METADATA: json.dumps(_metadata(pairs), sort_keys=True)}
        formats.write(path, _tensors(pairs), {**meta, **described}, "safetensors")


def _as_type(pair: Pair, dtype: str | None) -> Pair:
    return pair._replace(down=_as(pair.down, dtype), up=_as(pair.up, dtype))


def _as(array: np.ndarray, dtype: str | None) -> np.ndarray:
    return array.astype(stored_type(array, dtype), copy=False)


def _tensors(pairs: dict[str, Pair]) -> Tensors:
    """By the names that PEFT and diffusers have for A and B."""
    downs = {f"{name}.lora_A.weight": pair.down for name, pair in pairs.items()}
    return {**downs, **{f"{name}.lora_B.weight": pair.up for name, pair in pairs.items()}}


def _by_part(pairs: dict[str, Pair]) -> dict[str, dict[str, Pair]]:
    """The pairs of each part, without the part's name before theirs."""
    parts: dict[str, dict[str, Pair]] = {}
    for module, pair in pairs.items():
        part, _, name = module.partition(".")
        parts.setdefault(part, {})[name] = pair
    return parts


def _short_names(part: str, pairs: dict[str, Pair]) -> dict[str, Pair]:
    """PEFT finds modules by the ends of their names: without ``text_model.`` old and new text encoders have them."""
    return {name.removeprefix("text_model.") if part == "text_encoder" else name: p for name, p in pairs.items()}


# ---- PEFT and diffusers ----


def _write_peft(folder: Path, pairs: dict[str, Pair], meta: Strings) -> None:
    there = [(folder / name / CONFIG).is_file() for name in _FOLDERS.values()]
    if folder.exists() and not any(there) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no LoRA; remove it or give another name")
    with replacing_folder(folder) as place:
        for part, own in _by_part(pairs).items():
            where = place / _FOLDERS[part]
            where.mkdir()
            short = _short_names(part, own)
            (where / CONFIG).write_text(peft_config.adapter_config(short), encoding="utf-8")
            both = {**own, **short}  # transformers before 5.6 wants one spelling, later versions the other
            tensors = _tensors({f"base_model.model.{name}": pair for name, pair in both.items()})
            formats.write(where / "adapter_model.safetensors", tensors, {**meta, "format": "pt"}, "safetensors")


def _metadata(pairs: dict[str, Pair]) -> dict:
    table = {}
    for part, own in _by_part(pairs).items():
        config = peft_config.write(_short_names(part, own))
        table.update({f"{part}.{key}": value for key, value in config.items()})
    return table


# ---- kohya ----


def _kohya_tensors(pairs: dict[str, Pair], layout: Layout) -> Tensors:
    tensors = {}
    for module, pair in pairs.items():
        name = naming.kohya_name(module, layout)
        exact = np.float32(pair.alpha) == pair.alpha
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = pair.down, pair.up
        tensors[f"{name}.alpha"] = np.array(pair.alpha, np.float32 if exact else np.float64)
    return tensors


def _tell_of_alphas(path: str | Path, pairs: dict[str, Pair]) -> None:
    if len({pair.alpha for pair in pairs.values()}) > 1:
        told = "%s: its layers have different alphas, which kohya's scripts read; diffusers takes one for almost all"
        log.warning(told, path)


def _kohya_words(path: str | Path, pairs: dict[str, Pair], meta: Strings, layout: Layout) -> Strings:
    """What kohya's scripts and others that read their files look for."""
    said = meta.get("prediction_type")
    kind, base = _base(_context_width(pairs, layout), said, layout)
    ranks, alphas = {pair.rank for pair in pairs.values()}, {pair.alpha for pair in pairs.values()}
    told = {
        "ss_v2": str(base is not None and base.startswith("sd_v2")),
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": repr(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
        "ss_v_parameterization": str(said == _V) if said else None,
        "ss_zero_terminal_snr": str(bool(metadata.schedule(path, meta).get("zero_terminal_snr"))),
    }
    return {**{key: text for key, text in told.items() if text}, **metadata.modelspec(f"{kind}/lora", meta, path)}


# kohya's names of the models of their size; others have none.
_BASES = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}


def _base(context_width: int, prediction_type: str | None, layout: Layout) -> tuple[str, str | None]:
    """ModelSpec's and kohya's names of the model that an adapter is of."""
    if layout.xl and not context_width:
        context_width = 2048 if "text_encoder" in layout.texts else 1280
    kind = metadata.family(context_width, prediction_type)
    return kind, _BASES.get(kind)


def _context_width(pairs: dict[str, Pair], layout: Layout) -> int:
    """Of what the UNet is told of texts, by the UNet's layers or all text encoders'; 0 where they do not tell."""
    keys = (pair.shape[1] for module, pair in pairs.items() if module.endswith(("attn2.to_k", "attn2.to_v")))
    text = {
        module.partition(".")[0]: pair.shape[1]
        for module, pair in pairs.items()
        if module.endswith((".self_attn.q_proj", ".mlp.fc1"))
    }
    return next(keys, sum(text.values()) if text.keys() == layout.texts.keys() else 0)


# ---- MindONE ----


def _mindone_tensors(path: str | Path, pairs: dict[str, Pair], layout: Layout, scale: float) -> Tensors:
    """MindONE's tensors: alpha is in B, and all ranks are the largest one.

    q, k and v of an OpenCLIP text encoder are one, in files of SD 1.x and 2.x.
    """
    layers: dict[str, dict[int | None, Pair]] = {}
    for module, pair in pairs.items():
        name, which = naming.mindone_name(module, layout)
        layers.setdefault(name, {})[which] = pair
    _check_mindone_layers(path, layers, layout)
    folded = {name: {which: _folded(pair, scale) for which, pair in each.items()} for name, each in layers.items()}
    whole = {name: each[None] if None in each else _joined(each) for name, each in folded.items()}
    rank = max(pair.rank for pair in whole.values())
    _tell(path, layers, whole, rank, scale)
    tensors = {} if layout.xl else {"lora_rank": np.array(rank, np.int64)}
    down, up = ("lora_A", "lora_B") if layout.xl else ("lora_down", "lora_up")
    for name, pair in whole.items():
        fill = rank - pair.rank
        tensors[f"{name}.{down}.weight"] = np.pad(pair.down, ((0, fill), (0, 0)))
        tensors[f"{name}.{up}.weight"] = np.pad(pair.up, ((0, 0), (0, fill)))
    return tensors


def _check_mindone_layers(path: str | Path, layers: Collection[str], layout: Layout) -> None:
    allowed = naming.MINDONE_XL_LAYERS if layout.xl else naming.MINDONE_LAYERS
    foreign = [name for name in layers if not name.endswith(allowed)]
    if foreign:
        but = " (of SDXL's second text encoder: out_proj alone)" if layout.xl else ""
        raise UserError(
            f"{path}: MindONE's LoRA has attention layers alone{but}, and {len(foreign)} of {len(layers)} are others "
            f"(first: {escaped(foreign[0])}); choose another --lora_format"
        )


def _folded(pair: Pair, scale: float) -> Pair:
    """The same product with alpha = scale * rank."""
    factor = pair.scale / scale
    up = pair.up if factor == 1 else (pair.up * np.float64(factor)).astype(np.promote_types(pair.up.dtype, np.float32))
    return Pair(pair.down, up, scale * pair.rank)


def _joined(thirds: dict[int, Pair]) -> Pair:
    """q, k and v as one: of their own rank where they share A, else of the sum of their ranks, in blocks."""
    first = next(iter(thirds.values()))
    rows = len(first.up)
    shared = len(thirds) == 3 and all(np.array_equal(first.down, pair.down) for pair in thirds.values())
    if shared:
        return Pair(first.down, np.concatenate([thirds[which].up for which in range(3)]), first.alpha)
    up = np.zeros((3 * rows, sum(pair.rank for pair in thirds.values())), first.up.dtype)
    end = 0
    for which, pair in thirds.items():
        up[which * rows : (which + 1) * rows, end : end + pair.rank] = pair.up
        end += pair.rank
    return Pair(np.concatenate([pair.down for pair in thirds.values()]), up, first.scale * end)


def _tell(path: str | Path, layers: dict, whole: dict[str, Pair], rank: int, scale: float) -> None:
    """A line for each thing that MindONE's form does otherwise."""
    largest = max(pair.rank for each in layers.values() for pair in each.values())
    if rank > largest:
        log.info("%s: q, k and v become one in_proj in blocks, which is exact: rank %d, not %d", path, rank, largest)
    if any(pair.rank < rank for pair in whole.values()):
        log.info("%s: MindONE has one rank for all layers: smaller ones are filled up to %d with zeros", path, rank)
    factors = {pair.scale / scale for each in layers.values() for pair in each.values()}
    if any(np.frexp(abs(factor))[0] not in (0, 0.5) for factor in factors):  # no power of two
        told = "%s: MindONE's file holds no alpha: B is multiplied by alpha / rank / --lora_scale (%.6g) and rounded"
        log.info(told, path, max(factors))
