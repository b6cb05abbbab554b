"""Held-out concepts drawn by a model of SDXL's kind, with adapters here, and with the same adapters in diffusers.

    python tools/beside_diffusers.py BASE ADAPTERS [--output_path output/beside_diffusers]

BASE is a checkpoint that carries its config, ADAPTERS the folder of PEFT that a training left. diffusers and PEFT
(requirements-parity.txt) get the same noise. The result is OUTPUT/beside_diffusers.png; a line says how far the two are
apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ldm import runtime
from ldm.data.captions import read_captions
from ldm.pictures import captioned_rows, save_png
from ldm.pipeline import normal_draws
from ldm.weights import choose_config, open_weights
from tools.demo import TEST, draw, load, run

SEED = 1  # of `demo.draw`
SHOWN = ("banana", "tomato", "cactus", "mouse-face", "house", "broken-heart", "tropical-fish", "neutral-face")


def draw_with_diffusers(folder: Path, adapters: Path, prompts: list[str], noise: np.ndarray, config) -> np.ndarray:
    """One picture per prompt, uint8 [N, H, W, 3], as text_to_image.py draws them from the same noise [N, C, h, w]."""
    import torch
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, adapters / "unet", adapter_name="default")
    pipe.set_progress_bar_config(disable=True)
    side, own = config.image_size, config.sampling
    words = {"num_inference_steps": own.steps, "guidance_scale": config.guidance_scale, "output_type": "np"}
    words |= {"height": side, "width": side, "negative_prompt": None if own.zeros_for_empty_prompt else ""}
    pictures = [
        pipe(prompt, latents=torch.from_numpy(start[None]).float(), **words).images
        for prompt, start in zip(prompts, noise)
    ]
    return (np.concatenate(pictures) * 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base")
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--output_path", type=Path, default=Path("output/beside_diffusers"))
    args = parser.parse_args()
    weights = open_weights(args.base)
    config, output = choose_config(weights).config, args.output_path
    output.mkdir(parents=True, exist_ok=True)
    captions = {Path(sample.path).stem: sample.text for sample in read_captions(TEST)}
    prompts, place = [captions[name] for name in SHOWN], output / "prompts.txt"
    place.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    columns = {"base": load(draw(args.base, place, output))}
    columns["LoRA, here"] = load(draw(args.base, place, output, "--lora_ckpt_path", str(args.adapters)))
    shape = (config.vae.embed_dim, *[config.image_size // config.vae.factor] * 2)
    noise = normal_draws(SEED, "sampling noise", shape, list(range(len(prompts))))(-1)
    with tempfile.TemporaryDirectory() as name:
        run("tools/convert_checkpoint.py", args.base, f"{name}/base")
        theirs = draw_with_diffusers(Path(name) / "base", args.adapters, prompts, noise, config)
    columns["in diffusers"] = theirs
    apart = np.abs(columns["LoRA, here"].astype(int) - theirs).max()
    save_png(np.asarray(captioned_rows(columns, prompts, 2)), output / "beside_diffusers.png")
    print(f"{output / 'beside_diffusers.png'}: here and in diffusers no value differs by more than {apart} of 255")


if __name__ == "__main__":
    runtime.run(main)
