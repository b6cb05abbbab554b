"""Adapters added to a checkpoint's weights, and the difference of two checkpoints as an adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ldm.checkpoint.arrays import Tensors, release, widened
from ldm.checkpoint.lora import naming
from ldm.checkpoint.lora.adapter import Adapter, Pair
from ldm.checkpoint.lora.naming import Layout
from ldm.checkpoint.lora.reading import family
from ldm.checkpoint.names import is_extra
from ldm.errors import UserError
from ldm.files import escaped, quoted
from ldm.parts import TEXT, UNET

log = logging.getLogger(__name__)

# The layers that kohya's scripts train: all linear ones of a transformer, and the 1x1 convolutions around it.
_LINEAR = re.compile(r".*(\.transformer_blocks\.\d+\..+|\.proj_(in|out)|\.self_attn\.\w+|\.mlp\.fc[12])")


def check_type(adapter: Adapter, prediction_type: str) -> None:
    """UserError where an adapter says that it was trained with another prediction type than the model's."""
    said = adapter.meta.get("prediction_type")
    if said not in (None, prediction_type):
        raise UserError(
            f"{adapter.origin} was trained with prediction_type {quoted(said)}, the model with '{prediction_type}': "
            "choose a LoRA of this model"
        )


def merged(tensors: Tensors, adapters: Sequence[tuple[Adapter, float]]) -> Tensors:
    """A checkpoint's tensors with adapters added, each times its weight.

    W + sum of weight * alpha / rank * B A is computed in float64 and rounded once. Tensors that are changed are new
    ones in float32 (float64 stays so); all others are the same objects as before.

    Args:
        tensors: by our names.
        adapters: pairs of an adapter and its weight.

    Raises:
        UserError: an adapter has a layer that is not there, or of another shape.
    """
    layout = naming.layout_of(tensors)
    added: dict[str, list[tuple[int | None, Pair, float]]] = {}
    for adapter, weight in adapters:
        places = {module: naming.parameter(module, layout) for module in adapter.pairs}
        _check_fit(adapter, places, tensors, layout)
        for module, (name, which) in places.items():
            added.setdefault(name, []).append((which, adapter.pairs[module], weight))
    return {**tensors, **{name: _sum(tensors[name], each) for name, each in added.items()}}


def check_family(adapter: Adapter, layout: Layout) -> None:
    """UserError where an adapter is of SDXL and the model is not, or the reverse. An adapter need not tell."""
    xl = family(adapter.origin, adapter.pairs, adapter.meta)
    if xl is not None and xl != layout.xl:
        words = {True: "SDXL", False: "Stable Diffusion 1.x or 2.x"}
        raise UserError(
            f"{adapter.origin} is a LoRA of {words[xl]}, the model is of {words[layout.xl]}: "
            "choose a LoRA of this model"
        )


def _check_fit(adapter: Adapter, places: dict[str, tuple[str, int | None]], tensors: Tensors, layout: Layout) -> None:
    unknown = [module for module, (name, _) in places.items() if name not in tensors]
    wrong = []
    for module, (name, which) in places.items():
        if name not in tensors:
            continue
        shape = np.shape(tensors[name])
        wanted = (shape[0] // 3, *shape[1:]) if which is not None else shape
        if _plain(adapter.pairs[module].shape) != _plain(wanted):
            wrong.append(f"{escaped(module, 200)} is for {adapter.pairs[module].shape}, model has {wanted}")
    if unknown or wrong:
        check_family(adapter, layout)
        missing = ", ".join(escaped(module, 200) for module in unknown[:2])
        told = [f"{len(unknown)} of its {len(places)} layers are not in it (first: {missing})"] if unknown else []
        told += [f"{len(wrong)} have another shape (first: {wrong[0]})"] if wrong else []
        raise UserError(f"{adapter.origin} does not fit this model: {', '.join(told)}; is it of another base?")


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's is that of a linear layer, and the other way round."""
    return shape if any(n != 1 for n in shape[2:]) else shape[:2]


def _sum(weight: np.ndarray, added: list[tuple[int | None, Pair, float]]) -> np.ndarray:
    total = widened(weight).astype(np.float64)
    for which, pair, factor in added:
        rows = slice(None) if which is None else slice(which * len(total) // 3, (which + 1) * len(total) // 3)
        part = total[rows]
        part += factor * pair.product().reshape(part.shape)
    release(weight)
    return total.astype(weight.dtype if weight.dtype == np.float64 else np.float32)


# ---- the difference of two checkpoints ----


def difference(tensors: Tensors, base: Tensors, rank: int, modules: Collection[str] | None = None) -> Adapter:
    """What was added to `base` to make `tensors`, as the nearest adapter of a rank.

    The best approximation of that rank is by the singular vectors (Eckart and Young). They come from the eigenvectors
    of D D^T or D^T D, whichever is smaller, in float64. Layers that did not change are left out. A line says how much
    of the whole difference the adapter holds.

    Args:
        tensors, base: by our names, of the same model.
        rank: of every layer, or the layer's smaller side.
        modules: which layers; by default all linear ones of the transformers and the text encoders.

    Raises:
        UserError: the two are of different models, or nothing differs.
    """
    _check_same(tensors, base)
    layout, pairs = naming.layout_of(base), {}
    whole = kept = 0.0
    for name in base:
        if not name.startswith((UNET, TEXT)) or is_extra(name):
            continue
        change = widened(tensors[name]).astype(np.float64) - widened(base[name]).astype(np.float64)
        release(tensors[name])
        release(base[name])
        whole += float(np.vdot(change, change))
        if not np.isfinite(whole):
            raise UserError(f"NaN or infinity in {escaped(name)}: there is no difference to take")
        for module, part in _modules(name, change, layout) if change.ndim >= 2 else ():
            wanted = _LINEAR.fullmatch(module) if modules is None else module in modules
            if wanted and part.any():
                pairs[module] = _nearest(part, rank)
                kept += float(np.square(pairs[module].product()).sum())
    if not pairs:
        raise UserError("the two checkpoints differ in no layer that a LoRA changes: nothing is written")
    told = "a LoRA of rank %d in %d layers holds %.1f %% of the squared difference"
    log.info(told, rank, len(pairs), 100 * kept / whole)
    return Adapter(pairs, {}, "diffusers")


def _check_same(tensors: Tensors, base: Tensors) -> None:
    ours = [name for name in base if name.startswith((UNET, TEXT)) and not is_extra(name)]
    wrong = [name for name in ours if name not in tensors or tensors[name].shape != base[name].shape]
    if wrong or not ours:
        raise UserError(
            f"the two checkpoints are of different models: {len(wrong)} of {len(ours)} tensors of the second are "
            f"missing or of another shape in the first (first: {escaped((wrong or ['none'])[0])})"
        )


def _modules(name: str, change: np.ndarray, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """The modules whose weight a parameter is, each with its own part of it."""
    if not name.endswith("in_proj_weight"):
        yield naming.module(name, layout), change
        return
    for which, part in enumerate(np.split(change, 3)):
        yield naming.module(name, layout, which), part


def _nearest(change: np.ndarray, rank: int) -> Pair:
    """The matrices A and B of a rank whose product is nearest; their rows and columns are of equal length."""
    flat = change.reshape(len(change), -1)
    rank = min(rank, *flat.shape)
    wide = flat.shape[0] <= flat.shape[1]
    _, vectors = np.linalg.eigh(flat @ flat.T if wide else flat.T @ flat)
    best = vectors[:, : -rank - 1 : -1]  # of the largest eigenvalues, [smaller side, r]
    up, down = (best, best.T @ flat) if wide else (flat @ best, best.T)
    sizes = np.sqrt(np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1))
    up = up * (sizes / np.maximum(np.linalg.norm(up, axis=0), 1e-300))
    down = down * (sizes / np.maximum(np.linalg.norm(down, axis=1), 1e-300))[:, None]
    ends = (1,) * (change.ndim - 2)
    return Pair(
        down.reshape(rank, *change.shape[1:]).astype(np.float32),
        up.reshape(len(up), rank, *ends).astype(np.float32),
        float(rank),
    )
