"""The files that a model's weights come from, what they say of the model, and which model a command means.

The first of these that is there decides: --config; the config that the checkpoint carries; a YAML file of its name
beside it; --version; its name, where that is a published model's; the marks of a file of SDXL that predicts v. If none
is there, the user is asked; nothing is guessed. --set changes the chosen config, and the file is then compared with the
result.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm import checkpoint
from ldm.checkpoint import Checkpoint, kinds, lora, metadata
from ldm.config import mindone
from ldm.config.model import ModelConfig, SamplingConfig, changed, from_yaml, load_model_config, to_yaml
from ldm.config.versions import VERSIONS, XL_VPRED, published
from ldm.diffusion.prediction import get_prediction
from ldm.errors import UserError
from ldm.files import quoted
from ldm.parts import PARTS, TEXT, UNET, VAE
from ldm.text.tokenizer import padding_of

log = logging.getLogger(__name__)

_SECTIONS = {UNET: ("unet",), VAE: ("vae",), TEXT: ("text", "text_2")}


class Choice(NamedTuple):
    """A model's config, and the name of its origin in messages."""

    config: ModelConfig
    origin: str


@dataclass(frozen=True)
class Weights:
    """A checkpoint, and another one with the parts that it lacks, if the command names one."""

    path: str
    checkpoint: Checkpoint
    rest_path: str | None = None
    rest: Checkpoint | None = None

    @property
    def of_unet(self) -> tuple[str, Checkpoint]:
        """The file with the UNet. What it says of itself holds for the model."""
        if self.rest is None or _holds(self.checkpoint, UNET):
            return self.path, self.checkpoint
        return self.rest_path, self.rest


def open_weights(path: str, rest: str | None = None, widen: bool = True, raw: bool = False) -> Weights:
    """Read both files; `widen`, `raw` and UserError as in `checkpoint.load`."""
    return Weights(path, checkpoint.load(path, widen, raw), rest, checkpoint.load(rest, widen, raw) if rest else None)


# ---- which model ----


def choose_config(
    weights: Weights, config_path: str | None = None, version: str | None = None, changes: Sequence[str] = ()
) -> Choice:
    """The model that a command means, its text padding said.

    Args:
        changes: --set's, made after the choice.

    Raises:
        UserError: nothing says which model it is; the file or its sidecar says another than --version, or it is
            published as another; the sidecar is no model file; the config's prediction type is unknown; `changed`.
    """
    path, ckpt = weights.of_unet
    choice, name = _as_distilled(_choose(path, ckpt, config_path, version), path, ckpt), published(path)
    if changes:
        choice = Choice(changed(choice.config, changes), f"{choice.origin} with --set")
    get_prediction(choice.config.prediction_type)  # an unknown word is refused here, before it is compared
    if name and "prediction_type" not in ckpt.meta:
        _check_published(path, name, choice)
    return choice._replace(config=pad_text(choice.config, path, weights))


def _choose(path: str, ckpt: Checkpoint, config_path: str | None, version: str | None) -> Choice:
    own, beside = own_config(path, ckpt), sidecar(path)
    if config_path:
        return Choice(load_model_config(config_path), "the config")
    if own:
        if version:
            check_words(path, ckpt, load_model_config(VERSIONS[version].config), f"--version {version}")
        return Choice(own, "its config")
    if beside:
        return _by_sidecar(path, beside, version)
    version, marked = version or published(path), by_marks(ckpt)
    if marked and version in (None, XL_VPRED):
        return Choice(marked, f"the config of {XL_VPRED}")
    if version:
        return Choice(load_model_config(VERSIONS[version].config), f"--version {version}")
    kind, known = kinds.of_unet(ckpt.tensors), ", ".join(_versions_of(ckpt))
    begin = f"{path} is {kind.name} and" if kind else path
    raise UserError(f"{begin} does not say which model it is: add --version ({known}), or its YAML file as config")


def _as_distilled(choice: Choice, path: str, ckpt: Checkpoint) -> Choice:
    """The choice, but drawn with as the file was distilled, if the file is a student and the config does not say so.

    Otherwise a YAML file of the teacher would let a student be guided twice.
    """
    own, config = _students_config(path, ckpt.meta), choice.config
    if own is None or config.sampling.distilled_guidance is not None:
        return choice
    if own.unet.time_cond_proj_dim != config.unet.time_cond_proj_dim:
        return choice  # `check_words` refuses it
    log.info("%s is a student of %d steps, and is used as such", path, own.sampling.steps)
    return choice._replace(config=replace(config, sampling=own.sampling))


def _students_config(path: str, meta: Mapping[str, str]) -> ModelConfig | None:
    """The config that a student or its adapters carry; None for any other file."""
    text = meta.get("model_config", "")
    return from_yaml(text, f"{path}: its model_config") if "distilled_guidance" in text else None


def by_marks(ckpt: Checkpoint) -> ModelConfig | None:
    """The config of a file of SDXL's base that says by its marks that it predicts v; None for any other file.

    Without the mark of zero terminal SNR the schedule is the plain one, drawn with as SDXL is.
    """
    schedule = metadata.schedule("the file", ckpt.meta)
    said = ckpt.meta.get("prediction_type"), "zero_terminal_snr" in schedule
    if said != ("v", True) or kinds.of_unet(ckpt.tensors) is not kinds.XL:
        return None
    config = load_model_config(VERSIONS[XL_VPRED].config)
    if schedule["zero_terminal_snr"]:
        return config
    sampling = replace(config.sampling, spacing=None, guidance_rescale=None)
    return replace(config, schedule=replace(config.schedule, zero_terminal_snr=False), sampling=sampling)


def _versions_of(ckpt: Checkpoint) -> list[str]:
    """The published models whose UNets take as much beside time and texts as the file's UNet does."""
    own = kinds.label_width(ckpt.tensors), kinds.joined_channels(ckpt.tensors) or 0
    unets = {word: load_model_config(known.config).unet for word, known in VERSIONS.items()}
    return [word for word, unet in unets.items() if (unet.adm_in_channels or 0, unet.joined) == own] or list(unets)


def sidecar(path: str) -> str | None:
    """The YAML file of the same name beside a checkpoint, as A1111 wants it; None where there is none."""
    beside = Path(path).with_suffix(".yaml")
    return str(beside) if Path(path).is_file() and beside.is_file() else None


def _by_sidecar(path: str, beside: str, version: str | None) -> Choice:
    """The sidecar's model; UserError where it is no model file, or --version says another prediction type."""
    try:
        config = load_model_config(beside)
    except UserError as error:
        raise UserError(
            f"{error}; it is read as it lies beside {path}: correct it, or give another as config"
        ) from None
    if version:
        said = load_model_config(VERSIONS[version].config).prediction_type
        if said != config.prediction_type:
            raise UserError(
                f"{beside}, beside the checkpoint, says prediction_type {quoted(config.prediction_type)}, --version "
                f"{version} '{said}': correct or remove the file, or leave out --version"
            )
    log.info("%s lies beside %s and says which model it is", beside, path)
    return Choice(config, beside)


def own_config(path: str, ckpt: Checkpoint) -> ModelConfig | None:
    """The config that a checkpoint carries, or None; UserError where it is damaged."""
    text = ckpt.meta.get("model_config")
    if text is None:
        return None
    config, name = from_yaml(text, f"{path}: its model_config"), published(path)
    if name and "sampling:" not in text:  # a published file of ours that is older than this section
        config = replace(config, sampling=load_model_config(VERSIONS[name].config).sampling)
    return config


def _check_published(path: str, name: str, choice: Choice) -> None:
    own = load_model_config(VERSIONS[name].config)
    if own.prediction_type != choice.config.prediction_type:
        raise UserError(
            f"{path} is the published model {name}, trained with prediction_type '{own.prediction_type}', "
            f"{choice.origin} says '{choice.config.prediction_type}': use --version {name}, or rename a file that is "
            "another"
        )


def pad_text(config: ModelConfig, path: str, weights: Weights) -> ModelConfig:
    """The config with its text padding said. Where it says none, that is SD's, or MindONE's for a file of MindONE's."""
    if config.text_2 and not config.text_2.padding:
        own = padding_of(config.text_2.variant)
        config = replace(config, text_2=replace(config.text_2, padding=own))
    if config.text.padding:
        return config
    pad = padding_of(config.text.variant)
    with_text = weights.checkpoint if weights.rest is None or _holds(weights.checkpoint, TEXT) else weights.rest
    if with_text.by_mindone and not published(path) and pad != mindone.PADDING:
        pad = mindone.PADDING
        log.info("%s is MindONE's, which pads SD 2.x prompts with the end token: text.padding is '%s'", path, pad)
    return replace(config, text=replace(config.text, padding=pad))


# ---- what a file says against what the config says ----


def check_words(
    path: str, ckpt: Checkpoint, config: ModelConfig, origin: str = "the config", parts: tuple[str, ...] = PARTS
) -> None:
    """Compare what a checkpoint says of itself with a config.

    Args:
        origin: the config's name in messages.
        parts: the networks that are wanted of the file. Prediction type and schedule are compared with the UNet only.

    Raises:
        UserError: it was trained with another latent scale, prediction type or schedule, or for another architecture.
    """
    _check_kind(path, ckpt, config, origin, parts)
    scale = metadata.scale_factor(path, ckpt.meta)
    if scale is not None and abs(scale / config.scale_factor - 1) > 1e-4:
        raise UserError(f"{path} has latents scaled by {scale}, {origin} says scale_factor {config.scale_factor}")
    parts = tuple(part for part in parts if _holds(ckpt, part))
    if UNET in parts:
        _check_type(path, ckpt, config, origin)
    own = own_config(path, ckpt)
    for key, said, wanted in _differences(own, config, parts) if own else ():
        raise UserError(
            f"{path} was trained with {key} {quoted(said)}, {origin} says {quoted(wanted)}: it is of another model"
        )


_CALLED = {0: "Stable Diffusion 1.x or 2.x", 5: "the refiner of Stable Diffusion XL", 6: "Stable Diffusion XL"}
_JOINED = {"mask": "an inpainting model", "depth": "a depth model"}


def _check_kind(path: str, ckpt: Checkpoint, config: ModelConfig, origin: str, parts: tuple[str, ...]) -> None:
    """UserError where one of the file's UNet and the config's is told of sizes or pictures, and the other one is not.

    Networks of billions of parameters would be built before anybody noticed.
    """
    width, joined = kinds.label_width(ckpt.tensors), kinds.joined_channels(ckpt.tensors)
    same_sizes = width in (None, config.unet.adm_in_channels or 0)
    if UNET not in parts or (same_sizes and joined in (None, config.unet.joined)):
        return
    kind = kinds.of_unet(ckpt.tensors)
    like = "Stable Diffusion XL, of other widths" if width else "Stable Diffusion 1.x or 2.x"
    if same_sizes:
        like = f"Stable Diffusion with {joined} channels beside the latents"
    name, advice = (kind.name, kind.advice) if kind else (f"a model like {like}", "choose its own config")
    wanted = _JOINED.get(config.joined) or _CALLED[config.size_numbers]
    raise UserError(f"{path} is {name}, {origin} is for {wanted}: {advice}")


def _check_type(path: str, ckpt: Checkpoint, config: ModelConfig, origin: str) -> None:
    said = ckpt.meta.get("prediction_type")
    if said is None and not published(path):
        log.info(
            "%s does not say its prediction type: '%s' is assumed, as %s says", path, config.prediction_type, origin
        )
    elif said not in (None, config.prediction_type):
        raise UserError(
            f"{path} was trained with prediction_type {quoted(said)}, {origin} says '{config.prediction_type}': "
            f"use a config with prediction_type: {quoted(said)}, or another checkpoint"
        )
    schedule = metadata.schedule(path, ckpt.meta)
    for key, value in asdict(config.schedule).items():
        if schedule.get(key, value) != value:
            raise UserError(
                f"{path} was trained with schedule {key}: {quoted(schedule[key])}, {origin} says {quoted(value)}"
            )


def _differences(own: ModelConfig, config: ModelConfig, parts: tuple[str, ...]) -> Iterator[tuple]:
    """(key, the file's value, the config's value) of every difference in the wanted networks."""
    for section in (section for part in parts for section in _SECTIONS[part]):
        said, wanted = (_comparable(getattr(which, section)) for which in (own, config))
        for key in {**said, **wanted}:
            if said.get(key) != wanted.get(key):
                yield f"{section}.{key}", said.get(key), wanted.get(key)


def _comparable(section: object | None) -> dict:
    """A section's fields, so that equal networks have equal fields."""
    fields = asdict(section) if section else {}
    for key in ("use_checkpoint", "force_upcast"):  # they change memory, time and rounding, not the result
        fields.pop(key, None)
    if "attention_resolutions" in fields:
        fields["attention_resolutions"] = tuple(sorted(fields["attention_resolutions"]))
    if "padding" in fields:
        fields["padding"] = padding_of(fields["variant"], fields["padding"])
    if isinstance(fields.get("transformer_depth"), int):
        fields["transformer_depth"] = section.transformer_depths
    return fields


# ---- reading ----


def read_checkpoint(
    path: str, config: ModelConfig, parts: tuple[str, ...] = PARTS, widen: bool = True, raw: bool = False
) -> Checkpoint:
    """The checkpoint of a model config.

    Args:
        parts: the networks that are wanted of it.
        widen, raw: as in `checkpoint.load`.

    Raises:
        UserError: it cannot be read, or `check_words` finds another model.
    """
    ckpt = checkpoint.load(path, widen, raw)
    check_words(path, ckpt, config, parts=parts)
    return ckpt


def tensors_of(weights: Weights, choice: Choice, vae: str | None = None) -> dict[str, np.ndarray]:
    """All tensors of a model.

    Args:
        vae: a file with an autoencoder, which replaces the checkpoint's.

    Raises:
        UserError: `check_words` finds another model, or the autoencoder does not fit.
    """
    config, origin = choice
    check_words(weights.path, weights.checkpoint, config, origin)
    tensors = weights.checkpoint.tensors
    if weights.rest is not None:
        lacking = tuple(part for part in PARTS if not _holds(weights.checkpoint, part))
        check_words(weights.rest_path, weights.rest, config, origin, lacking)
        tensors = {**weights.rest.tensors, **tensors}
    return checkpoint.with_vae(tensors, vae, config.scale_factor) if vae else tensors


def with_adapters(
    tensors: dict[str, np.ndarray], config: ModelConfig, paths: Sequence[str], scales: Sequence[float]
) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """A model's tensors with adapters merged in, and its config.

    The weights that no adapter touches stay the same arrays. The config draws as an adapter was distilled.

    Raises:
        UserError: an adapter cannot be read, does not fit, or was trained for another prediction type; or `scales` does
            not go with them.
    """
    adapters = [(lora.load(path), scale) for path, scale in each_with_scale(paths, scales)]
    for adapter, _ in adapters:
        lora.check_type(adapter, config.prediction_type)
        if own := _students_config(adapter.origin, adapter.meta):
            config = replace(config, sampling=own.sampling)
    return lora.merged(tensors, adapters) if adapters else tensors, config


def each_with_scale(paths: Sequence[str], scales: Sequence[float]) -> list[tuple[str, float]]:
    """The adapters, each with its strength; UserError where there are neither one strength nor one for each."""
    if len(scales) not in (1, len(paths) or 1) or not np.isfinite(scales).all():
        raise UserError(f"{len(scales)} --lora_scale for {len(paths)} LoRAs: give one for all or one each, all finite")
    return list(zip(paths, [*scales] * len(paths) if len(scales) == 1 else scales))


def words_of(config: ModelConfig) -> dict[str, str]:
    """What a checkpoint of this config says of itself. `check_words` and other programs read it."""
    return {
        "prediction_type": config.prediction_type,
        "schedule": json.dumps(asdict(config.schedule)),
        "resolution": f"{config.image_size}x{config.image_size}",
        "scale_factor": repr(config.scale_factor),
        "model_config": to_yaml(config),
    }


def config_key(config: ModelConfig) -> str:
    """16 hexadecimal digits for everything in a config that decides what the networks answer.

    Sampling and size are left out, because a picture's facts say them one by one.
    """
    plain = replace(config, sampling=SamplingConfig(), unet=replace(config.unet, use_checkpoint=False))
    step = config.vae.factor * config.unet.factor
    return hashlib.sha256(to_yaml(replace(plain, image_size=step)).encode()).hexdigest()[:16]


def _holds(ckpt: Checkpoint, part: str) -> bool:
    return any(name.startswith(part) for name in ckpt.tensors)
