"""Draw and train with other versions of MindSpore on a CPU, each in an environment of its own.

    python tools/check_versions.py 2.7.2 2.8.0

Each version is installed into a temporary folder, with pip. There the embedded model draws a picture and makes three
training steps. A line for each version has the seconds of both, or says what failed, with exit code 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from ldm.errors import UserError  # noqa: E402
from ldm.files import quoted  # noqa: E402

PICTURES = HERE / "datasets/emoji/openmoji/train"
ROWS = 8
GIGABYTES = 5  # an environment, beside the file that pip takes it from


def version(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected a version such as 2.8.0, got {quoted(text)}")
    return text


def run(what: str, words: Sequence[str | Path], limit: int) -> float:
    """Run a command in the example's folder; returns its seconds. UserError, with its reason, where it fails."""
    began = time.monotonic()
    try:
        done = subprocess.run([*map(str, words)], cwd=HERE, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: not done after {limit} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split("\n")
        errors = [line for line in lines if re.match(r"(\w*Error|ERROR): ", line)]
        raise UserError(f"{what}: {(errors or lines)[-1]}")
    return time.monotonic() - began


def install(wanted: str, folder: Path) -> Path:
    """A new environment with this MindSpore and what else the scripts need; returns its Python."""
    left = shutil.disk_usage(folder.parent).free
    if left < GIGABYTES * 1e9:
        instead = f"make room there, or name another folder in TMPDIR: an environment takes {GIGABYTES} GB"
        raise UserError(f"{folder.parent} has {left / 1e9:.1f} GB of disk left: {instead}")
    run("venv", [sys.executable, "-m", "venv", folder], 300)
    others = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements, python = folder / "requirements.txt", folder / "bin/python"
    lines = [f"mindspore=={wanted}", *(line for line in others if not line.startswith("mindspore"))]
    requirements.write_text("\n".join(lines), encoding="utf-8")
    try:
        run("pip", [python, "-m", "pip", "install", "--disable-pip-version-check", "-r", requirements], 3600)
    except UserError as error:
        if "No matching distribution" not in str(error):
            raise
        where = f"for Python {sys.version_info[0]}.{sys.version_info[1]} on this kind of machine"
        raise UserError(f"pip finds no such version {where}: see `pip index versions mindspore`") from None
    return python


def few_pictures(folder: Path) -> Path:
    """A data folder of the first rows, so that the frozen networks have little to do."""
    folder.mkdir()
    table = (PICTURES / "img_txt.csv").read_text(encoding="utf-8").splitlines()[: ROWS + 1]
    (folder / "img_txt.csv").write_text("\n".join(table), encoding="utf-8")
    for row in table[1:]:
        name = row.split(",")[0]
        shutil.copy(PICTURES / name, folder / name)
    return folder


def check(wanted: str, scratch: Path) -> str:
    """What there is to say of a version. UserError where a command fails."""
    python, data = install(wanted, scratch / "venv"), few_pictures(scratch / "data")
    words = ["--version", "tiny", "--prompt", "a drawing of a red apple, openmoji style", "--sampling_steps", "2"]
    words += ["--n_iter", "1", "--n_samples", "1", "--device_target", "CPU", "--output_path", scratch / "drawn"]
    drawing = run("text_to_image.py", [python, "text_to_image.py", *words], 1800)
    if len(list((scratch / "drawn/samples").glob("*.png"))) != 1:
        raise UserError("text_to_image.py: there is no picture")
    words = ["--train_config", "configs/train/train_config_tiny_openmoji_vpred.yaml", "--data_path", data]
    words += ["--train_batch_size", "2", "--train_steps", "3", "--device_target", "CPU"]
    words = [python, "train_text_to_image.py", *words, "--output_path", scratch / "trained"]
    training = run("train_text_to_image.py", words, 1800)
    if not any((scratch / "trained/ckpt/rank_0").glob("sd-*.safetensors")):
        raise UserError("train_text_to_image.py: there is no checkpoint")
    return f"draws ({drawing:.0f} s) and trains ({training:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="+", type=version, metavar="VERSION", help="of MindSpore, such as 2.8.0")
    failed = False
    for wanted in parser.parse_args().versions:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                said = check(wanted, Path(scratch))
        except (UserError, OSError) as error:  # no folder or no room for temporary files
            said, failed = f"FAIL  {error}", True
        print(f"MindSpore {wanted}: {said}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
