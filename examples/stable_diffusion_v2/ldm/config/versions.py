"""The published models by version: config and file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from ldm.config.model import load_model_config
from ldm.config.yaml_file import SCRIPTS, search
from ldm.download import download
from ldm.errors import UserError

PUBLISHED = "https://download.mindspore.cn/toolkits/mindone/stable_diffusion"


class Version(NamedTuple):
    config: str
    checkpoint: str
    also: tuple[str, ...] = ()  # Stability AI's and its partners' names of the same weights, without a suffix


VERSIONS = {
    "1.5": Version("configs/v1-inference.yaml", "sd_v1.5-d0ab7146.ckpt", ("v1-5-pruned", "v1-5-pruned-emaonly")),
    "2.0": Version("configs/v2-inference.yaml", "sd_v2_base-57526ee4.ckpt", ("512-base-ema",)),
    "2.0-v": Version("configs/v2-vpred-inference.yaml", "sd_v2_768_v-e12e3a9b.ckpt", ("768-v-ema",)),
    "2.1": Version(
        "configs/v2-inference.yaml", "sd_v2-1_base-7c8d09ce.ckpt", ("v2-1_512-ema-pruned", "v2-1_512-nonema-pruned")
    ),
    "2.1-v": Version(
        "configs/v2-vpred-inference.yaml",
        "sd_v2-1_768_v-061732d1.ckpt",
        ("v2-1_768-ema-pruned", "v2-1_768-nonema-pruned"),
    ),
    "tiny": Version("configs/tiny-vpred.yaml", "tiny-vpred.safetensors"),
}


_WUKONG = "1.5-wukong", "wukong-huahua"  # a version of MindONE's, and the beginning of its files' names
_NOT_WUKONG = "it is Stable Diffusion 1.x with a Chinese vocabulary, which is not available here"


def version(word: str) -> str:
    """For `type=` of an option: refuses MindONE's Chinese version with a reason; `choices` refuse other words."""
    if word == _WUKONG[0]:
        raise argparse.ArgumentTypeError(f"{word}: {_NOT_WUKONG}; choose one of {', '.join(VERSIONS)}")
    return word


def published(path: str | Path) -> str | None:
    """The published version with a file of this name, whatever its suffix; None where there is none."""
    stem = Path(path).stem
    return next((word for word, v in VERSIONS.items() if stem in (Path(v.checkpoint).stem, *v.also)), None)


def existing(path: str) -> str:
    """A checkpoint that the user named.

    Raises:
        UserError: there is no such file (for a published one the message says where to get it), or the file cannot be
            used here.
    """
    name = Path(path).name
    if name.startswith(_WUKONG[1]):
        raise UserError(f"{path}: {_NOT_WUKONG}")
    if os.path.exists(path):
        return path
    known = next((known for known, model in VERSIONS.items() if model.checkpoint == name and known != "tiny"), None)
    if known is None:
        raise UserError(f"checkpoint {path} does not exist")
    place = Path(path).parent
    raise UserError(
        f"checkpoint {path} does not exist: get it from {PUBLISHED}/{name} and put it into {place}, or give "
        f"--version {known} --download instead of the path"
    )


def find_checkpoint(version: str, fetch: bool = False, prediction_type: str | None = None) -> str:
    """The file of that version under models/; with `fetch` a missing one is downloaded.

    Args:
        prediction_type: the type that its UNet will be used with, or None where the UNet is not wanted. Most of these
            files do not say their type, so nobody would notice another one.

    Raises:
        UserError: the file is of another type, or missing; then the message says where to get it and where to put it.
    """
    own = load_model_config(VERSIONS[version].config).prediction_type
    if prediction_type not in (None, own):
        raise UserError(
            f"--version {version} was trained with prediction_type '{own}', the config says '{prediction_type}': "
            "leave out the config and --set, or choose another version"
        )
    name = VERSIONS[version].checkpoint
    found = search(f"models/{name}")
    if found is not None:
        return str(found)
    place = SCRIPTS / "models" / name
    if not name.endswith(".ckpt"):
        raise UserError(f"no models/{name} for --version {version}: restore it from the repository to {place.parent}")
    if not fetch:
        raise UserError(
            f"no models/{name} for --version {version}: add --download, or get it from {PUBLISHED}/{name} and put it "
            f"into {place.parent}"
        )
    download(f"{PUBLISHED}/{name}", place)
    return str(place)
