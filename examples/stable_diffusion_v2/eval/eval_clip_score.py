"""CLIP score, CLIP-I and directional similarity: how well pictures fit their prompts and real pictures.

python eval/eval_clip_score.py --image_path output/samples --prompt prompts.txt --load_checkpoint models/ViT-L-14.pt
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.clip import ACTIVATIONS, CLIP, config_of
from eval.clip_inputs import FROM_PNG, list_inputs
from eval.clip_scores import SCALES, compute_scores_over_ranks, summary
from eval.clip_weights import find, read, stated_activation
from eval.pictures import find_record
from ldm import runtime
from ldm.config.options import Parser, read_options, require_at_least, str2bool
from ldm.errors import UserError
from ldm.files import replacing
from ldm.pictures import RECORD

log = logging.getLogger("eval_clip_score")

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
    add(
        "--activation",
        choices=list(ACTIVATIONS),
        help="the towers' activation (default: by the checkpoint's config or its size)",
    )
    add("--batch_size", type=int, default=32, help="pictures or texts at once; changes the speed, not the scores")
    add("--reference_path", help="real pictures, one for each picture or for each group of them: CLIP-I")
    add("--source_prompt", help="for directional similarity: a text or a file, what the source pictures show")
    add("--source_path", help="for directional similarity: the pictures that --image_path was made from")
    add("--output", help="a JSON file for the results, with the score of every picture")
    runtime.add_device_options(add)
    add("--use_parallel", type=str2bool, default=False, help="this process is one of several; the launcher sets it")
    parser.ignore(WITHOUT_EFFECT)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Settle in `args` where the prompts come from; UserError where the options contradict each other."""
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


def picture_records(lists: dict[str, list], scores: dict[str, np.ndarray]) -> list[dict]:
    """For every picture its file, what it was compared with, and its scores."""
    names = {"images": "image", "prompts": "prompt", "references": "reference"}
    names.update(sources="source", source_prompts="source_prompt")
    columns = {names[key]: [str(item) for item in items] for key, items in lists.items()}
    columns.update({name: [float(score) for score in row] for name, row in scores.items()})
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def score_line(name: str, facts: dict, model: str) -> str:
    """A score as a line for the screen."""
    error = "" if facts["standard_error"] is None else f" +- {facts['standard_error']:.3g}"
    return f"{name} {facts['mean']:.4f}{error}  ({facts['scale']}; mean of {facts['pictures']} pictures; {model})"


def main(argv: list[str] | None = None) -> None:
    args = read_options(build_parser(), argv)
    check_options(args)
    path = find(args.load_checkpoint)
    ranks, lists = runtime.join(args.use_parallel), list_inputs(args)
    ranks.agree_on_lists("pictures and texts", lists)
    runtime.start(args.device_target, args.mode, ranks, runtime.ascend_settings(args, hf32=False))
    model = load_model(path, args.activation)
    prompts = dict.fromkeys(lists.get("prompts", []) + lists.get("source_prompts", []))
    cut, length = sum(map(model.is_cut, prompts)), model.config.text.context_length
    if cut and ranks.is_main:
        log.warning("%d of %d prompts have more than %d tokens; the rest is not seen", cut, len(prompts), length)
    scores = compute_scores_over_ranks(model, lists, args.batch_size, ranks)
    if not ranks.is_main:
        return
    results = {name: summary(row, SCALES[name]) for name, row in scores.items()}
    for name, facts in results.items():
        print(score_line(name, facts, model.config.name))
    if args.output:
        facts = {"model": model.config.name, "activation": model.config.activation, "checkpoint": path.name}
        facts.update(prompts=len(prompts), prompts_cut=cut, tokens_seen=length, pairs=picture_records(lists, scores))
        with replacing(args.output) as file:
            file.write(json.dumps({**results, **facts}, ensure_ascii=False, indent=1).encode())


if __name__ == "__main__":
    runtime.run(main)
