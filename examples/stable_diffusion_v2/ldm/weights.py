"""The files that a model's weights come from, what they say of it, and which model a command means.

--config decides. Without it the checkpoint's own words do: it may carry its model's config. Else a YAML file beside it
decides that has its name, else its name where that is a published model's, else --version. A file of which nothing is
known is asked about, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm import checkpoint
from ldm.checkpoint import Checkpoint, metadata
from ldm.config.model import ModelConfig, SamplingConfig, from_yaml, load_model_config, to_yaml
from ldm.config.versions import VERSIONS, published
from ldm.diffusion.prediction import get_prediction
from ldm.errors import UserError
from ldm.files import quoted
from ldm.parts import PARTS, TEXT, UNET, VAE
from ldm.text.tokenizer import PADDING

log = logging.getLogger(__name__)

_SECTIONS = {UNET: "unet", VAE: "vae", TEXT: "text"}


class Choice(NamedTuple):
    """A model's config, and what messages call its origin."""

    config: ModelConfig
    origin: str


@dataclass(frozen=True)
class Weights:
    """A checkpoint and, where it lacks parts, another one that brings them."""

    path: str
    checkpoint: Checkpoint
    rest_path: str | None = None
    rest: Checkpoint | None = None

    @property
    def of_unet(self) -> tuple[str, Checkpoint]:
        """The file that the UNet comes from: its words are the model's."""
        if self.rest is None or _holds(self.checkpoint, UNET):
            return self.path, self.checkpoint
        return self.rest_path, self.rest


def open_weights(path: str, rest: str | None = None, widen: bool = True, raw: bool = False) -> Weights:
    """Read what is there; UserError as `checkpoint.load`, whose `widen` and `raw` these are."""
    return Weights(path, checkpoint.load(path, widen, raw), rest, checkpoint.load(rest, widen, raw) if rest else None)


# ---- which model ----


def choose_config(weights: Weights, config_path: str | None = None, version: str | None = None) -> Choice:
    """The model that a command means; its text padding is settled.

    Raises:
        UserError: nothing says which model it is; the file or its sidecar says another than --version, or it is
            published as another; the sidecar is no model file; the config's prediction type is unknown.
    """
    path, ckpt = weights.of_unet
    own, name, beside = own_config(path, ckpt), published(path), sidecar(path)
    if config_path:
        choice = Choice(load_model_config(config_path), "the config")
    elif own:
        choice = Choice(own, "it")
        if version:
            check_words(path, ckpt, load_model_config(VERSIONS[version].config), f"--version {version}")
    elif beside:
        choice = _by_sidecar(path, beside, version)
    elif version or name:
        choice = Choice(load_model_config(VERSIONS[version or name].config), f"--version {version or name}")
    else:
        raise UserError(
            f"{path} does not say which model it is: add --version ({', '.join(VERSIONS)}), or its YAML file as config"
        )
    get_prediction(choice.config.prediction_type)  # or an unknown word would be held against the file's
    if name and "prediction_type" not in ckpt.meta:
        _check_published(path, name, choice)
    return choice._replace(config=pad_text(choice.config, path, weights))


def sidecar(path: str) -> str | None:
    """The YAML file that lies beside a checkpoint under its name, as A1111 wants it; None where there is none."""
    beside = Path(path).with_suffix(".yaml")
    return str(beside) if Path(path).is_file() and beside.is_file() else None


def _by_sidecar(path: str, beside: str, version: str | None) -> Choice:
    """UserError where it is no model file, or --version says another prediction type."""
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
    """The config that a checkpoint carries; None where it carries none. UserError where that is damaged."""
    text = ckpt.meta.get("model_config")
    if text is None:
        return None
    config, name = from_yaml(text, f"{path}: its model_config"), published(path)
    if name and "sampling:" not in text:  # a published file of ours that was written before there was this section
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
    """The config with the text padding said: what nobody has said is SD's, but MindONE's where it has trained."""
    if config.text.padding:
        return config
    pad = PADDING[config.text.variant]
    with_text = weights.checkpoint if weights.rest is None or _holds(weights.checkpoint, TEXT) else weights.rest
    if with_text.by_mindone and not published(path) and pad != "end":
        pad = "end"
        log.info("%s is MindONE's, which pads SD 2.x prompts with the end token: text.padding is 'end'", path)
    return replace(config, text=replace(config.text, padding=pad))


# ---- what a file says against what the config says ----


def check_words(
    path: str, ckpt: Checkpoint, config: ModelConfig, origin: str = "the config", parts: tuple[str, ...] = PARTS
) -> None:
    """Compare what a checkpoint says of itself with a config.

    Args:
        origin: what messages call the config.
        parts: the networks that are wanted of the file; the type and the schedule are the UNet's.

    Raises:
        UserError: it was trained with another latent scale, prediction type or schedule, or for another architecture.
    """
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
            raise UserError(f"{path} was trained with schedule {key}: {quoted(schedule[key])}, {origin} says {value}")


def _differences(own: ModelConfig, config: ModelConfig, parts: tuple[str, ...]) -> Iterator[tuple]:
    """(key, the file's value, the config's) of what differs in the networks that are wanted."""
    for section in (_SECTIONS[part] for part in parts):
        said, wanted = (_comparable(getattr(which, section)) for which in (own, config))
        yield from ((f"{section}.{key}", said[key], wanted[key]) for key in said if said[key] != wanted[key])


def _comparable(section: object) -> dict:
    """A section's fields, with what is the same in other words made equal."""
    fields = asdict(section)
    fields.pop("use_checkpoint", None)  # memory and time, not the result
    if "attention_resolutions" in fields:
        fields["attention_resolutions"] = tuple(sorted(fields["attention_resolutions"]))
    if "padding" in fields:
        fields["padding"] = fields["padding"] or PADDING[fields["variant"]]
    return fields


# ---- reading ----


def read_checkpoint(
    path: str, config: ModelConfig, parts: tuple[str, ...] = PARTS, widen: bool = True, raw: bool = False
) -> Checkpoint:
    """A checkpoint of a model config, of which these networks are wanted.

    `widen` and `raw` are those of `checkpoint.load`.

    Raises:
        UserError: it cannot be read, or `check_words` finds another model.
    """
    ckpt = checkpoint.load(path, widen, raw)
    check_words(path, ckpt, config, parts=parts)
    return ckpt


def tensors_of(weights: Weights, choice: Choice, vae: str | None = None) -> dict[str, np.ndarray]:
    """All tensors of a model, the autoencoder's from a file of its own where one is given.

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


def describe(config: ModelConfig) -> dict[str, str]:
    """What a checkpoint of this config says of itself; `check_words` and other tools look there."""
    return {
        "prediction_type": config.prediction_type,
        "schedule": json.dumps(asdict(config.schedule)),
        "resolution": f"{config.image_size}x{config.image_size}",
        "scale_factor": repr(config.scale_factor),
        "model_config": to_yaml(config),
    }


def config_key(config: ModelConfig) -> str:
    """16 hexadecimal digits for all of a config that decides what a network answers.

    Sampling and size are not in it: a picture's facts say them one by one.
    """
    plain = replace(config, sampling=SamplingConfig(), unet=replace(config.unet, use_checkpoint=False))
    step = config.vae.factor * config.unet.factor
    return hashlib.sha256(to_yaml(replace(plain, image_size=step)).encode()).hexdigest()[:16]


def _holds(ckpt: Checkpoint, part: str) -> bool:
    return any(name.startswith(part) for name in ckpt.tensors)
