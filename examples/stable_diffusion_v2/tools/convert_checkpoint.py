"""Convert a checkpoint or a LoRA to another format: any that is read, to any that is written.

    python tools/convert_checkpoint.py SOURCE DESTINATION [--dtype float16] [--version 2.1-v] [--set KEY=VALUE ...]

SOURCE is MindSpore's .ckpt, PyTorch's .ckpt or .pt, .safetensors, or a diffusers folder. DESTINATION tells the format:
NAME.ckpt is MindSpore's with MindONE's names, NAME.safetensors has Stability's names, any other name (but .pt, .pth,
.bin) becomes a diffusers folder. The description in the source (prediction type, schedule, resolution) is kept; where
there is none, --version or --config gives it. Tensors are converted one by one: memory stays at about the source's
size.

The content tells whether SOURCE is a LoRA. Its DESTINATION NAME.ckpt is MindONE's, NAME.safetensors diffusers' (kohya's
with --lora_format kohya), any other name becomes a PEFT folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import checkpoint, runtime
from ldm.checkpoint import kinds, lora
from ldm.config.model import add_set, to_dict
from ldm.config.versions import VERSIONS, published
from ldm.errors import UserError
from ldm.files import escaped
from ldm.weights import Weights, by_marks, check_words, choose_config, open_weights, sidecar, words_of

log = logging.getLogger("convert_checkpoint")
SUFFIXES = {".ckpt": "mindspore", ".safetensors": "safetensors", "": "diffusers"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16"), help="type of the numbers (default: the source's)")
    parser.add_argument("--config", help="the model's YAML file, where the source does not describe itself")
    parser.add_argument("--version", choices=list(VERSIONS), help="the published model whose config it is")
    parser.add_argument("--lora_format", choices=lora.FORMS, help="form of a LoRA (default: by the destination's name)")
    parser.add_argument(
        "--lora_scale", type=float, default=1.0, help="the scale of a LoRA file of MindONE (default: 1)"
    )
    add_set(parser.add_argument)
    return parser


def destination_format(path: Path) -> str:
    """The format of checkpoint.FORMATS that a path's suffix means; UserError where nothing can be written there."""
    if path.suffix in (".pt", ".pth", ".bin"):
        raise UserError(f"{path}: PyTorch's own files are read, not written; .safetensors serves its users")
    if path.exists():
        raise UserError(f"{path} exists; remove it or give another name")
    return SUFFIXES.get(path.suffix, "diffusers")


def described(weights: Weights, args: argparse.Namespace) -> dict[str, str]:
    """The source's ``meta``, completed by its config where one is known; UserError where the two disagree."""
    ckpt, meta = weights.checkpoint, weights.checkpoint.meta
    named = args.config or args.version or published(args.source) or sidecar(args.source)
    if not (named or "model_config" in meta or by_marks(ckpt)):
        return meta
    config, origin = choose_config(weights, args.config, args.version, args.set)
    check_words(args.source, ckpt, config, origin)
    by_config, wrong = words_of(config), kinds.contradiction(ckpt.tensors, to_dict(config)["model"])
    if wrong:
        raise UserError(f"{args.source} is of another model than the config: {wrong}; choose another config")
    return {**by_config, **meta, "model_config": by_config["model_config"]}


def warn_of_nonfinite(path: str, ckpt: checkpoint.Checkpoint) -> None:
    bad, number = checkpoint.not_finite(ckpt.tensors), len(ckpt.tensors)
    if bad:
        message = "%s holds NaN or infinity in %d of its %d tensors, the first is %s; they are converted as they are"
        log.warning(message, path, len(bad), number, escaped(bad[0]))


def convert_adapter(args: argparse.Namespace) -> None:
    form = lora.form_of(args.destination, args.lora_format)
    adapter = lora.load(args.source, args.lora_scale)
    lora.save(args.destination, adapter, form, args.dtype, args.lora_scale)
    said = adapter.meta.get("prediction_type", "not said")
    told = "%s (LoRA, %s) is now %s (%s), %d layers, prediction type %s"
    log.info(told, args.source, adapter.form, args.destination, form, len(adapter.pairs), escaped(said))


def convert_model(args: argparse.Namespace, form: str) -> None:
    weights = open_weights(args.source, widen=False)
    ckpt, meta = weights.checkpoint, described(weights, args)
    checkpoint.check_names(ckpt, args.source)
    warn_of_nonfinite(args.source, ckpt)
    checkpoint.save(args.destination, ckpt.tensors, meta, form, args.dtype)
    said = meta.get("prediction_type")
    lacking = "which does not say its prediction type: give --version or --config"
    message = "%s (%s) is now %s (%s), %d tensors, %s"
    told = f"prediction type {said}" if said else lacking
    log.info(message, args.source, ckpt.format, args.destination, form, len(ckpt.tensors), told)


def main() -> None:
    args = build_parser().parse_args()
    form = destination_format(args.destination)
    if lora.is_adapter(args.source):
        convert_adapter(args)
    elif args.lora_format:
        raise UserError(f"{args.source} is no LoRA: leave out --lora_format")
    else:
        convert_model(args, form)


if __name__ == "__main__":
    runtime.run(main)
