"""Reading and writing checkpoints: files, foreign names, and the descriptions in files.

``load`` reads a file of any format and returns our names: Stability's, but for SDXL's text encoders (see ``names``).
``match`` checks them against a network's parameters, ``save`` writes one of FORMATS. A checkpoint's ``meta`` is a table
of strings. These keys have a meaning here:

* ``prediction_type``: a name of ldm.diffusion.prediction. ``load`` translates the file's word for it; the key is absent
  where the file says nothing.
* ``schedule``: the noise schedule's fields as JSON, of which only ``zero_terminal_snr`` is read here.
* ``resolution``: "WIDTHxHEIGHT" in pixels.

All other keys (model config, step, ...) are kept as they are.

.safetensors files also describe themselves in the ways of other programs: Stability's ModelSpec 1.0.0
(https://github.com/Stability-AI/ModelSpec), and the empty tensors ``v_pred`` and ``ztsnr``, as NoobAI-XL has them.
ComfyUI reads these tensors for SDXL alone. It takes an SD 2.x file for v where a norm's biases are spread as in
Stability's v model, and never an SD 1.x file. In MindSpore's files the table is strings among the parameters, as
``mindspore.save_checkpoint(append_dict=...)`` writes them; MindONE's loader ignores them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.checkpoint import diffusers_folder, formats, kinds, metadata, names
from ldm.checkpoint.arrays import changed, release, widened
from ldm.errors import UserError
from ldm.files import escaped, sha256
from ldm.parts import PARTS, VAE

__all__ = [
    "FORMATS",
    "Checkpoint",
    "changed",
    "check_names",
    "content_key",
    "load",
    "load_vae",
    "match",
    "not_finite",
    "release",
    "require_finite",
    "save",
    "with_vae",
]

log = logging.getLogger(__name__)

FORMATS = (*formats.FORMATS, "diffusers")  # the formats that are written

Tensors = dict[str, np.ndarray]
Strings = dict[str, str]

_VARIANT = "checkpoint.text_encoder"  # in MindSpore's files, where the names of the two text encoders are the same


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` by our names, ``meta`` as the file describes itself, and the file's format.

    `by_mindone`: MindONE has written the file, and its text encoder is that of SD 2.x.
    """

    tensors: Tensors
    meta: Strings
    format: str
    by_mindone: bool = False


def load(path: str | Path, widen: bool = True, raw: bool = False) -> Checkpoint:
    """Read a checkpoint of any format, recognised by its content.

    The arrays are views of the file where possible: float16 stays float16, bfloat16 becomes float32. Without `widen`
    bfloat16 stays as it is and can only be saved. Unknown names are kept; ``match`` and ``check_names`` report them.

    Some programs keep the weights and their moving average in one place. `raw` chooses the weights, to train on;
    otherwise the average is taken, to draw with. A line in the log says which.

    Raises:
        UserError: the file cannot be read whole, or is of a kind (``kinds``) that is no part of a model here.
    """
    try:
        if os.path.isdir(path):
            tensors, meta = diffusers_folder.read(path, widen, raw)
            form, ours = "diffusers", False
        else:
            tensors, strings, form = formats.read(path, widen)
            ours = _VARIANT in strings
            tensors, meta = _named(path, tensors, strings, raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} contradicts itself: {escaped(error, 300)}") from None
    metadata.check(path, meta)
    kind = kinds.recognise(tensors, meta)
    if kind and not kind.serves:
        raise UserError(f"{path} is {kind.name}: {kind.advice}")
    sd2 = names.text_variant(tensors) == "openclip" and not names.is_xl(tensors)
    by_mindone = form == "mindspore" and not ours and sd2
    return Checkpoint(tensors, meta, form, by_mindone)


def _named(path: str | Path, tensors: Tensors, strings: Strings, raw: bool) -> tuple[Tensors, Strings]:
    """(the tensors of a file by our names, its table ``meta``)."""
    variant = strings.pop(_VARIANT, None)
    meta = metadata.stated(tensors, strings)
    tensors = {name: array for name, array in tensors.items() if name not in metadata.MARKS}
    tensors, said = names.from_mindone_state(names.without_wrappers(tensors), raw)
    if said:
        log.info("%s is a training state of MindONE; what is read are its %s", path, said)
    return names.from_part_alone(names.from_mindone(tensors, variant)), meta


def load_vae(path: str | Path, scale_factor: float) -> Tensors:
    """The tensors of an autoencoder by Stability's names, from a file or folder of its own or of a whole model.

    Raises:
        UserError: the file cannot be read, holds no autoencoder, or says another scale of the latents than
            `scale_factor`, the scale of the model that gets the autoencoder.
    """
    ckpt = load(path)
    tensors = {name: array for name, array in ckpt.tensors.items() if name.startswith(VAE)}
    if not tensors:
        kind = kinds.recognise(ckpt.tensors, ckpt.meta)
        raise UserError(f"{path} is {kind.name if kind else 'a file'} without an autoencoder, which is wanted here")
    said = metadata.scale_factor(path, ckpt.meta)
    if said is not None and abs(said / scale_factor - 1) > 1e-4:
        raise UserError(f"{path} scales its latents by {said}, the model by {scale_factor}: choose another")
    return tensors


def with_vae(tensors: Tensors, path: str | Path, scale_factor: float) -> Tensors:
    """A model's tensors, with the autoencoder replaced by that of another file (see ``load_vae``).

    UserError where its shapes differ from those of the model's own autoencoder.
    """
    vae = load_vae(path, scale_factor)
    others = {n: array for n, array in tensors.items() if not n.startswith(VAE)}
    own = {n: array.shape for n, array in tensors.items() if n not in others and names.is_parameter(n)}
    if own:
        vae = match(vae, own, path, (VAE,))
    return {**others, **vae}


def check_names(ckpt: Checkpoint, path: str | Path) -> None:
    """UserError where a checkpoint has names of no network here, or no parameters of one."""
    known = [name for name in ckpt.tensors if names.is_parameter(name)]
    strange = [name for name in ckpt.tensors if not names.is_parameter(name) and not names.is_extra(name)]
    if strange or not known:
        first = ", ".join(escaped(name) for name in strange[:3]) or "none"
        raise UserError(
            f"{path} is no model of Stable Diffusion 1.x, 2.x or XL: {len(strange)} of its {len(ckpt.tensors)} tensors "
            f"have names that are not known here (first: {first})"
        )


def not_finite(tensors: Tensors) -> list[str]:
    """The names of the tensors that hold NaN or infinity; reads all tensors, one at a time."""
    bad = []
    for name, array in tensors.items():
        numbers = widened(array)
        if numbers.dtype.kind == "f" and not np.isfinite(numbers.sum(dtype=np.float64)):
            bad.append(name)
        release(array)
    return bad


def require_finite(tensors: Tensors, path: str | Path, prefixes: tuple[str, ...]) -> None:
    """UserError where weights under these prefixes are NaN or infinite: no training can start from them."""
    bad = not_finite({name: array for name, array in tensors.items() if name.startswith(prefixes)})
    if bad:
        raise UserError(
            f"{path}: NaN or infinity in {len(bad)} tensors, first {escaped(bad[0])}: nothing can be trained from it; "
            "start from an earlier checkpoint, or fetch the file again"
        )


def save(path: str | Path, tensors: Tensors, meta: Strings, format: str, dtype: str | None = None) -> None:
    """Write ``tensors`` (our names) and ``meta`` to ``path``, whole or not at all.

    ``dtype`` is NumPy's name of the type that floating-point numbers are written in; without it each tensor keeps its
    own type. ``format`` is "mindspore" (MindONE's names, ``.ckpt``), "safetensors" (Stability's names) or "diffusers"
    (a folder; ``meta`` must have the ``model_config``). No value of ``meta`` may be empty. Raises UserError where it
    cannot be written; a file that was there before is then unchanged.
    """
    if format == "diffusers":
        diffusers_folder.write(path, tensors, meta, dtype)
    elif format == "mindspore":
        variant = None if names.is_xl(tensors) else names.text_variant(tensors)
        strings = {**meta, _VARIANT: variant} if variant else meta
        formats.write(path, names.to_mindone(tensors), strings, format, dtype)
    else:
        kind = metadata.architecture(tensors, meta.get("prediction_type"))
        strings = {**meta, **metadata.modelspec(kind, meta, path)}
        theirs = names.to_conditioner(tensors)
        formats.write(path, {**theirs, **metadata.marks(path, meta)}, strings, format, dtype)


def content_key(path: str | Path) -> str:
    """The sha256 of a checkpoint's file, or of names and digests of all files in its folder, in hexadecimal digits.

    UserError where a file cannot be read.
    """
    try:
        if not os.path.isdir(path):
            return sha256(path).hex()
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        each = [str(file.relative_to(path)).encode() + sha256(file) for file in files]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return hashlib.sha256(b"".join(each)).hexdigest()


def match(
    tensors: Tensors, expected: dict[str, tuple[int, ...]], path: str | Path, prefixes: tuple[str, ...] = ("",)
) -> Tensors:
    """The arrays for a network's parameters; UserError, in one line, where names or shapes do not fit.

    Args:
        tensors: as ``load`` returns them.
        expected: name -> shape of every parameter of the network.
        path: of the file, for the message.
        prefixes: only parameters that begin with one of these are taken and checked, on both sides. With
            ``(parts.UNET,)`` a file of a UNet alone is enough.

    The known entries beside the parameters (``names.EXTRAS``) are ignored.
    """
    wanted = {name: tuple(shape) for name, shape in expected.items() if name.startswith(prefixes)}
    missing = [name for name in wanted if name not in tensors]
    unexpected = [n for n in tensors if n.startswith(prefixes) and n not in wanted and not names.is_extra(n)]
    wrong = [
        f"{name} has {tensors[name].shape}, model wants {shape}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    faults = [("missing", missing, ", "), ("unexpected", unexpected, ", "), ("wrong shape", wrong, "; ")]
    if missing or unexpected or wrong:
        kind = _kind_of_misfit(tensors, missing, wrong)
        begin = f" is {kind.name} and" if kind else ""
        advice = kind.advice if kind and kind.serves else "is it of another model config?"
        told = [f"{what} {len(which)} (first: {_listed(which, sep)})" for what, which, sep in faults if which]
        raise UserError(f"{path}{begin} does not fit this model: {', '.join(told)}; {advice}")
    return {name: tensors[name] for name in wanted}


def _listed(words: list[str], separator: str) -> str:
    return separator.join(escaped(word, 200) for word in words[:3])


def _kind_of_misfit(tensors: Tensors, missing: list[str], wrong: list[str]) -> kinds.Kind | None:
    """The kind of a file that does not fit, where the kind is the reason; else None.

    For a part of a model the reason is that other parts are missing; for a whole model, that shapes are wrong.
    """
    kind = kinds.recognise(tensors)
    if not kind or not kind.serves:
        return kind
    there = tuple(prefix for prefix in PARTS if any(name.startswith(prefix) for name in tensors))
    if len(there) == len(PARTS):
        return kind if wrong else None
    return None if all(name.startswith(there) for name in missing) else kind
