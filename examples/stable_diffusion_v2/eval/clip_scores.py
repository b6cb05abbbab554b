"""CLIP's features of pictures and texts, and the scores that eval_clip_score.py computes from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.clip import CLIP, preprocess
from eval.pictures import ahead, decode
from ldm.parallel.ranks import Ranks

UNCHANGED = 1e-6  # a difference of unit vectors that is shorter has no direction
SCALES = {
    "clip_score": "100 * max(cosine, 0)",
    "clip_i": "100 * max(cosine, 0)",
    "directional_similarity": "cosine, -1 to 1",
}


# ---- features ----


def image_features(model: CLIP, paths: list[Path], batch_size: int) -> np.ndarray:
    """Unit vectors float32 [N, features]; threads decode up to two batches ahead of the network."""
    size = min(batch_size, len(paths))
    work = ahead(lambda path: preprocess(decode(path), model.config.image.size), paths, 2 * size)
    rows, batch = [], []
    for _, future in tqdm(work, total=len(paths), unit="picture", desc="pictures"):
        batch.append(future.result())
        if len(batch) == size or len(rows) + len(batch) == len(paths):
            filled = batch + batch[-1:] * (size - len(batch))  # the graph is compiled for one size
            rows.extend(model.image_features(np.stack(filled))[: len(batch)])
            batch = []
    return unit(np.stack(rows))


def text_features(model: CLIP, texts: list[str], batch_size: int) -> np.ndarray:
    """Unit vectors float32 [N, features]."""
    size, rows = min(batch_size, len(texts)), []
    for start in tqdm(range(0, len(texts), size), unit="batch", desc="prompts"):
        batch = texts[start : start + size]
        rows.extend(model.text_features(batch + batch[-1:] * (size - len(batch)))[: len(batch)])
    return unit(np.stack(rows))


def features_of_each(features: Callable, model: CLIP, items: list, batch_size: int) -> np.ndarray:
    """The features [N, features] of a list with repeated items; each different item is computed once."""
    different = list(dict.fromkeys(items))
    place = {item: i for i, item in enumerate(different)}
    return features(model, different, batch_size)[[place[item] for item in items]]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows [..., features] divided by their lengths."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- scores ----


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of each pair of rows, float64 [N], for unit vectors [N, features]."""
    return np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))


def scaled(cosine: np.ndarray) -> np.ndarray:
    """100 * max(cosine, 0)."""
    return 100 * np.maximum(cosine, 0)


def directional(images: np.ndarray, sources: np.ndarray, texts: np.ndarray, source_texts: np.ndarray) -> np.ndarray:
    """The cosine between the change of the pictures and the change of the texts (arXiv 2108.00946, equation 2).

    All are unit vectors [N, features]. Returns float64 [N]; it is 0 where the pictures or the texts did not change.
    """
    changes = [images.astype(np.float64) - sources, texts.astype(np.float64) - source_texts]
    lengths = np.linalg.norm(changes, axis=-1)  # [2, N]
    lengths[lengths < UNCHANGED] = np.inf
    return np.einsum("nd,nd->n", *changes) / lengths.prod(0)


def summary(scores: np.ndarray, scale: str) -> dict:
    """The mean and its standard error, which is None for one picture."""
    error = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
    return {"mean": float(scores.mean()), "standard_error": error, "pictures": len(scores), "scale": scale}


# ---- all scores of a run ----


def compute_scores(model: CLIP, lists: dict[str, list], batch_size: int) -> dict[str, np.ndarray]:
    """Name -> scores, float64 [N], of every score that the lists of `clip_inputs.list_inputs` allow."""
    images, scores = features_of_each(image_features, model, lists["images"], batch_size), {}
    if "prompts" in lists:
        prompts = lists["prompts"] + lists.get("source_prompts", [])
        texts = features_of_each(text_features, model, prompts, batch_size)
        scores["clip_score"] = scaled(cosines(images, texts[: len(images)]))
    if "references" in lists:
        references = features_of_each(image_features, model, lists["references"], batch_size)
        scores["clip_i"] = scaled(cosines(images, references))
    if "sources" in lists:
        sources = features_of_each(image_features, model, lists["sources"], batch_size)
        both = texts[: len(images)], texts[len(images) :]
        scores["directional_similarity"] = directional(images, sources, *both)
    return scores


def compute_scores_over_ranks(
    model: CLIP, lists: dict[str, list], batch_size: int, ranks: Ranks
) -> dict[str, np.ndarray]:
    """The same scores from several ranks: each computes its share of the pictures, then every rank has all scores."""
    own = {name: ranks.share(items) for name, items in lists.items()}
    scores = compute_scores(model, own, batch_size) if own["images"] else {}
    parts = [part for part in ranks.gather("scores", {name: row.tolist() for name, row in scores.items()}) if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
