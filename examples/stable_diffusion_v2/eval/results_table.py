"""The table of results: what checkpoints draw from a data set's captions, measured beside its pictures.

python eval/results_table.py --version tiny --data_path datasets/emoji/noto/test --sampling_steps 15

Every checkpoint and every data set make a row, which has a folder of its own under --output_path. The table shows all
rows there, so it grows from call to call. The folder's name ends in a digest of everything that decides the pictures,
the checkpoint's content included. So a run that was cut short goes on, and pictures of different settings never mix.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.clip import ACTIVATIONS
from eval.pictures import RESIZE
from eval.results_pages import publish, sheet
from eval.results_rows import plan_rows, write_text
from eval.results_runs import compute_figures, draw, find_networks
from ldm import runtime
from ldm.config.options import Parser
from ldm.config.versions import VERSIONS
from ldm.pictures import save_png

log = logging.getLogger("results_table")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0] + " All further options are text_to_image.py's.")
    add = parser.add_argument
    add("--data_path", nargs="+", required=True, help="folders with pictures and img_txt.csv: a row for each")
    add("--output_path", default="output/results", help="the table, and a folder for each row")
    add("-v", "--version", nargs="+", choices=list(VERSIONS), help="published models: their config and checkpoint")
    add("--ckpt_path", nargs="+", help="checkpoints: a row for each (default: the version's)")
    add(
        "--config",
        nargs="+",
        help="their models' YAML files, one for each or one for all (default: the checkpoints' own, or the versions')",
    )
    add("--name", nargs="+", help="what the table calls the models (default: the checkpoints' file names)")
    add("--dataset", nargs="+", help="what the table calls the data (default: the last two folders of data_path)")
    add("--n_samples", type=int, default=1, help="pictures per caption")
    add("--limit", type=int, help="the first captions only, for a trial; real pictures are always all of them")
    add("--inception_checkpoint", help="the Inception network's file (default: a known one in models/)")
    add("--resize", choices=list(RESIZE), default="clean", help="for Inception: resize as clean-fid or as pytorch-fid")
    add("--clip_checkpoint", help="CLIP's file or folder (default: the first published one in models/)")
    add("--activation", choices=list(ACTIVATIONS), help="CLIP's activation, where its file does not say it")
    add("--shown", type=int, default=8, help="pictures on each row's sheet")
    return parser


def main(argv: list[str] | None = None) -> None:
    args, words = build_parser().parse_known_args(argv)
    networks, rows = find_networks(args), plan_rows(args, words)
    for row in rows:
        log.info("%s on %s: %s", row.facts["model"], row.facts["dataset"], row.folder)
        draw(row)
        save_png(sheet(row, args.shown), row.folder / "samples.png")
        figures = compute_figures(row, networks, args)
        facts = {**row.facts, **figures, "folder": row.folder.name, "lacks": networks.lacks}
        write_text(row.folder / "row.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
        table = publish(Path(args.output_path))
    print(table)


if __name__ == "__main__":
    runtime.run(main)
