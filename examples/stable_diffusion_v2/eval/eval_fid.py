"""FID, KID, Inception score, precision and recall of generated pictures beside real ones.

python eval/eval_fid.py --real_dir datasets/emoji/noto/test --gen_dir output/samples
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from eval import inception, metrics, npz, pictures
from ldm import runtime
from ldm.config.options import Parser, read_options, require_at_least, seed, str2bool
from ldm.data.captions import read_captions
from ldm.errors import UserError
from ldm.files import escaped, replacing
from ldm.parallel.ranks import Ranks
from ldm.pictures import make_folder
from ldm.randomness import generator

log = logging.getLogger("eval_fid")

ENOUGH = 2048  # pictures; with fewer the covariance of 2,048 features is singular and the FID far too high
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SPLITS = 10  # of the Inception score
NEIGHBOURS = 3  # of precision and recall
NAMED = 10  # unreadable pictures on the screen; the JSON names all


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--real_dir", required=True, help="a folder with real pictures, its img_txt.csv, or an .npz with mu and sigma")
    add("--gen_dir", help="a folder with generated pictures, or an .npz file; may be left out with --save_stats")
    add("--load_checkpoint", help="the Inception network's weights (default: a known file in models/)")
    add("--resize", choices=list(pictures.RESIZE), default="clean", help="as clean-fid does it, or as pytorch-fid")
    add("--batch_size", type=int, default=32, help="changes speed and memory, not the figures")
    add("--save_stats", help="an .npz file for mean and covariance of real_dir, to be given as --real_dir later")
    add("--kid", type=str2bool, help=f"default: where there are fewer than {ENOUGH:,} pictures on a side")
    add("--inception_score", type=str2bool, nargs="?", const=True, default=False, help="of the generated pictures")
    add("--precision_recall", type=str2bool, nargs="?", const=True, default=False, help="with k = 3")
    add("--output", help="a JSON file for the figures and the settings")
    add("--seed", type=seed, default=0, help="of KID's subsets and the Inception score's splits")
    add("--device_target", choices=runtime.DEVICES, help="default: Ascend where there is one, else CPU")
    add("--mode", "--ms_mode", type=int, choices=(0, 1), default=0, help="0: graph, 1: PyNative")
    add("--use_parallel", type=str2bool, default=False, help="with scripts/run_eval_distributed.sh: one of several")
    parser.ignore({"backend": "the network runs in MindSpore"})
    return parser


# ---- one side: a folder's pictures or a file's statistics ----


@dataclass
class Side:
    """The pictures of one folder, or the statistics of a file; then what was measured of them."""

    path: str
    pictures: list[Path] = field(default_factory=list)  # none where it is a file
    said: dict[str, str] = field(default_factory=dict)  # what a file says of itself beside the numbers
    mean: np.ndarray | None = None  # [2048]
    covariance: np.ndarray | None = None  # [2048, 2048]
    count: int | None = None  # pictures; None where a file does not say
    unreadable: list[str] = field(default_factory=list)  # one message each
    features: np.ndarray | None = None  # [count, 2048], where they are asked for
    logits: np.ndarray | None = None  # [count, 1008], where they are asked for


def find_side(path: str) -> Side:
    """The pictures of a folder or of its caption file, or a statistics file; UserError where there is none of them."""
    if path.endswith(".npz"):
        return read_statistics(path)
    if path.endswith(".csv"):
        paths = [sample.path for sample in read_captions(Path(path).parent, Path(path).name)]
        found = [Path(path) for path in dict.fromkeys(paths)]  # several captions may share a picture
    else:
        found = pictures.find_pictures(path)
    if len(found) < 2:
        raise UserError(f"there is only one picture in {path}: a covariance needs two at least")
    return Side(path, found, count=len(found))


def read_statistics(path: str) -> Side:
    """The mu [2048] and sigma [2048, 2048] of an .npz file, as pytorch-fid, clean-fid and this script write it."""
    width = inception.FEATURES
    arrays, said = npz.read(path, {"mu": (width,), "sigma": (width, width)})
    mean, covariance = arrays["mu"], arrays["sigma"]
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds numbers that are not finite: measure its pictures again, two at least")
    count = int(said["count"]) if said.get("count", "").isdecimal() else None
    return Side(path, said=said, mean=mean, covariance=covariance, count=count)


def check_said(side: Side, settings: dict[str, str]) -> None:
    """UserError where a statistics file was made with other settings; a warning where it does not say with which."""
    for name, value in settings.items():
        if side.said.get(name, value) != value:
            raise UserError(
                f"{side.path} was made with {name} {escaped(side.said[name])}, not {value}: measure its pictures again"
            )
    if not side.pictures and "resize" not in side.said:
        hint = "pytorch-fid's files belong to --resize legacy, clean-fid's to clean"
        log.warning("%s does not say how its pictures were resized: %s", side.path, hint)


def write_statistics(path: str, side: Side, settings: dict[str, str]) -> None:
    with replacing(path) as file:
        np.savez(file, mu=side.mean, sigma=side.covariance, count=side.count, **settings)


# ---- measuring ----


class Rows:
    """Rows of float32 that come one batch after another: written to a temporary file, given back as a memory map."""

    def __init__(self, width: int):
        self.file, self.width = tempfile.TemporaryFile(), width  # noqa: SIM115  it lives as long as the map

    def add(self, rows: np.ndarray) -> None:
        try:
            self.file.write(np.ascontiguousarray(rows, np.float32).data)
        except OSError as error:
            raise UserError(f"cannot keep features in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR") from None

    def all(self) -> np.ndarray:
        """[N, width]."""
        self.file.flush()
        if self.file.tell() == 0:  # which cannot be mapped
            return np.empty((0, self.width), np.float32)
        return np.memmap(self.file, np.float32, "r").reshape(-1, self.width)


def measure(
    side: Side, net: inception.Inception, args: argparse.Namespace, features: bool, logits: bool, ranks: Ranks
) -> None:
    """Fills in the figures of a side; of `features` and `logits` the rows are kept where they are asked for.

    Memory does not depend on the number of pictures. Of several ranks each measures a part, and rank 0 has the whole.
    Raises UserError where fewer than two pictures can be read.
    """
    if not side.pictures:
        return
    total, own = len(side.pictures), ranks.share(side.pictures)
    moments = metrics.Moments(inception.FEATURES)
    kept = Rows(inception.FEATURES) if features else None, Rows(inception.CLASSES) if logits else None
    with tqdm(total=len(own), unit="picture", desc=side.path) as bar:
        for batch, count, bad in pictures.batches(own, args.batch_size, pictures.RESIZE[args.resize]):
            side.unreadable += bad
            if count:
                outputs = [out.asnumpy()[:count] for out in net(runtime.ms.Tensor.from_numpy(batch))]
                if not np.isfinite(outputs[0]).all():
                    raise UserError("the Inception network gives NaN or infinity: are these its weights?")
                moments.add(outputs[0])
                for rows, output in zip(kept, outputs):
                    if rows:
                        rows.add(output)
            bar.update(count + len(bad))
    side.unreadable = sum(ranks.gather("unreadable pictures", side.unreadable), [])
    for part in parts_of_others(Path(f"{args.output}.parts"), moments, kept, ranks):
        moments.merge(part.moments)
        for rows, more in zip(kept, part.kept):
            for start in range(0, 0 if rows is None else len(more), metrics.BLOCK):
                rows.add(more[start : start + metrics.BLOCK])
    if not ranks.is_main:
        return
    warn_of_unreadable(side)
    if moments.count < 2:
        raise UserError(f"only {moments.count} of {total} pictures in {side.path} can be read")
    side.mean, side.covariance, side.count = moments.mean, moments.covariance(), moments.count
    side.features, side.logits = (rows and rows.all() for rows in kept)


@dataclass
class Part:
    """What a rank has measured of a side: moments, and the rows of features and logits that were asked for."""

    moments: metrics.Moments
    kept: list[np.ndarray | None]


def parts_of_others(
    folder: Path, moments: metrics.Moments, kept: Sequence[Rows | None], ranks: Ranks
) -> Iterator[Part]:
    """For rank 0: the other ranks' parts in order, one at a time, by way of files in a folder that all share."""
    names = ("count", "mean", "scatter")
    if not ranks.is_main:
        arrays = [getattr(moments, name) for name in names] + [rows.all() for rows in kept if rows]
        for n, array in enumerate(arrays):
            with replacing(folder / f"{ranks.rank}-{n}.npy") as file:
                np.save(file, array)
    ranks.barrier("measured")
    for rank in range(1, ranks.size if ranks.is_main else 1):
        files = [folder / f"{rank}-{n}.npy" for n in range(len(names) + sum(rows is not None for rows in kept))]
        arrays = [np.load(path, mmap_mode="r" if n >= len(names) else None) for n, path in enumerate(files)]
        theirs = metrics.Moments(inception.FEATURES)
        theirs.count, theirs.mean, theirs.scatter = int(arrays[0]), arrays[1], arrays[2]
        left = iter(arrays[len(names) :])
        yield Part(theirs, [next(left) if rows else None for rows in kept])
    ranks.barrier("parts read")


def warn_of_unreadable(side: Side) -> None:
    for message in side.unreadable[:NAMED]:
        log.warning("left out: %s", message)
    if len(side.unreadable) > NAMED:
        log.warning("left out: %d more of %s; --output names them all", len(side.unreadable) - NAMED, side.path)


def figures(real: Side, gen: Side, args: argparse.Namespace) -> dict[str, float]:
    """All that the two sides allow and the options ask for."""
    out = {"fid": metrics.frechet_distance(real.mean, real.covariance, gen.mean, gen.covariance)}
    if args.kid:
        size = min(KID_SUBSET_SIZE, max(2, min(real.count, gen.count) // 2))
        rng = generator(args.seed, "kid")
        out["kid"], out["kid_std"] = metrics.kid_with_error(real.features, gen.features, KID_SUBSETS, size, rng)
        out["kid_subset_size"] = size
    if args.inception_score and gen.count >= SPLITS:
        rng = generator(args.seed, "inception score")
        out["inception_score"], out["inception_score_std"] = metrics.inception_score(gen.logits, SPLITS, rng)
    if args.precision_recall and min(real.count, gen.count) > NEIGHBOURS:
        out["precision"], out["recall"] = metrics.precision_recall(real.features, gen.features, NEIGHBOURS)
    return out


# ---- the command ----


def check_options(args: argparse.Namespace, real: Side, gen: Side | None) -> None:
    """Settles what is to be measured, in `args`; UserError for what cannot be, before anything expensive."""
    require_at_least(1, args, "batch_size")
    if args.use_parallel and not args.output:
        raise UserError("several ranks need --output, a file on a disk that all share: their parts go beside it")
    if gen is None and not args.save_stats:
        raise UserError("give --gen_dir, or --save_stats to keep the statistics of real_dir alone")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise UserError(f"save_stats is {args.save_stats}; it must end in .npz")
    if args.save_stats and not real.pictures:
        raise UserError("save_stats needs the pictures: real_dir is a file of statistics already")
    for path in filter(None, (args.save_stats, args.output)):
        make_folder(Path(path).parent)
    if gen is None:
        args.kid = args.inception_score = args.precision_recall = False
        return
    files = [side.path for side in (real, gen) if not side.pictures]
    if args.kid is None:
        args.kid = not files and min(real.count, gen.count) < ENOUGH
    if files and (args.kid or args.precision_recall):
        raise UserError(f"KID, precision and recall need the pictures, not the statistics in {files[0]}")
    if args.inception_score and not gen.pictures:
        raise UserError(f"the Inception score needs the pictures, not the statistics in {gen.path}")
    args.batch_size = min(args.batch_size, max(len(real.pictures), len(gen.pictures), 1))


def warn_of_few(real: Side, gen: Side, args: argparse.Namespace) -> None:
    few = [f"{side.count:,} in {side.path}" for side in (real, gen) if side.count is not None and side.count < ENOUGH]
    if few:
        beside = "KID has no such bias" if args.kid else "KID, of the pictures themselves, has no such bias"
        message = "the FID is too high and not comparable: fewer than %s pictures (%s); %s"
        log.warning(message, f"{ENOUGH:,}", ", ".join(few), beside)
    if args.inception_score and gen.count < SPLITS:
        log.warning("no Inception score: it needs %d pictures, one for each split", SPLITS)
    if args.precision_recall and min(real.count, gen.count) <= NEIGHBOURS:
        log.warning("no precision and recall: they need %d pictures on both sides", NEIGHBOURS + 1)


def table(row: dict) -> str:
    """The figures for people to read."""
    lines = [("pictures, real", row["real_count"]), ("pictures, generated", row["gen_count"])]
    lines.append((f"FID ({row['resize']})", f"{row['fid']:.3f}"))
    if "kid" in row:
        lines.append(("KID x 1000", f"{1000 * row['kid']:.3f} ± {1000 * row['kid_std']:.3f}"))
    if "inception_score" in row:
        lines.append(("Inception score", f"{row['inception_score']:.3f} ± {row['inception_score_std']:.3f}"))
    if "precision" in row:
        lines += [("precision", f"{row['precision']:.3f}"), ("recall", f"{row['recall']:.3f}")]
    lines = [(name, "unknown" if value is None else str(value)) for name, value in lines]
    return "\n".join(f"{name:<20} {value:>16}" for name, value in lines)


def main(argv: list[str] | None = None) -> None:
    args = read_options(build_parser(), argv)
    ranks = runtime.join(args.use_parallel)
    real, gen = find_side(args.real_dir), find_side(args.gen_dir) if args.gen_dir else None
    check_options(args, real, gen)
    ranks.agree_on_lists("pictures", {side.path: side.pictures for side in (real, gen) if side})
    if ranks.size > 1:
        ranks.check_shared(make_folder(f"{args.output}.parts"))
    weights = Path(args.load_checkpoint) if args.load_checkpoint else inception.find_weights()
    device = runtime.start(args.device_target, args.mode, ranks)
    net = inception.Inception()
    checksum = inception.load(net, weights, args.inception_score)
    settings = {"resize": args.resize, "weights_crc32": checksum}
    for side in filter(None, (real, gen)):
        check_said(side, settings)

    by_features = args.kid or args.precision_recall
    measure(real, net, args, by_features, False, ranks)
    if args.save_stats and ranks.is_main:
        write_statistics(args.save_stats, real, settings)
        log.info("the statistics of %s are in %s", real.path, args.save_stats)
    if gen is not None:
        measure(gen, net, args, by_features, args.inception_score, ranks)
    if ranks.size > 1 and ranks.is_main:
        shutil.rmtree(f"{args.output}.parts")
    if gen is None or not ranks.is_main:
        return
    warn_of_few(real, gen, args)
    row = {
        **figures(real, gen, args),
        "real_dir": real.path,
        "gen_dir": gen.path,
        "real_count": real.count,
        "gen_count": gen.count,
        **settings,
        "weights": weights.name,
        "seed": args.seed,
        "device": device,
        "mindspore": runtime.ms.__version__,
        "unreadable": real.unreadable + gen.unreadable,
    }
    log.info("%s", table(row))
    if args.output:
        with replacing(args.output) as file:
            file.write((json.dumps(row, ensure_ascii=False, indent=1) + "\n").encode())
    print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    runtime.run(main)
