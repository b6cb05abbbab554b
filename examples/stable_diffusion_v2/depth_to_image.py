"""Stands where MindONE has its script for depth to image, and names the command that does the same here."""

from ldm.config.moved import DRAWING, answer

NAMES = {**DRAWING, "--depth_est_amp_level": None}
NOTE = "no network here finds depths: give the map as --depth_map"

if __name__ == "__main__":
    answer("text_to_image.py", NAMES, NOTE, ("--version", "2.0-depth", "--n_iter", "1"))
