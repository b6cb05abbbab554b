"""The text that A1111's web UI puts into pictures, and that its readers and galleries show."""

from __future__ import annotations

import re

from ldm.diffusion.samplers import SAMPLERS
from ldm.text.emphasis import has_weights

_SAMPLERS = {  # A1111's names, where they are others than our labels
    "ddpm": "DDPM",
    "dpm_solver_pp": "DPM++ 2M",
    "dpm_solver_pp_3m": "DPM++ 3M",
    "dpm_solver_pp_2s": "DPM++ 2S",
    "dpm_solver_pp_sde": "DPM++ 2M SDE",
    "euler_ancestral": "Euler a",
}
_SPACINGS = {"karras": "Karras", "exponential": "Exponential"}


def parameters(facts: dict) -> str:
    """The facts of a picture, of `drawing.picture_facts`, in A1111's form. Seeds make other noise there."""
    words = [facts["prompt"]]
    if facts["negative_prompt"]:
        words.append(f"Negative prompt: {facts['negative_prompt']}")
    if not facts["prompt_weights"]:
        words = [re.sub(r"([()\[\]\\])", r"\\\1", text) if has_weights(text) else text for text in words]
    sampler = facts["sampler"]
    settings = {
        "Steps": facts["sampling_steps"],
        "Sampler": _SAMPLERS.get(sampler, SAMPLERS[sampler].label),
        "Schedule type": _SPACINGS.get(facts["spacing"]),
        "CFG scale": f"{facts['scale']:g}",
        "Seed": facts["seed"],
        "Size": f"{facts['W']}x{facts['H']}",
        "Denoising strength": _number(facts, "hires_strength") or _number(facts, "strength"),
        "Hires upscale": _number(facts, "hires_scale"),
        "Hires upscaler": "Lanczos" if facts.get("hires_scale") else None,
        "Variation seed": facts.get("variation_seed"),
        "Variation seed strength": _number(facts, "variation_strength"),
        "Model hash": facts.get("checkpoint_sha256", "")[:10],
        "Model": re.sub(r"[,:\n]", "_", facts["checkpoint"].rpartition(".")[0] or facts["checkpoint"]),
    }
    return "\n".join([*words, ", ".join(f"{key}: {value}" for key, value in settings.items() if value or value == 0)])


def _number(facts: dict, key: str) -> str | None:
    return None if facts.get(key) is None else f"{facts[key]:g}"
