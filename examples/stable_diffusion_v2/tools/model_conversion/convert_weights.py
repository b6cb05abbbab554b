"""Stands where MindONE has its script that converts checkpoints, and names the command that does the same here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.config.moved import answer

NAMES = {"--source": "", "-s": "", "--target": "", "-t": ""}
NAMES |= dict.fromkeys(("--model", "-m", "--source_version", "-sv"))
NOTE = "the source's content decides what it is, the destination's ending what it becomes"

if __name__ == "__main__":
    answer("tools/convert_checkpoint.py", NAMES, NOTE)
