"""Make a tiny model of SDXL's kind out of the embedded tiny model, for training to go on from.

    python tools/sdxl_from_tiny.py DESTINATION [--config configs/tiny-sdxl-vpred.yaml]

It keeps what the tiny model knows. The new parts begin without effect: the last layers of new branches are zero, and
the first text encoder, which is random, is looked at by weights of zero.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ldm import checkpoint, runtime
from ldm.config.model import ModelConfig, load_model_config
from ldm.config.options import seed
from ldm.config.versions import VERSIONS, find_checkpoint
from ldm.data.captions import read_captions
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.parts import TEXT, UNET
from ldm.weights import read_checkpoint, words_of

log = logging.getLogger("sdxl_from_tiny")
OF_TEXT = TEXT + "model."
ENCODER = TEXT + "embedders.1.model."
ENDS_OF_BRANCHES = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "attn.out_proj", "mlp.c_proj", "label_emb.0.2")
CAPTIONS = 64  # whose features are looked at


def grown(old: dict[str, np.ndarray], fresh: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The larger model's parameters, all but the weights that look at texts.

    Args:
        old: the tiny model's parameters.
        fresh: the larger model's, random.
    """
    known = {name.replace(OF_TEXT, ENCODER): array for name, array in old.items()}
    new = {name: known.get(name, array).astype(np.float32) for name, array in fresh.items()}
    for name in new.keys() - known.keys():
        if name.rpartition(".")[0].endswith(ENDS_OF_BRANCHES):
            new[name] = np.zeros_like(new[name])
    width = new[f"{ENCODER}text_projection"].shape[0]
    new[f"{ENCODER}text_projection"] = np.eye(width, dtype=np.float32)
    return new


def looking_at_texts(old: dict, fresh: dict, config: ModelConfig, deviation: float) -> dict[str, np.ndarray]:
    """The weights that take keys and values from the texts.

    The tiny model looked at normed features, and the larger one looks at the same features without the norm. The norm's
    centring, gain and bias go into the weights; each token's own deviation becomes one for all. A bias of all keys
    changes no attention, and one of all values is one of the output.

    Args:
        deviation: of the features without the norm.
    """
    gain, bias = (old[f"{OF_TEXT}ln_final.{name}"].astype(np.float32) for name in ("weight", "bias"))
    weights = {}
    for name, array in fresh.items():
        if name not in old or array.shape == old[name].shape:
            continue
        look, first = old[name] * gain / deviation, np.zeros((len(array), config.text.width), np.float32)
        weights[name] = np.concatenate((first, look - look.mean(1, keepdims=True)), 1)
        if name.endswith("to_v.weight"):
            out = name.replace("to_v.weight", "to_out.0.")
            weights[f"{out}bias"] = old[f"{out}bias"] + old[f"{out}weight"] @ (old[name] @ bias)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("destination", type=Path)
    parser.add_argument("--config", default="configs/tiny-sdxl-vpred.yaml", help="the larger model's YAML file")
    parser.add_argument(
        "--data_path", default="datasets/emoji", help="a data folder; the size of its captions' features is measured"
    )
    parser.add_argument("--seed", type=seed, default=42, help="decides the new parts' random weights")
    args = parser.parse_args()
    if args.destination.exists():
        raise UserError(f"{args.destination} exists; remove it or give another name")
    config = load_model_config(args.config)
    source = find_checkpoint("tiny")
    old = read_checkpoint(source, load_model_config(VERSIONS["tiny"].config)).tensors
    runtime.start("CPU")
    model = StableDiffusion(config)
    for network in (model.unet, model.text_encoder):
        initialize(network, args.seed)
    fresh = model.tensors()
    kept = {name: array for name, array in old.items() if not (name in fresh and fresh[name].shape != array.shape)}
    new = grown(kept, fresh)
    model.load(new, source)
    texts = [sample.text for sample in read_captions(args.data_path)][:CAPTIONS]
    features = model.conditioner(texts).context[..., config.text.width :]
    new.update(looking_at_texts(old, fresh, config, float(features.std(-1).mean())))
    checkpoint.save(args.destination, new, words_of(config), "safetensors")
    parts = {"UNet": UNET, "text encoders": TEXT}
    sizes = [f"{part} {sum(a.size for name, a in new.items() if name.startswith(p)):,}" for part, p in parts.items()]
    log.info("%s: parameters %s", args.destination, ", ".join(sizes))


if __name__ == "__main__":
    runtime.run(main)
