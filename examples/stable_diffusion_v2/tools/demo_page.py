"""The page that shows what the demo has made."""

from __future__ import annotations

from html import escape
from os.path import relpath
from pathlib import Path

_STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1, h2 { line-height: 1.2; margin-top: 1.6em }
img { max-width: 100%; image-rendering: pixelated }
pre { background: #f4f4f1; padding: 0.8em 1em; overflow-x: auto; font-size: 14px }
summary { cursor: pointer }
"""

_NEXT = {
    "Draw something else.": 'python text_to_image.py --version tiny --prompt "a drawing of a turtle, blue, noto style"',
    "Draw it in four steps.": "python text_to_image.py --version tiny-4step --prompt "
    '"a drawing of a turtle, blue, noto style"',
    "Redraw a picture in the new style.": "python text_to_image.py --ckpt_path {newest} "
    '--prompt "a drawing of a turtle, blue" --init_image output/samples/00000.png --strength 0.5',
    "Draw in the new style from noise. Concepts lose some of their shape.": "python text_to_image.py "
    '--ckpt_path {newest} --prompt "a drawing of a turtle, blue"',
    "Teach it your own pictures: a folder with img_txt.csv, columns dir,text.": "python train_text_to_image.py "
    "--train_config {config} --data_path DATA --output_path output/mine",
    "Train an adapter instead of the weights.": "python train_text_to_image.py "
    "--train_config configs/train/train_config_lora_tiny.yaml",
}


def page(output: Path, trained: Path, config: str, newest: Path) -> str:
    """The page's HTML.

    Args:
        output: the folder of the page, which has base.png and before_after.png.
        trained: the folder of the training run.
        config: the train config.
        newest: the checkpoint that the training left.
    """
    words = {"config": config, "newest": newest}
    further = "".join(f"<p>{escape(what)}</p>{_code(line.format(**words))}" for what, line in _NEXT.items())
    settings = (trained / "args.yaml").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Stable Diffusion with v-prediction: the demo</title>
<style>{_STYLE}</style></head><body>
<h1>What the tiny model draws, and what it has just learnt</h1>
<p>The tiny model has 10 million weights and v-prediction. It draws pictures of 64×64 pixels, of 1,277 concepts in three
styles. Each picture below took 20 steps.</p>
<img src="base.png" alt="Ten concepts in three styles">
<h2>Fine-tuning to a fourth style</h2>
<p>OpenMoji draws dark outlines. From top to bottom: OpenMoji's own pictures; what the model draws before the
fine-tuning, in Fluent's style; these pictures, redrawn by the fine-tuned model; and a student that draws Noto's style
in four steps. Redrawing makes half of the steps: the shapes stay, and the style is new. The fine-tuning has seen the
concepts that say <b>learnt</b>. It has not seen those that say <b>held out</b>.</p>
<img src="before_after.png" alt="Concepts before and after the fine-tuning">
<h2>The loss</h2>
<img src="{escape(relpath(trained / "loss_curve.png", output))}" alt="The loss over the steps">
<details><summary>All settings of the training</summary>{_code(settings)}</details>
<h2>What to try next</h2>
<p>In <code>examples/stable_diffusion_v2</code>, after <code>source ../../.venv/bin/activate</code>:</p>
{further}</body></html>
"""


def _code(text: str) -> str:
    return f"<pre>{escape(str(text))}</pre>"
