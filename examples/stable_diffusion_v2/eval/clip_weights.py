"""CLIP checkpoints: the names of OpenAI, OpenCLIP, transformers and MindONE for the same parameters, and files.

Inside, the names are OpenAI's, which OpenCLIP shares. transformers (CLIPModel) has three projections where we have one,
and its two last matrices are transposed. MindONE's evaluation (tools/_common/clip, files of MindFormers) has OpenAI's
names except for norms, the merged projection and the token table.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from ldm.checkpoint import formats
from ldm.checkpoint.names import Rules
from ldm.config.yaml_file import SCRIPTS, search
from ldm.errors import UserError

Tensors = dict[str, np.ndarray]

OPENAI = "https://openaipublic.azureedge.net/clip/models"
MODELZOO = "https://ascend-repo-modelzoo.obs.cn-east-2.myhuaweicloud.com"
PUBLISHED = {  # file name: address, best known first; by default the first of these files in models/ is used
    "ViT-L-14.pt": f"{OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "clip_vit_l_14.ckpt": f"{MODELZOO}/MindFormers/clip/clip_vit_l_14.ckpt",
    "ViT-B-16.pt": f"{OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "clip_vit_b_16.ckpt": f"{MODELZOO}/MindFormers/clip/clip_vit_b_16.ckpt",
    "ViT-B-32.pt": f"{OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "clip_vit_b_32.ckpt": f"{MODELZOO}/XFormer_for_mindspore/clip/clip_vit_b_32.ckpt",
}
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

EXTRAS = re.compile(
    r"(.+\.)?(logit_scale|logit_bias|position_ids|attn_mask|input_resolution|context_length|vocab_size)"
)

_TOWERS = (
    ("visual.transformer.resblocks.{i}.", "vision_model.encoder.layers.{i}."),
    ("transformer.resblocks.{i}.", "text_model.encoder.layers.{i}."),
)

TRANSFORMERS = Rules(
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.{leaf}", "vision_model.pre_layrnorm.{leaf}"),  # their spelling
    ("visual.ln_post.{leaf}", "vision_model.post_layernorm.{leaf}"),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.{leaf}", "text_model.final_layer_norm.{leaf}"),
    ("text_projection", "text_projection.weight"),
    *((block + "attn.in_proj_{leaf}", layer + "self_attn.in_proj_{leaf}") for block, layer in _TOWERS),
    *((block + "attn.out_proj.{leaf}", layer + "self_attn.out_proj.{leaf}") for block, layer in _TOWERS),
    *((block + "mlp.c_fc.{leaf}", layer + "mlp.fc1.{leaf}") for block, layer in _TOWERS),
    *((block + "mlp.c_proj.{leaf}", layer + "mlp.fc2.{leaf}") for block, layer in _TOWERS),
    *((block + "ln_{j}.{leaf}", layer + "layer_norm{j}.{leaf}") for block, layer in _TOWERS),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")

MINDONE = Rules(
    ("token_embedding.weight", "token_embedding.embedding_table"),
    ("{path}.attn.in_proj_{leaf}", "{path}.attn.in_proj.{leaf}"),
    ("{path}.ln_{j}.{norm}", "{path}.ln_{j}.{norm}"),
    ("visual.ln_pre.{norm}", "visual.ln_pre.{norm}"),
    ("visual.ln_post.{norm}", "visual.ln_post.{norm}"),
    ("ln_final.{norm}", "ln_final.{norm}"),
)

_PROJECTION = re.compile(r"(.+\.self_attn\.)q_proj\.(weight|bias)")


def read(path: Path) -> Tensors:
    """The parameters of a CLIP file by OpenAI's names, from any of the four namings; extras are left out.

    Raises:
        UserError: the file cannot be read, or holds a parameter under two names.
    """
    return to_openai(formats.read(path)[0], path)


def to_openai(tensors: Tensors, path: str | Path = "the checkpoint") -> Tensors:
    """The tensors by OpenAI's names and shapes, from any of the four namings; unknown names stay."""
    tensors = {name.removeprefix("module."): array for name, array in tensors.items()}
    tensors = {name: array for name, array in tensors.items() if not EXTRAS.fullmatch(name)}
    tensors = {name: array.T if name in TRANSPOSED else array for name, array in _merged(tensors).items()}
    renamed: Tensors = {}
    for name, array in tensors.items():
        new = MINDONE.to_left(TRANSFORMERS.to_left(name))
        if new in renamed:
            raise UserError(f"{path} holds {new} twice, under two names")
        renamed[new] = array
    return renamed


def _merged(tensors: Tensors) -> Tensors:
    """The tensors with transformers' q_proj, k_proj and v_proj joined to one in_proj."""
    merged = dict(tensors)
    for name in tensors:
        found = _PROJECTION.fullmatch(name)
        trio = [f"{found[1]}{x}_proj.{found[2]}" for x in "qkv"] if found else []
        if found and all(part in tensors for part in trio):
            merged[f"{found[1]}in_proj_{found[2]}"] = np.concatenate([merged.pop(part) for part in trio])
    return merged


def find(path: str | None) -> Path:
    """The checkpoint file at a path (a file, or a folder of transformers or OpenCLIP); for None a known one in models/.

    Raises:
        UserError: there is none; the message says which file to get, from where, and where to put it.
    """
    if path is None:
        there = next((file for file in PUBLISHED if search(f"models/{file}")), None)
        if there:
            return search(f"models/{there}")
        raise UserError("no CLIP checkpoint is given, and none is in models/: " + _advice("ViT-L-14.pt"))
    if os.path.isdir(path):
        found = [Path(path) / name for name in IN_FOLDERS if (Path(path) / name).is_file()]
        if not found:
            raise UserError(f"the folder {path} holds no CLIP checkpoint: it needs one of {', '.join(IN_FOLDERS)}")
        return found[0]
    file = search(path)
    if file is None:
        known = Path(path).name if Path(path).name in PUBLISHED else "ViT-L-14.pt"
        raise UserError(f"there is no CLIP checkpoint {path}: " + _advice(known))
    return file


def _advice(name: str) -> str:
    return f"get {PUBLISHED[name]} and put it into {SCRIPTS / 'models'}, or give your own with --load_checkpoint"


def stated_activation(path: Path) -> str | None:
    """The activation in the config of transformers or OpenCLIP beside the file; None where there is no config."""
    config = _json(path.with_name("config.json"))
    acts = {
        config[part].get("hidden_act")
        for part in ("text_config", "vision_config")
        if isinstance(config.get(part), dict)
    }
    if len(acts) == 1 and acts <= {"gelu", "quick_gelu"}:
        return acts.pop()
    model = _json(path.with_name("open_clip_config.json")).get("model_cfg")
    if isinstance(model, dict):
        return "quick_gelu" if model.get("quick_gelu") else "gelu"
    return None


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
