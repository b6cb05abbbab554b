"""FID, KID, Inception score, precision and recall of generated pictures against real ones.

python eval/eval_fid.py --real_dir datasets/emoji/noto/test --gen_dir output/samples
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import inception, metrics, pictures
from eval.inception_statistics import compute_statistics
from eval.sides import Side, find_side, write_statistics
from ldm import runtime
from ldm.config.options import Parser, read_options, require_at_least, seed, str2bool
from ldm.errors import UserError
from ldm.files import replacing
from ldm.pictures import make_folder
from ldm.randomness import generator

log = logging.getLogger("eval_fid")

ENOUGH = 2048  # pictures; with fewer the covariance of 2,048 features is singular and the FID far too high
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SPLITS = 10  # of the Inception score
NEIGHBOURS = 3  # of precision and recall


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--real_dir", required=True, help="a folder with real pictures, its img_txt.csv, or an .npz with mu and sigma")
    add("--gen_dir", help="a folder with generated pictures, or an .npz file; may be left out with --save_stats")
    add("--load_checkpoint", help="the Inception network's weights (default: a known file in models/)")
    add("--resize", choices=list(pictures.RESIZE), default="clean", help="resize as clean-fid or as pytorch-fid")
    add("--batch_size", type=int, default=32, help="pictures at once; changes speed and memory, not the figures")
    add("--save_stats", help="an .npz file for mean and covariance of real_dir, to be given as --real_dir later")
    add("--kid", type=str2bool, help=f"compute KID (default: if a side has fewer than {ENOUGH:,} pictures)")
    add(
        "--inception_score",
        type=str2bool,
        nargs="?",
        const=True,
        default=False,
        help="compute the Inception score of the generated pictures",
    )
    add(
        "--precision_recall",
        type=str2bool,
        nargs="?",
        const=True,
        default=False,
        help="compute precision and recall, with k = 3",
    )
    add("--output", help="a JSON file for the figures and the settings")
    add("--seed", type=seed, default=0, help="decides KID's subsets and the Inception score's splits")
    runtime.add_device_options(add)
    add("--use_parallel", type=str2bool, default=False, help="this process is one of several; the launcher sets it")
    parser.ignore({"backend": "the network runs in MindSpore"})
    return parser


def check_options(args: argparse.Namespace, real: Side, gen: Side | None) -> None:
    """Settle in `args` which figures are computed, before anything expensive.

    Raises:
        UserError: the options contradict each other, or ask for a figure that a side does not allow.
    """
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


def kept_rows(args: argparse.Namespace, generated: bool) -> list[str]:
    """The network's outputs that the figures need for every picture, beside their moments."""
    kept = ["features"] if args.kid or args.precision_recall else []
    if generated and args.inception_score:
        kept.append("logits")
    return kept


def compute_figures(real: Side, gen: Side, args: argparse.Namespace) -> dict[str, float]:
    """The figures that the options ask for and that the number of pictures allows."""
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


def describe_sides(real: Side, gen: Side) -> dict:
    return {
        "real_dir": real.path,
        "gen_dir": gen.path,
        "real_count": real.count,
        "gen_count": gen.count,
    }


def format_table(row: dict) -> str:
    """The figures as lines of text for the screen."""
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


def report(row: dict, output: str | None) -> None:
    """Show figures and settings, write them to the file `output`, print them as one line of JSON."""
    log.info("%s", format_table(row))
    if output:
        with replacing(output) as file:
            file.write((json.dumps(row, ensure_ascii=False, indent=1) + "\n").encode())
    print(json.dumps(row, ensure_ascii=False))


def main(argv: list[str] | None = None) -> None:
    args = read_options(build_parser(), argv)
    ranks = runtime.join(args.use_parallel)
    real, gen = find_side(args.real_dir), find_side(args.gen_dir) if args.gen_dir else None
    check_options(args, real, gen)
    sides = [side for side in (real, gen) if side]
    ranks.agree_on_lists("pictures", {side.path: side.pictures for side in sides})
    parts = Path(f"{args.output}.parts")
    if ranks.size > 1:
        ranks.check_shared(make_folder(parts))
    weights = Path(args.load_checkpoint) if args.load_checkpoint else inception.find_weights()
    device = runtime.start(args.device_target, args.mode, ranks, runtime.ascend_settings(args, hf32=False))
    net = inception.Inception()
    settings = {"resize": args.resize, "weights_crc32": inception.load(net, weights, args.inception_score)}
    for side in sides:
        side.check_settings(settings)
    for side in sides:
        kept = kept_rows(args, side is gen)
        compute_statistics(side, net, args.resize, args.batch_size, kept, ranks, parts)
        if side is real and args.save_stats and ranks.is_main:
            write_statistics(args.save_stats, real, settings)
            log.info("the statistics of %s are in %s", real.path, args.save_stats)
    if not ranks.is_main:
        return
    if ranks.size > 1:
        shutil.rmtree(parts)
    if gen:
        warn_of_few(real, gen, args)
        run = {"weights": weights.name, "seed": args.seed, "device": device, "mindspore": runtime.ms.__version__}
        figures, unreadable = compute_figures(real, gen, args), real.unreadable + gen.unreadable
        row = {**figures, **describe_sides(real, gen), **settings, **run, "unreadable": unreadable}
        report(row, args.output)


if __name__ == "__main__":
    runtime.run(main)
