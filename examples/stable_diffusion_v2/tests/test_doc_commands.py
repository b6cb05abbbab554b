"""The commands in the pages' code blocks. Those that can run here do: published files are tiny ones, and data is small.

A command of a page belongs to one row of RUN or of NOT_RUN. The words of RUN are added to it and make it short.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_docs import HERE, PAGES
from test_scripts import SMALLER, fill_place

from ldm import checkpoint, runtime
from ldm.checkpoint import lora
from ldm.randomness import generator

FEW = "--sampling_steps 2 --n_iter 1 --n_samples 1"
NARROW = "--model_config model.yaml --image_size 16 --image_filter_size 0"
NARROW += " --data_path DATA --cache_path cache --train_batch_size 2"
LAST_LAYERS = "--trainable_modules ^out[.] --train_steps 1"
RUN = {  # how a command begins, or what it holds: what makes it short
    "python text_to_image.py": FEW,
    "train_config_vanilla_v2_vpred": f"{NARROW} {LAST_LAYERS}",
    "train_config_lora_v2_vpred": f"{NARROW} --lora_rank 2 --train_steps 1",
    "train_config_distill_v2_vpred": f"{NARROW} --start_steps 2 --updates_per_halving 1",
    "python tools/add_unet_level.py": "--config model.yaml --set model.unet.channel_mult=[1,1] "
    "model.unet.attention_resolutions=[2]",
    "python tools/convert_checkpoint.py": "",
    "python tools/merge_lora.py": "",
    "--reconstruct": "--limit 2",
}
NOT_RUN = {  # the same: why
    "make ": "it installs packages, or runs these tests",
    "pip install": "it installs packages",
    "$data": "it needs published weights and data that are not here",
    "eval/eval_fid.py": "it needs the weights of the Inception network; test_eval_fid.py runs the script",
    "eval/eval_clip_score.py": "it needs a CLIP; test_eval_clip.py runs the script",
    "eval/results_table.py --version": "it takes a minute; test_results_table.py runs the script",
    "scripts/run_": "it starts processes; test_ranks.py does",
    "tools/check_ascend.py": "it takes minutes; test_check_ascend.py runs it",
    "train_config_distill_tiny": "it trains for an hour",
    "tools/measure_few_steps.py": "it draws for an hour",
    "tools/compare_prediction_types.py": "it trains for half an hour",
    "train_autoencoder.py": "it compiles for long; test_scripts.py runs the script",
    "tools/measure_offline.py --real_path datasets/emoji/noto/test": "it draws 121 pictures by text_to_image.py",
    "train_config_tiny_openmoji_vpred": "it trains for five minutes: make demo",
    "train_config_tiny_base": "it trains for hours",
    "tests/parity": "it needs PyTorch",
    "sdxl": "it needs a model of SDXL's kind; test_train_sdxl.py and test_sdxl.py have one",
    "--version xl": "it needs a published file of SDXL",
    "noobai": "it needs a published file of SDXL",
    "source ": "it is for a machine with CANN",
    "npu-smi ": "it is for a machine with NPUs",
    "run.sh": "it needs MindSpore's Ascend plugin; test_ascend_dryrun.py runs it",
    "build.sh": "it needs MindSpore's Ascend plugin; test_ascend_dryrun.py runs it",
    "summary.py": "it reads what run.sh leaves",
}
PLACES = ("--prompt", "--output_path")
BASE = ("BASE", "MODEL", "SOURCE")
BASE += ("models/sd_v2_768_v-e12e3a9b.ckpt", "output/tiny_base_lowres/ckpt/rank_0/sd-5000.safetensors")
BASE += ("output/tiny_base/ckpt/rank_0/sd-22500.safetensors", "OUT/ckpt/rank_0/student-4.safetensors")
BASE += ("OUT/ckpt/rank_0/sd-20.ckpt", "output/vpred_vanilla_finetune_pokemon/txt2img/ckpt/rank_0/sd-20.ckpt")


def blocks(text: str) -> str:
    """The lines of a page's code blocks; a line that ends in a backslash is joined to the next one."""
    fenced = "\n".join(re.findall(r"^```(?:shell)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(re.findall(r"^ {4,}(?!\*|\d\.).*$", text, re.MULTILINE))
    return re.sub(r"\\\n\s*", " ", f"{indented}\n{fenced}")


def commands(text: str) -> list[str]:
    """The commands among them, without comments; what stands in brackets may be left out, and is."""
    starts = r"\s*(?:\w+=\S* )*(?:python|bash|make|cp|pip|grep|source|export|npu-smi|\S+\.sh) .*"
    lines = [line.split(" #")[0] for line in blocks(text).splitlines() if re.fullmatch(starts, line)]
    while any("[" in line for line in lines):
        lines = [re.sub(r"\[[^][]*\]", "", line) for line in lines]
    return [" ".join(line.split()) for line in lines]


def row_of(line: str) -> str | None:
    """The row that a command belongs to; a reason not to run it comes first."""
    return next((row for row in (*NOT_RUN, *RUN) if row in line), None)


def options(line: str) -> dict[str, list[str]]:
    """The words of a command with those of its row, by the option that they belong to; the last one counts."""
    found, option = {}, ""
    prompted = line.replace("--data_path prompts.txt", "--prompt TEXT")
    for word in shlex.split(f"{prompted} {RUN[row_of(line)]}"):
        option = word if re.match("--?[a-zA-Z]", word) else option
        found[option] = [] if word == option else [*found.get(option, []), word]
    return found


def one_of_each(lines: list[str]) -> list[str]:
    """Without commands that do the same as an earlier one: with other texts, places, or names of one stand-in."""
    same = {}
    for line in lines:
        words = {name: words for name, words in options(line).items() if name not in PLACES}
        meant = [(name, *("BASE" if word in BASE else word for word in words[name])) for name in sorted(words)]
        same.setdefault(tuple(meant), line)
    return list(same.values())


LINES = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder like the scripts', with what a reader has by then: published files, his own, and what commands left."""
    folder, kept = tmp_path_factory.mktemp("workshop"), tmp_path_factory.mktemp("kept")
    fill_place(kept, SMALLER)  # model.yaml, base.safetensors and data/
    base = checkpoint.load(kept / "base.safetensors")
    tuned = {name: array + generator(0, name).normal(0, 0.01, array.shape) for name, array in base.tensors.items()}
    tuned = {name: array.astype("float32") for name, array in tuned.items()}
    checkpoint.save(kept / "TUNED", tuned, base.meta, "safetensors")
    lora.save(kept / "A", lora.difference(tuned, base.tensors, 2), "peft")
    (kept / "prompts.txt").write_text("a cat\n")
    (kept / "cache").mkdir()
    links = {name: HERE / name for name in ("configs", "datasets/emoji", "models/tiny-vpred.safetensors")}
    links |= {name: kept / name for name in ("model.yaml", "TUNED", "A", "prompts.txt", "cache")}
    links |= dict.fromkeys(("DATA", "datasets/pokemon_blip/train"), kept / "data")
    links |= {**dict.fromkeys(BASE, kept / "base.safetensors"), "OUT/model_config.yaml": kept / "model.yaml"}
    for name, target in links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    return folder


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_every_command_is_run_or_has_its_reason():
    assert [line for line in LINES if row_of(line) is None] == []
    assert {*RUN, *NOT_RUN} - {*map(row_of, LINES)} == set(), "rows without a command"


@pytest.mark.parametrize("line", one_of_each([line for line in LINES if row_of(line) in RUN]))
def test_the_command_runs(line, workshop, tmp_path, monkeypatch, capsys):
    place = shutil.copytree(workshop, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(place)
    before = files(place)
    _, script, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *words, *shlex.split(RUN[row_of(line)])])
    runtime.run(importlib.import_module(script[:-3].replace("/", ".")).main)
    assert files(place) - before or capsys.readouterr().out, "it left nothing and said nothing"
