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
    also: tuple[str, ...] = ()  # what Stability AI and its partners call the same weights, without a suffix


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


_WUKONG = "1.5-wukong", "wukong-huahua"  # a version of MindONE's, and how the names of its files begin
_NOT_WUKONG = "it is Stable Diffusion 1.x with a Chinese vocabulary, which is not available here"


def version(word: str) -> str:
    """For `type=` of an option, whose choices tell the rest."""
    if word == _WUKONG[0]:
        raise argparse.ArgumentTypeError(f"{word}: {_NOT_WUKONG}; choose one of {', '.join(VERSIONS)}")
    return word


def published(path: str | Path) -> str | None:
    """The version that a file is by its name, whatever its suffix; None where no published one is called so."""
    stem = Path(path).stem
    return next((word for word, v in VERSIONS.items() if stem in (Path(v.checkpoint).stem, *v.also)), None)


def existing(path: str) -> str:
    """A checkpoint that the user named.

    Raises:
        UserError: there is none; of a published one says where to get it. Or it is one that cannot be used here.
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
    """The file of that version under models/; with `fetch` it is downloaded where it is not there.

    Args:
        prediction_type: what its UNet will be taken for. Most of these files do not say what they are, so a config of
            another type would go unnoticed. None where the UNet is not wanted.

    Raises:
        UserError: it is of another type, or not there; then says which file to get, from where and where to put it.
    """
    own = load_model_config(VERSIONS[version].config).prediction_type
    if prediction_type not in (None, own):
        raise UserError(
            f"--version {version} was trained with prediction_type '{own}', the config says '{prediction_type}': "
            "leave out the config, or choose another version"
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
