"""Where MindONE has its script for depth to image: tells the command that does it here."""

from ldm.config.moved import answer

NAMES = {"--image": "--init_image", "--save_path": "--output_path", "--num_samples": "--n_samples"}
NAMES |= {"--sample_steps": "--sampling_steps", "--guidance_scale": "--scale", "--ms_mode": "--mode"}
NAMES |= dict.fromkeys(("--version", "-v", "--aug", "--img_size", "--depth_est_amp_level", "--save_graph"))
NOTE = "no network here finds depths: give the map as --depth_map"

if __name__ == "__main__":
    answer("text_to_image.py", NAMES, NOTE, ("--version", "2.0-depth", "--n_iter", "1"))
