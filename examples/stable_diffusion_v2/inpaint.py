"""Where MindONE has its script for inpainting: tells the command that does it here."""

from ldm.config.moved import answer

NAMES = {"--image": "--init_image", "--save_path": "--output_path", "--num_samples": "--n_samples"}
NAMES |= {"--sample_steps": "--sampling_steps", "--guidance_scale": "--scale", "--ms_mode": "--mode"}
NAMES |= dict.fromkeys(("--version", "-v", "--aug", "--mask_ratio", "--img_size", "--save_graph"))
NOTE = "--H and --W say the size, where it is not the picture's"

if __name__ == "__main__":
    answer("text_to_image.py", NAMES, NOTE, ("--version", "2.0-inpaint", "--n_iter", "1"))
