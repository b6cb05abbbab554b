"""Add LoRAs to a checkpoint, or take the difference of two checkpoints as a LoRA.

    python tools/merge_lora.py DESTINATION --base BASE --lora_ckpt_path A [B ...] [--lora_scale 0.8 [0.5 ...]]
    python tools/merge_lora.py DESTINATION --difference TUNED BASE --rank 16 [--lora_format kohya]

BASE and TUNED are checkpoints of any format that is read, A and B LoRAs of any form. DESTINATION says the format as in
convert_checkpoint.py. The model is BASE's: what it says of itself, or --config or --version. A LoRA of another model or
another prediction type is refused.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import checkpoint, runtime
from ldm.checkpoint import lora
from ldm.config.versions import VERSIONS
from ldm.errors import UserError
from ldm.weights import (
    Choice,
    Weights,
    choose_config,
    each_with_scale,
    open_weights,
    tensors_of,
    with_adapters,
    words_of,
)
from tools.convert_checkpoint import destination_format

log = logging.getLogger("merge_lora")


def main() -> None:
    args = parse()
    destination_format(args.destination)
    if args.difference:
        take_difference(args)
    else:
        merge(args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("destination", type=Path)
    parser.add_argument("--base", help="the checkpoint that LoRAs are added to")
    parser.add_argument("--lora_ckpt_path", nargs="+", default=[], metavar="LORA", help="files or folders")
    parser.add_argument(
        "--lora_scale", nargs="+", type=float, default=[1.0], help="a factor for each, or one for all (default: 1)"
    )
    parser.add_argument("--difference", nargs=2, metavar=("TUNED", "BASE"), help="two checkpoints of one model")
    parser.add_argument("--rank", type=int, help="rank of the difference")
    parser.add_argument(
        "--lora_format", choices=lora.FORMS, help="form of the difference (default: by DESTINATION's name)"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), help="type of the numbers (default: as they are)")
    parser.add_argument("--config", help="the model's YAML file, where the base does not describe itself")
    parser.add_argument("--version", choices=list(VERSIONS), help="the published model whose config it is")
    args = parser.parse_args()
    wrong = misuse(args)
    if wrong:
        parser.error(wrong)
    return args


def misuse(args: argparse.Namespace) -> str | None:
    """What is missing in the command, or too much."""
    if args.difference and (args.base or args.lora_ckpt_path):
        return "--difference stands alone, without --base and --lora_ckpt_path"
    if args.difference and (args.rank is None or args.rank < 1):
        return "--difference wants a --rank above 0"
    if not args.difference and not (args.base and args.lora_ckpt_path):
        return "give --base and --lora_ckpt_path, or --difference"
    if not args.difference and (args.rank or args.lora_format):
        return "--rank and --lora_format belong to --difference"
    try:
        each_with_scale(args.lora_ckpt_path, args.lora_scale)
    except UserError as error:
        return str(error)
    return None


def merge(args: argparse.Namespace) -> None:
    weights, choice, tensors = read(args.base, args.config, args.version)
    sums, config = with_adapters(tensors, choice.config, args.lora_ckpt_path, args.lora_scale)
    changed = sum(sums[name] is not tensors[name] for name in sums)
    meta = {**words_of(config), **weights.checkpoint.meta}
    if config != choice.config:  # the adapters' way to draw
        meta["model_config"] = words_of(config)["model_config"]
    form = destination_format(args.destination)
    checkpoint.save(args.destination, sums, meta, form, args.dtype)
    told = "%s (%s) is %s with %d LoRAs, %d tensors changed"
    log.info(told, args.destination, form, args.base, len(args.lora_ckpt_path), changed)


def take_difference(args: argparse.Namespace) -> None:
    form = lora.form_of(args.destination, args.lora_format)
    tuned_path, base_path = args.difference
    _, choice, base = read(base_path, args.config, args.version)
    tuned = tensors_of(open_weights(tuned_path), choice)
    adapter = lora.difference(tuned, base, args.rank)
    lora.save(args.destination, adapter, form, args.dtype, **words_of(choice.config))
    log.info("%s (%s) is what %s has beyond %s", args.destination, form, tuned_path, base_path)


def read(path: str, config: str | None, version: str | None) -> tuple[Weights, Choice, dict]:
    """A base checkpoint, the model that it is of, and its tensors."""
    weights = open_weights(path)
    choice = choose_config(weights, config, version)
    checkpoint.check_names(weights.checkpoint, path)
    return weights, choice, tensors_of(weights, choice)


if __name__ == "__main__":
    runtime.run(main)
