"""Stands where MindONE has its script for the CLIP score, and names the command that does the same here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.config.moved import answer

if __name__ == "__main__":
    answer("eval/eval_clip_score.py")
