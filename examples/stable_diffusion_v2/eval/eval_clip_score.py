"""CLIP score, CLIP-I and directional similarity: how well pictures fit their prompts and real pictures.

python eval/eval_clip_score.py --image_path output/samples --prompt prompts.txt --load_checkpoint models/ViT-L-14.pt
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from eval.clip import ACTIVATIONS, CLIP, config_of, preprocess
from eval.clip_weights import find, read, stated_activation
from eval.pictures import ahead, decode, find_pictures, find_record
from ldm import runtime
from ldm.config.options import Parser, read_options, require_at_least, str2bool
from ldm.data.images import BadImageError, check_image
from ldm.data.prompts import read_lines
from ldm.errors import UserError
from ldm.files import replacing
from ldm.parallel.ranks import Ranks
from ldm.pictures import RECORD, read_facts, read_record

log = logging.getLogger("eval_clip_score")

FROM_PNG = "from_png"
UNCHANGED = 1e-6  # lengths of a difference of unit vectors below which it has no direction
SCALES = {
    "clip_score": "100 * max(cosine, 0)",
    "clip_i": "100 * max(cosine, 0)",
    "directional_similarity": "cosine, -1 to 1",
}
WITHOUT_EFFECT = {
    "config": "the checkpoint's shapes tell the model",
    "backend": "there is one backend, MindSpore",
    "model_name": "it belongs to MindONE's PyTorch backend",
    "tokenizer_path": "CLIP's vocabulary is built in",
    "check_certificate": "nothing is downloaded",
    "save_result": "--output says whether and where",
    "result_path": "--output says where",
    "quiet": "single scores are in the file of --output only",
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--image_path", "--image_path_or_dir", required=True, help="a picture, or a folder of them")
    add(
        "--prompt",
        "--prompt_or_path",
        help=f"a text, a file with one prompt per line, the {RECORD} that text_to_image.py leaves, or {FROM_PNG}: what "
        f"it wrote into each picture (default: {RECORD} in the folder of the pictures)",
    )
    add("--load_checkpoint", "--ckpt_path", help="CLIP's file or folder (default: the first published one in models/)")
    add("--activation", choices=list(ACTIVATIONS), help="default: as the checkpoint's config or its size says")
    add("--batch_size", type=int, default=32, help="pictures or texts at once; changes the speed, not the scores")
    add("--reference_path", help="real pictures, one for each picture or for each group of them: CLIP-I")
    add("--source_prompt", help="for directional similarity: a text or a file, what the source pictures show")
    add("--source_path", help="for directional similarity: the pictures that --image_path was made from")
    add("--output", help="a JSON file for the results, with the score of every picture")
    add("--device_target", choices=runtime.DEVICES, help="default: Ascend where there is one, else CPU")
    add("--mode", "--ms_mode", type=int, choices=(0, 1), default=0, help="0: graph, 1: PyNative")
    add("--use_parallel", type=str2bool, default=False, help="with scripts/run_clip_score_distributed.sh: one of many")
    parser.ignore(WITHOUT_EFFECT)
    return parser


# ---- what is compared with what ----


def pictures(path: str) -> list[Path]:
    """The picture, or the folder's in order of the numbers in their names; UserError where one is unreadable."""
    found = [Path(path)] if os.path.isfile(path) else find_pictures(path)
    found.sort(key=_by_number)
    bad = []
    for picture in found:
        try:
            check_image(str(picture))
        except BadImageError as error:
            bad.append(str(error))
    if bad:
        raise UserError(f"{len(bad)} of {len(found)} pictures cannot be used, the first: {bad[0]}")
    return found


def _by_number(path: Path) -> list:
    """9.png comes before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def read_prompts(prompt: str) -> list[str]:
    """One text, or the lines of a file that are not blank; UserError where it is unreadable or empty."""
    is_file = os.path.isfile(prompt) or prompt.endswith(".txt")
    lines = [line for line in (read_lines(prompt) if is_file else [prompt.strip()]) if line]
    if not lines:
        raise UserError(f"no prompt in {prompt!r}: give a text, or a file with one prompt per line")
    return lines


def own_prompt(path: Path) -> str:
    """The prompt that text_to_image.py wrote into a picture; UserError where there is none."""
    return _prompt_of(read_facts(path), path)


def recorded_prompts(record: Path, images: list[Path]) -> list[str]:
    """The prompt of each picture by the line of its file's name, or its own where there is no such line.

    Raises:
        UserError: the record cannot be read, two pictures have one name, or one has no prompt in either place.
    """
    lines = read_record(record)
    if len({path.name for path in images}) < len(images):
        raise UserError(f"{record} goes by file names, and some pictures share theirs: measure folder by folder")
    return [_prompt_of(lines.get(path.name) or read_facts(path), path) for path in images]


def _prompt_of(facts: dict, path: Path) -> str:
    if not isinstance(facts.get("prompt"), str):
        raise UserError(f"{path} does not say its prompt: give prompts as a text file, one per line, in their order")
    return facts["prompt"]


def matched(items: list, number: int, what: str) -> list:
    """Items repeated so that there are `number` of them, neighbours sharing one; UserError where that leaves a rest."""
    if number % len(items):
        raise UserError(
            f"{number} pictures cannot be matched to {len(items)} {what}: give as many, or a divisor of that"
        )
    return [item for item in items for _ in range(number // len(items))]


def check_options(args: argparse.Namespace) -> None:
    require_at_least(1, args, "batch_size")
    if (args.source_prompt is None) != (args.source_path is None):
        raise UserError("directional similarity needs both --source_prompt and --source_path")
    if args.source_prompt is not None and args.prompt is None:
        raise UserError("directional similarity needs --prompt, what the new pictures shall show")
    if args.prompt is None and args.reference_path is None:
        path = Path(args.image_path)
        record = find_record(path if path.is_dir() else path.parent)
        if not record:
            raise UserError("nothing to compare with: give --prompt (CLIP score) or --reference_path (CLIP-I)")
        args.prompt = str(record)
    if args.output and not os.access(Path(args.output).parent, os.W_OK):
        raise UserError(f"cannot write {args.output}: its folder is not there or not writable")


# ---- features ----


def image_features(model: CLIP, paths: list[Path], batch_size: int) -> np.ndarray:
    """Unit vectors float32 [N, features]; threads decode ahead of the network, two batches at most."""
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


def once_each(features: Callable, model: CLIP, items: list, batch_size: int) -> np.ndarray:
    """The features of a list in which items come again, computed once for each."""
    different = list(dict.fromkeys(items))
    place = {item: i for i, item in enumerate(different)}
    return features(model, different, batch_size)[[place[item] for item in items]]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- scores ----


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of unit vectors [N, features], row by row, float64 [N]."""
    return np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))


def scaled(cosine: np.ndarray) -> np.ndarray:
    """100 * max(cosine, 0)."""
    return 100 * np.maximum(cosine, 0)


def directional(images: np.ndarray, sources: np.ndarray, texts: np.ndarray, source_texts: np.ndarray) -> np.ndarray:
    """The cosine between what changed in the pictures and what changed in the texts (arXiv 2108.00946, equation 2).

    All are unit vectors [N, features]; returns float64 [N], 0 where pictures or texts did not change at all.
    """
    steps = [images.astype(np.float64) - sources, texts.astype(np.float64) - source_texts]
    lengths = np.linalg.norm(steps, axis=-1)  # [2, N]
    lengths[lengths < UNCHANGED] = np.inf
    return np.einsum("nd,nd->n", *steps) / lengths.prod(0)


def summary(scores: np.ndarray, scale: str) -> dict:
    """Mean and its standard error, which one picture does not have."""
    error = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
    return {"mean": float(scores.mean()), "standard_error": error, "pictures": len(scores), "scale": scale}


# ---- the whole ----


def plan(args: argparse.Namespace) -> dict[str, list]:
    """The lists of pictures and texts of the run; all are as long as that of the pictures that are judged."""
    images = pictures(args.image_path)
    lists: dict[str, list] = {"images": images}
    if args.prompt == FROM_PNG:
        lists["prompts"] = [own_prompt(path) for path in images]
    elif args.prompt is not None and args.prompt.endswith(".jsonl"):
        lists["prompts"] = recorded_prompts(Path(args.prompt), images)
    elif args.prompt is not None:
        lists["prompts"] = matched(read_prompts(args.prompt), len(images), "prompts")
    if args.source_prompt is not None:
        lists["source_prompts"] = matched(read_prompts(args.source_prompt), len(images), "source prompts")
        lists["sources"] = matched(pictures(args.source_path), len(images), "source pictures")
    if args.reference_path is not None:
        lists["references"] = matched(pictures(args.reference_path), len(images), "reference pictures")
    return lists


def load_model(path: Path, activation: str | None) -> CLIP:
    """The CLIP of a checkpoint; UserError where it is none."""
    tensors = read(path)
    try:
        config = config_of(tensors, activation or stated_activation(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model = CLIP(config)
    model.load(tensors, str(path))
    log.info("%s with %s from %s", config.name, config.activation, path)
    return model


def measure(model: CLIP, lists: dict[str, list], batch_size: int) -> dict[str, np.ndarray]:
    """The scores of every measure that the lists allow, float64 [N] each."""
    images, scores = once_each(image_features, model, lists["images"], batch_size), {}
    if "prompts" in lists:
        prompts = lists["prompts"] + lists.get("source_prompts", [])
        texts = once_each(text_features, model, prompts, batch_size)
        scores["clip_score"] = scaled(cosines(images, texts[: len(images)]))
    if "references" in lists:
        references = once_each(image_features, model, lists["references"], batch_size)
        scores["clip_i"] = scaled(cosines(images, references))
    if "sources" in lists:
        sources = once_each(image_features, model, lists["sources"], batch_size)
        both = texts[: len(images)], texts[len(images) :]
        scores["directional_similarity"] = directional(images, sources, *both)
    return scores


def measure_together(model: CLIP, lists: dict[str, list], batch_size: int, ranks: Ranks) -> dict[str, np.ndarray]:
    """The same over ranks: each scores its share of the pictures, and all have all scores."""
    own = {name: ranks.share(items) for name, items in lists.items()}
    scores = measure(model, own, batch_size) if own["images"] else {}
    parts = [part for part in ranks.gather("scores", {name: row.tolist() for name, row in scores.items()}) if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def pairs(lists: dict[str, list], scores: dict[str, np.ndarray]) -> list[dict]:
    """For every picture what it was compared with and its scores."""
    names = {"images": "image", "prompts": "prompt", "references": "reference"}
    names.update(sources="source", source_prompts="source_prompt")
    columns = {names[key]: [str(item) for item in items] for key, items in lists.items()}
    columns.update({name: [float(score) for score in row] for name, row in scores.items()})
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def describe(name: str, facts: dict, model: str) -> str:
    """A line for the screen."""
    error = "" if facts["standard_error"] is None else f" +- {facts['standard_error']:.3g}"
    return f"{name} {facts['mean']:.4f}{error}  ({facts['scale']}; mean of {facts['pictures']} pictures; {model})"


def main(argv: list[str] | None = None) -> None:
    args = read_options(build_parser(), argv)
    check_options(args)
    path = find(args.load_checkpoint)
    ranks, lists = runtime.join(args.use_parallel), plan(args)
    ranks.agree_on_lists("pictures and texts", lists)
    runtime.start(args.device_target, args.mode, ranks)
    model = load_model(path, args.activation)
    prompts = dict.fromkeys(lists.get("prompts", []) + lists.get("source_prompts", []))
    cut, length = sum(map(model.is_cut, prompts)), model.config.text.context_length
    if cut and ranks.is_main:
        log.warning("%d of %d prompts have more than %d tokens; the rest is not seen", cut, len(prompts), length)
    scores = measure_together(model, lists, args.batch_size, ranks)
    if not ranks.is_main:
        return
    results = {name: summary(row, SCALES[name]) for name, row in scores.items()}
    for name, facts in results.items():
        print(describe(name, facts, model.config.name))
    if args.output:
        facts = {"model": model.config.name, "activation": model.config.activation, "checkpoint": path.name}
        facts.update(prompts=len(prompts), prompts_cut=cut, tokens_seen=length, pairs=pairs(lists, scores))
        with replacing(args.output) as file:
            file.write(json.dumps({**results, **facts}, ensure_ascii=False, indent=1).encode())


if __name__ == "__main__":
    runtime.run(main)
