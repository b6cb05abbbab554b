"""Stands where MindONE has its script for the CLIP image score, and names the command that does the same here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.config.moved import answer

NAMES = {"--gen_image_path_or_dir": "--image_path", "--real_image_path_or_dir": "--reference_path"}
NAMES |= {"--ckpt_path": "--load_checkpoint"}
NOTE = "pictures are compared in pairs, in the order of their names; MindONE compares each with all"

if __name__ == "__main__":
    answer("eval/eval_clip_score.py", NAMES, NOTE)
