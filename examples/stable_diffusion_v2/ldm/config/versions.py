"""The published models by version: config and file.

MindONE's files can be downloaded. It publishes none of Stable Diffusion XL, whose files are Stability's.
"""

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
_STABILITY = "https://huggingface.co/stabilityai"


class Version(NamedTuple):
    """A published model. `also`: other names of its file, without a suffix. `page`: where it is, if not at MindONE's.

    `checkpoint` is the name of its file under models/; None where there is no single one. `rest` is the version whose
    file has the other networks, where this file has a UNet alone.
    """

    config: str
    checkpoint: str | None
    also: tuple[str, ...] = ()
    page: str | None = None
    rest: str | None = None

    @property
    def is_mindone(self) -> bool:
        return bool(self.checkpoint) and self.page is None and self.checkpoint.endswith(".ckpt")

    @property
    def stems(self) -> tuple[str, ...]:
        """All names of the file, without a suffix."""
        return (*([Path(self.checkpoint).stem] if self.checkpoint else []), *self.also)

    @property
    def files(self) -> list[str]:
        """The files that serve, the first first. Those of SDXL serve under any name and in either format."""
        others = [stem + suffix for stem in self.also for suffix in (".safetensors", ".ckpt")] if self.page else []
        return [f"models/{name}" for name in ([self.checkpoint] if self.checkpoint else []) + others]


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
    "1.5-inpaint": Version(
        "configs/v1-inpaint-inference.yaml",
        "sd-v1-5-inpainting.ckpt",
        ("sd-v1-5-inpainting",),
        page="https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-inpainting",
    ),
    "2.0-inpaint": Version("configs/v2-inpaint-inference.yaml", "sd_v2_inpaint-f694d5cf.ckpt", ("512-inpainting-ema",)),
    "2.0-depth": Version("configs/v2-depth-inference.yaml", "sd_v2_depth-186e18a0.ckpt", ("512-depth-ema",)),
    "xl": Version(
        "configs/sdxl-inference.yaml",
        "sd_xl_base_1.0.safetensors",
        ("sd_xl_base_1.0_0.9vae", "sd_xl_base_1.0_ms"),
        f"{_STABILITY}/stable-diffusion-xl-base-1.0",
    ),
    "xl-vpred": Version("configs/sdxl-vpred-inference.yaml", None),
    "xl-refiner": Version(
        "configs/sdxl-refiner-inference.yaml",
        "sd_xl_refiner_1.0.safetensors",
        ("sd_xl_refiner_1.0_0.9vae", "sd_xl_refiner_1.0_ms"),
        f"{_STABILITY}/stable-diffusion-xl-refiner-1.0",
    ),
    "tiny": Version("configs/tiny-vpred.yaml", "tiny-vpred.safetensors"),
    "tiny-4step": Version("configs/tiny-vpred.yaml", "tiny-4step.safetensors", rest="tiny"),
}
XL_VPRED = "xl-vpred"


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
    return next((word for word, v in VERSIONS.items() if stem in v.stems), None)


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
    public = {model.checkpoint: known for known, model in VERSIONS.items() if model.is_mindone or model.page}
    known = public.get(name)
    if known is None:
        raise UserError(f"checkpoint {path} does not exist")
    place = Path(path).parent
    if not VERSIONS[known].is_mindone:
        raise UserError(f"checkpoint {path} does not exist: get it from {VERSIONS[known].page} and put it into {place}")
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
    found = next(filter(None, map(search, VERSIONS[version].files)), None)
    if found is not None:
        return str(found)
    place = SCRIPTS / "models"
    if not VERSIONS[version].is_mindone:
        raise UserError(_not_there(version, place))
    name = VERSIONS[version].checkpoint
    if not fetch:
        raise UserError(
            f"no models/{name} for --version {version}: add --download, or get it from {PUBLISHED}/{name} and put it "
            f"into {place}"
        )
    download(f"{PUBLISHED}/{name}", place / name)
    return str(place / name)


def rest_of(path: str) -> str | None:
    """The published file with the networks that a published UNet's file lacks; None for any other file."""
    name = published(path)
    return find_checkpoint(VERSIONS[name].rest) if name and VERSIONS[name].rest else None


def _not_there(version: str, place: Path) -> str:
    """What to do where the file of a version is missing and cannot be downloaded."""
    name, page = VERSIONS[version].checkpoint, VERSIONS[version].page
    if name is None:
        models = "NoobAI-XL V-Pred or terminus-xl, for instance"
        return f"--version {version} is no single published file: give the path of such a model ({models})"
    if page:
        what = f"no models/{name} for --version {version}, and --download has none of it"
        return f"{what}: get it from {page} and put it into {place}"
    return f"no models/{name} for --version {version}: restore it from the repository to {place}"
