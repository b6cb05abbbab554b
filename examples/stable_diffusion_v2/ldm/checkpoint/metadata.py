"""The strings in which a checkpoint describes itself. Anybody may have written them, so each is checked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from ldm.checkpoint.arrays import Strings, Tensors
from ldm.config.yaml_file import parse_carried
from ldm.diffusion.prediction import DIFFUSERS_NAMES, MODELSPEC_NAMES, own_name
from ldm.errors import UserError
from ldm.files import escaped, quoted
from ldm.parts import UNET

MARKS = V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # of these tensors only the presence counts
MODELSPEC = "modelspec."
_MARKED_TYPE = own_name(DIFFUSERS_NAMES["v"])
_DERIVED = (
    "sai_model_spec",
    "architecture",
    "implementation",
    "title",
    "resolution",
    "prediction_type",
    "predict_key",
    "hash_sha256",
)
LONGEST_SCHEDULE = 10_000  # characters


def scale_factor(path: str | Path, meta: Strings) -> float | None:
    """The latents' scale; None where the file does not say it, UserError where it is no number above 0."""
    said = meta.get("scale_factor")
    if said is None:
        return None
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{path} says scale_factor {quoted(said)}, which is no number above 0: it is damaged")
    return value


def schedule(path: str | Path, meta: Strings) -> dict[str, str | bool | int | float]:
    """The fields of the noise schedule that the file says, by name; numbers are finite.

    UserError where the text is no table of names and values.
    """
    said = meta.get("schedule", "{}")
    try:
        table = json.loads(said) if len(said) <= LONGEST_SCHEDULE else None
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(map(_is_plain, table.values())):
        raise UserError(f"{path} says schedule {quoted(said)}, which is no table of names and values: it is damaged")
    return table


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))


def model_section(path: str | Path, meta: Strings) -> dict | None:
    """The section "model" of the config in the file as plain data, unchecked; None where the file holds no config.

    UserError where the text cannot be read or has no such section.
    """
    if "model_config" not in meta:
        return None
    model = parse_carried(meta["model_config"], f"{path}: its model_config").get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path}: its model_config has no section 'model': it is damaged")
    return model


def check(path: str | Path, meta: Strings) -> None:
    """UserError where the latents' scale or the schedule of a file is impossible."""
    scale_factor(path, meta)
    schedule(path, meta)


def stated(tensors: Tensors, strings: Strings) -> Strings:
    """The table ``meta`` from the strings in a file and the marks among its tensors."""
    derived = [MODELSPEC + key for key in _DERIVED]
    meta = {key: text for key, text in strings.items() if text and key not in derived and key != "format"}

    types = [strings.get("prediction_type"), strings.get(MODELSPEC + "prediction_type")]
    if strings.get(MODELSPEC + "predict_key") == _MARKED_TYPE:  # ComfyUI's; its "epsilon" is what it says in doubt
        types.append(_MARKED_TYPE)
    types += [_MARKED_TYPE] if V_MARK in tensors else []
    said = {own_name(word) for word in types if word}
    if len(said) > 1:
        places = f"prediction_type, modelspec.prediction_type and .predict_key in its metadata, its tensor {V_MARK}"
        raise ValueError(f"its prediction type is {' and '.join(map(escaped, sorted(said)))}; correct one of {places}")
    if said:
        meta["prediction_type"] = said.pop()

    if MODELSPEC + "resolution" in strings:
        meta.setdefault("resolution", strings[MODELSPEC + "resolution"])
    if ZERO_SNR_MARK in tensors or (V_MARK in tensors and _may_be_xl(tensors)):
        meta.setdefault("schedule", json.dumps({"zero_terminal_snr": ZERO_SNR_MARK in tensors}))
    return meta


def _may_be_xl(tensors: Tensors) -> bool:
    """Whether a file's names are of SDXL's kind, for which alone a missing mark means something."""
    return any("label_emb." in name for name in tensors)


def marks(path: str | Path, meta: Strings) -> Tensors:
    """The empty tensors that stand for a v model and a zero-terminal-SNR schedule."""
    if meta.get("prediction_type") != _MARKED_TYPE:
        return {}
    there = [V_MARK]
    if schedule(path, meta).get("zero_terminal_snr"):
        there.append(ZERO_SNR_MARK)
    return {mark: np.zeros(0, np.float32) for mark in there}


def modelspec(kind: str, meta: Strings, path: str | Path) -> Strings:
    """The ModelSpec entries of a .safetensors file; "format" is what transformers and diffusers insist on.

    `kind` is ModelSpec's name of what is in the file.
    """
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": kind,
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": Path(path).stem,
    }
    if "resolution" in meta:
        spec["resolution"] = meta["resolution"]
    if "prediction_type" in meta:
        spec["prediction_type"] = MODELSPEC_NAMES.get(meta["prediction_type"], meta["prediction_type"])
    return {"format": "pt", **{MODELSPEC + key: text for key, text in spec.items()}}


def architecture(tensors: Tensors, prediction_type: str | None) -> str:
    """ModelSpec's name of a Stable Diffusion, told by the shapes of its UNet."""
    first, keys = (
        tensors[name].shape if name in tensors else ()
        for name in (UNET + "input_blocks.0.0.weight", UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    )
    known = first in ((320, 4, 3, 3), (384, 4, 3, 3)) and keys[:1] == (4 * first[0],)
    return family(keys[1] if known else 0, prediction_type)


_XL = {2048: "stable-diffusion-xl-v1-base", 1280: "stable-diffusion-xl-v1-refiner"}


def family(context_width: int, prediction_type: str | None) -> str:
    """ModelSpec's name of the Stable Diffusion whose UNet is told of texts in so many values."""
    if context_width == 768:
        return "stable-diffusion-v1"
    if context_width == 1024:
        return "stable-diffusion-v2-768-v" if prediction_type == _MARKED_TYPE else "stable-diffusion-v2-512"
    return _XL.get(context_width, "latent-diffusion")
