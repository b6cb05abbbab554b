"""Stands where MindONE has its script for inpainting, and names the command that does the same here."""

from ldm.config.moved import DRAWING, answer

NAMES = {**DRAWING, "--mask_ratio": None}
NOTE = "--H and --W say the size, where it is not the picture's"

if __name__ == "__main__":
    answer("text_to_image.py", NAMES, NOTE, ("--version", "2.0-inpaint", "--n_iter", "1"))
