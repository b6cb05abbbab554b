"""A diffusers pipeline as a folder: parameters in unet/, vae/ and text_encoder/, and the JSON files that describe them.

SDXL has a text_encoder_2/ too, and its refiner has it alone. A part is read from one file or from shards with an index:
.safetensors before PyTorch's .bin, full precision before variants such as fp16. A folder is written as .safetensors,
with every file that ``from_pretrained`` of its class asks for.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from ldm.checkpoint import diffusers_config as configs
from ldm.checkpoint import formats, kinds, metadata, names
from ldm.checkpoint.arrays import Strings, Tensors
from ldm.checkpoint.diffusers_config import INDEX, Table
from ldm.checkpoint.lora.reading import is_adapter_folder
from ldm.config.yaml_file import dump_yaml
from ldm.diffusion.prediction import DIFFUSERS_NAMES
from ldm.errors import UserError
from ldm.files import escaped, quoted, replacing_folder
from ldm.text.tokenizer import padding_of

TEXTS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", "vae", *TEXTS)
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_CHECKS = {
    "unet": configs.check_unet,
    "vae": configs.check_vae,
    **dict.fromkeys(TEXTS, configs.check_text_encoder),
}
_CLASSES = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae", "CLIPTextModel": "text_encoder"}
_AVERAGE = "unet_ema"  # the folder of the moving average in checkpoints of diffusers' trainers

log = logging.getLogger(__name__)


# ---- reading ----


def read(folder: str | Path, widen: bool = True, raw: bool = False) -> tuple[Tensors, Strings]:
    """(parameters by Stability's names, the folder's description of itself); `widen` as in `formats.read`.

    The folder is a pipeline, one part of it (unet/ alone, for instance), or a checkpoint of diffusers' trainers. A
    trainer may keep the UNet's weights and their moving average: `raw` chooses the weights, otherwise the average is
    taken.

    Raises:
        UserError: the folder is none of these, a file in it is missing or damaged, or a network differs from ours.
    """
    folder = Path(folder)
    places = _places(folder, raw)
    tables = {part: Table(place / "config.json") for part, place in places.items() if _has_config(place)}
    for part, table in tables.items():
        _CHECKS[part](table)
    parts, strings = {}, {}
    for part in PARTS:
        parts[part], said = _read_part(places[part], widen) if part in places else ({}, {})
        strings.update(said if part == "unet" else {})
    texts = [word for part in TEXTS for word in (parts[part], _text_variant(tables.get(part), parts[part]))]
    tensors = names.from_diffusers(parts["unet"], parts["vae"], *texts)
    for name in (configs.SCHEDULER, INDEX):
        if (folder / name).is_file():
            tables[name] = Table(folder / name)
    return tensors, {**strings, **_described(folder, tables, strings)}


def _has_config(place: Path) -> bool:
    return (place / "config.json").is_file()


def _places(folder: Path, raw: bool) -> dict[str, Path]:
    """The folder of each part that is there; UserError where there is none."""
    _refuse_others(folder)
    places = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    average = folder / _AVERAGE
    if average.is_dir() and not (raw and "unet" in places):
        places["unet"] = average
    if average.is_dir():
        log.info("%s is a checkpoint of a trainer; its UNet is read from %s/", folder, places["unet"].name)
    if places:
        return places
    if _has_config(folder):
        return {_part_alone(folder): folder}
    raise UserError(f"{folder} is a folder, but no diffusers pipeline: it has none of {'/, '.join(PARTS)}/")


def _refuse_others(folder: Path) -> None:
    """UserError for folders of diffusers that are something else."""
    if is_adapter_folder(folder):
        raise UserError(f"{folder} holds a LoRA: {kinds.GIVE_ADAPTER}")
    others = [name for name in ("text_encoder_3", "transformer", "prior", "controlnet") if (folder / name).is_dir()]
    if others:
        kind = Table(folder / INDEX).get("_class_name", "a word", "") if (folder / INDEX).is_file() else ""
        named = f"a {escaped(kind)}" if kind else "a pipeline of another kind"
        raise UserError(f"{folder} is {named}, with a {others[0]}/: choose a pipeline of Stable Diffusion")


def _part_alone(folder: Path) -> str:
    """The part of a pipeline whose config and weights lie in a folder; UserError where it is none."""
    table = Table(folder / "config.json")
    classes = [table.get("_class_name", "a word", ""), *table.get("architectures", "a list of words", [])]
    if "CLIPTextModelWithProjection" in classes:
        raise UserError(f"{folder} is a text encoder of Stable Diffusion XL alone: give the whole pipeline's folder")
    part = next((_CLASSES[name] for name in classes if name in _CLASSES), None)
    if part is None:
        said = quoted(next(filter(None, classes), "nothing"))
        raise UserError(f"{folder} is no diffusers pipeline and no part of one: its config.json says {said}")
    return part


def _read_part(folder: Path, widen: bool) -> tuple[Tensors, Strings]:
    tensors, strings = {}, {}
    for path in _weight_files(folder):
        new, said, _ = formats.read(path, widen)
        tensors.update(names.without_wrappers(new))
        strings.update(said)
    return tensors, strings


def _weight_files(folder: Path) -> list[Path]:
    """The files with a part's weights, of the first kind that is there; UserError where there is none."""
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16", ".*"):
            for stem in _STEMS:
                whole = sorted(folder.glob(f"{stem}{variant}.{suffix}"))
                index = sorted(folder.glob(f"{stem}.{suffix}.index{variant}.json"))
                if index:
                    return _shards(index[0])
                if whole and "-of-" not in whole[0].name:
                    return whole[:1]
    there = ", ".join(escaped(path.name) for path in sorted(folder.iterdir())[:5]) or "nothing"
    raise UserError(f"{folder} has no weights ({_STEMS[0]}.safetensors or the like) but {there}")


def _shards(index: Path) -> list[Path]:
    files = Table(index).content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(n, str) and n == os.path.basename(n) for n in files.values()):
        raise UserError(f"{index} has no usable weight_map; fetch the file again")
    shards = [index.parent / name for name in sorted(set(files.values()))]
    missing = [escaped(path.name) for path in shards if not os.path.isfile(path)]
    if missing or not shards:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards (first: {missing[:1]}); fetch them"
        )
    return shards


def _text_variant(table: Table | None, tensors: Tensors) -> str:
    """TextConfig's name of the text encoder's variant. Without a config the width decides: 768 is SD 1.x's."""
    if table:
        return configs.variant(table)
    norm = next((a for name, a in tensors.items() if name.endswith("final_layer_norm.weight")), None)
    return "clip" if norm is not None and norm.shape == (768,) else "openclip"


def _described(folder: Path, tables: dict[str, Table], strings: Strings) -> Strings:
    """The table ``meta`` of a folder.

    The scheduler's config tells prediction type and schedule, the networks' configs tell the latents' scale and the
    resolution. Where all configs are there, the table holds the whole model's config.
    """
    told = {}
    scheduler, unet, vae = (tables.get(name) for name in (configs.SCHEDULER, "unet", "vae"))
    if scheduler:
        told["prediction_type"] = _prediction_type(folder, scheduler, strings)
        told["schedule"] = json.dumps({**metadata.schedule(folder, strings), **configs.schedule(scheduler)})
    scale = configs.scale_factor(vae) if vae else None
    if scale is not None:
        told["scale_factor"] = repr(scale)
    size = configs.image_size(unet, vae) if unet and vae else None
    if size:
        told["resolution"] = f"{size}x{size}"
    if unet and vae and scheduler and any(part in tables for part in TEXTS):
        told["model_config"] = _model_config(folder, tables, strings)
    return told


def _prediction_type(folder: Path, scheduler: Table, strings: Strings) -> str:
    kind = configs.prediction_type(scheduler)
    said = strings.get("prediction_type", kind)
    if said != kind:
        theirs = quoted(scheduler.get("prediction_type", "a word", DIFFUSERS_NAMES["eps"]))
        raise UserError(
            f"{folder} contradicts itself: its UNet was trained with prediction_type {quoted(said)}, its "
            f"scheduler_config.json says {theirs}; correct one of them"
        )
    return kind


def _model_config(folder: Path, tables: dict[str, Table], strings: Strings) -> str:
    """The whole model's config as YAML. A config among the UNet's strings fills what the folder leaves open."""
    texts = [part for part in TEXTS if part in tables]
    networks = tables["unet"], tables["vae"], [tables[part] for part in texts]
    model = configs.model_config(*networks, tables[configs.SCHEDULER], tables.get(INDEX))
    for section, part in zip(("text", "text_2"), texts):
        pad = _padding(folder / part.replace("text_encoder", "tokenizer"))
        if pad not in (None, padding_of(model[section]["variant"])):
            model[section]["padding"] = pad
    carried = metadata.model_section(folder, strings)
    if carried is None:
        return dump_yaml({"model": model})
    joined = {**carried, **model}
    for key, section in model.items():
        if isinstance(section, dict) and isinstance(carried.get(key), dict):
            joined[key] = {**carried[key], **section}
    return strings["model_config"] if joined == carried else dump_yaml({"model": joined})


def _padding(tokenizer: Path) -> str | None:
    """The padding of short prompts, by the first file of a tokenizer's folder that tells it."""
    tables = (Table(tokenizer / name) for name in configs.TOKENS if (tokenizer / name).is_file())
    return next(filter(None, map(configs.padding, tables)), None)


# ---- writing ----


def write(folder: str | Path, tensors: Tensors, meta: Strings, dtype: str | None = None) -> None:
    """Write a pipeline, whole or not at all; an existing pipeline is replaced. ``meta`` must have ``model_config``.

    Raises UserError where the folder holds something else, or the disk refuses.
    """
    folder = Path(folder)
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder / INDEX).is_file():
        raise UserError(f"{folder} exists and is no diffusers pipeline; remove it or give another name")
    model = metadata.model_section(folder, meta)
    if model is None:
        raise UserError(
            "a diffusers folder describes its networks, and the checkpoint does not: give the model's config"
        )
    configs.check_model(model)
    wrong = kinds.contradiction(tensors, model)
    if wrong:
        raise UserError(f"the config is of another model than the weights: {wrong}")
    parts = names.to_diffusers(tensors, model["text"]["layers"])
    with replacing_folder(folder) as place:
        for name, content in configs.files(model).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(content, encoding="utf-8")
        for part in ("unet", "vae", *configs.text_parts(model)):
            strings = {"format": "pt", **(meta if part == "unet" else {})}
            stem = _STEMS[1] if part in TEXTS else _STEMS[0]
            formats.write(place / part / f"{stem}.safetensors", parts.get(part, {}), strings, "safetensors", dtype)
