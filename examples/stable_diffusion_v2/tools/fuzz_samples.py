"""The files that tools/fuzz_files.py damages: small valid files of every kind that is read here, and their readers."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import mindspore as ms
import numpy as np
from PIL import Image, PngImagePlugin
from train_text_to_image import build_parser

from eval.sides import read_statistics
from ldm import checkpoint
from ldm.checkpoint import diffusers_config, formats, lora
from ldm.config.model import (
    ModelConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    load_model_config,
    save_model_config,
    to_dict,
)
from ldm.config.options import read_options
from ldm.data.captions import read_captions
from ldm.data.images import check_image, load_image
from ldm.data.prompts import read_lines
from ldm.parts import TEXT, UNET, VAE
from ldm.pictures import ENTRY, RECORD, read_facts, read_record
from ldm.train.state import load_state, save_state
from ldm.weights import choose_config, open_weights, tensors_of, words_of

HERE = Path(__file__).resolve().parents[1]
Image.MAX_IMAGE_PIXELS = 1 << 24  # twice as many are read at most; by default 179 million, which take 700 MB
PIXELS = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
_EXIF = Image.Exif()
_EXIF[0x0112] = 6  # turned by a quarter
CONFIG = ModelConfig(
    "v",
    image_size=8,
    unet=UNetConfig(4, 4, 32, 1, (1,), (1,), num_head_channels=32, context_dim=8),
    vae=VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1),
    text=TextConfig(vocab_size=600, width=8, layers=1, heads=1),
)
FACTS = json.dumps({"prompt": "a cat, a dog", "seed": 1, "scale": 7.5, "sampler": "ddim", "checkpoints": {"x": "0f"}})
SETTINGS = {"prediction_type": "v", "betas": [0.9, 0.98]}
MINDONE = """model:
  params: {image_size: 64, linear_start: 0.00085, linear_end: 0.012, timesteps: 1000, parameterization: velocity,
    scale_factor: 0.18215, unet_config: {target: ldm.modules.diffusionmodules.openaimodel.UNetModel, params: {
    model_channels: 320, channel_mult: [1, 2, 4, 4], num_head_channels: 64, context_dim: 1024}},
    first_stage_config: {target: ldm.models.autoencoder.AutoencoderKL, params: {embed_dim: 4, ddconfig: {
    z_channels: 4, ch: 128, ch_mult: [1, 2, 4, 4]}}},
    cond_stage_config: {target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder, params: {layer: penultimate}}}
"""


class Sample(NamedTuple):
    """Files in a folder: `damaged` are damaged one at a time, `read` reads them."""

    damaged: list[Path]
    read: Callable[[], object]


def make_samples(folder: Path) -> dict[str, Sample]:
    """One sample of every kind, each in a folder of its own."""
    samples = {}
    for maker in (_checkpoints, _adapters, _diffusers, _state, _pictures, _texts, _configs):
        samples.update(maker(folder))
    return {
        kind: Sample(files if isinstance(files, list) else [files], read) for kind, (files, read) in samples.items()
    }


def _read_model(path: Path) -> None:
    weights = open_weights(str(path))
    tensors = tensors_of(weights, choose_config(weights))
    checkpoint.match(tensors, {name: array.shape for name, array in _tensors().items()}, path)


def _tensors() -> dict[str, np.ndarray]:
    shapes = {UNET + "out.2.weight": (4, 8, 3, 3), VAE + "quant_conv.bias": (8,)}
    shapes[TEXT + "model.ln_final.weight"] = (8,)
    return {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}


def _checkpoints(folder: Path) -> dict:
    files = {
        kind: folder / kind / f"model.{kind}" for kind in ("safetensors", "ckpt", "zip.pt", "legacy.pt", "resume.ckpt")
    }
    for path in files.values():
        path.parent.mkdir()
    meta = words_of(CONFIG)
    checkpoint.save(files["safetensors"], _tensors(), meta, "safetensors")
    checkpoint.save(files["ckpt"], _tensors(), meta, "mindspore")
    state = {f"{slot}{name}": array for name, array in _tensors().items() for slot in ("", "swap.", "adam_m.", "ema.")}
    layer = UNET + "input_blocks.1.1.to_q"
    shapes = {"linear.weight": (8, 8), "lora_up.weight": (8, 2), "lora_down.weight": (2, 8)}
    state.update({f"{layer}.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()})
    formats.write(files["resume.ckpt"], {**state, "global_step": np.array([5], np.int32)}, {}, "mindspore")
    pickled, numbers = _pickled(meta, legacy=False), list(_tensors().values())
    with zipfile.ZipFile(files["zip.pt"], "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", "little")
        for key, array in enumerate(numbers):
            archive.writestr(f"a/data/{key}", array.tobytes())
    head = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\x0d\0\0\0little_endian\x88s."
    keys = b"\x80\x02](" + b"".join(map(_word, "012")) + b"e."
    body = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in numbers)
    files["legacy.pt"].write_bytes(head + _pickled(meta, legacy=True) + keys + body)
    readers = {kind: ([path], lambda path=path: _read_model(path)) for kind, path in files.items()}
    resume = files["resume.ckpt"]
    readers["resume.ckpt"] = (
        [resume],
        lambda: (checkpoint.load(resume), checkpoint.load(resume, widen=False, raw=True)),
    )
    return readers


def _adapters(folder: Path) -> dict:
    """A LoRA in every form. What is read is merged too."""
    block = "attentions.0.transformer_blocks.0.attn1"
    modules = (f"unet.mid_block.{block}.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    matrices = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
    pairs = {module: lora.Pair(*matrices, 2.0 ** (1 + n)) for n, module in enumerate(modules)}
    base = {
        UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight": np.ones((8, 8), np.float32),
        TEXT + "model.transformer.resblocks.0.attn.in_proj_weight": np.ones((24, 8), np.float32),
    }

    def read(path: Path) -> None:
        lora.merged(base, [(lora.load(path), 1.0)])

    samples = {}
    for form in lora.FORMS:
        path = folder / f"lora.{form}" / {"peft": "x", "mindone": "x.ckpt"}.get(form, "x.safetensors")
        path.parent.mkdir()
        lora.save(path, lora.Adapter(pairs, {}, form), form, **words_of(CONFIG))
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        samples[f"lora.{form}"] = (files, lambda path=path: read(path))
    return samples


def _word(text: object) -> bytes:
    data = str(text).encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _pickled(meta: dict[str, str], legacy: bool) -> bytes:
    """{"state_dict": tensors, a number, a path, what the file says} as torch.save pickles it."""
    tensors = b""
    for key, (name, array) in enumerate(_tensors().items()):
        storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + _word(key) + _word("cpu") + b"M"
        storage += struct.pack("<H", array.size) + (b"N" if legacy else b"") + b"tQ"
        sizes, steps = (b"(" + b"".join(b"M" + struct.pack("<H", n) for n in numbers) + b"t" for numbers in (
            array.shape, [step // 4 for step in array.strides]))  # fmt: skip
        tensors += _word(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + sizes + steps
        tensors += b"\x89ccollections\nOrderedDict\n)RtR"
    said = b"".join(_word(key) + _word(text) for key, text in meta.items())
    path = _word("args") + b"cpathlib\nPosixPath\n" + _word("x") + b"\x85R"
    table = b"}" + _word("state_dict") + b"ccollections\nOrderedDict\n)R(" + tensors + b"us("
    return b"\x80\x02" + table + _word("step") + b"K\x05" + path + said + b"u."


def _diffusers(folder: Path) -> dict:
    place = folder / "diffusers"
    texts = diffusers_config.files(to_dict(CONFIG)["model"])
    for name, text in texts.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    shutil.rmtree(place / "tokenizer")
    index = place / "unet/diffusion_pytorch_model.safetensors.index.json"
    shard = "diffusion_pytorch_model-1-of-1.safetensors"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_out.weight": shard}}))
    files = (f"unet/{shard}", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    names = ("conv_out.weight", "quant_conv.bias", "text_model.final_layer_norm.weight")
    for file, name, array in zip(files, names, _tensors().values()):
        formats.write(place / file, {name: array}, {"format": "pt", **words_of(CONFIG)}, "safetensors")
    return {"diffusers": (sorted(place.rglob("*.json")), lambda: _read_model(place))}


def _state(folder: Path) -> dict:
    """A run's resume state, put back into what stands in for a training step."""
    params = {
        name: ms.Parameter(ms.Tensor(np.ones(shape, np.float32)), name) for name, shape in (("a", (2, 3)), ("b", ()))
    }
    counters = {"updates": 3, "ema_updates": 3, "loss_scale": 1.0, "good_in_a_row": 0}
    step = SimpleNamespace(variables=lambda: params, counters=lambda: counters, set_counters=lambda counters: None)
    path = folder / "state.safetensors"
    save_state(path, step, {"step": 5, "written": ["sd-1.ckpt"]}, SETTINGS)
    return {"state": ([path], lambda: load_state(path, step, SETTINGS))}


def png(text: str) -> bytes:
    """A picture of 8x8 pixels that carries this text, as drawing writes it."""
    entries, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    entries.add_itxt(ENTRY, text)
    Image.fromarray(PIXELS).save(buffer, "PNG", pnginfo=entries)
    return buffer.getvalue()


def _pictures(folder: Path) -> dict:
    files = {kind: folder / f"picture.{kind}" for kind in ("png", "jpg", "webp", "gif", "tiff", "bmp")}
    for path in files.values():
        Image.fromarray(PIXELS).save(path, **({"exif": _EXIF} if path.suffix in (".jpg", ".webp") else {}))
    files["png"].write_bytes(png(FACTS))

    def read(path: Path) -> None:
        check_image(str(path))
        load_image(str(path), 4)
        read_facts(path)

    return {kind: ([path], lambda path=path: read(path)) for kind, path in files.items()}


def _texts(folder: Path) -> dict:
    data, record, prompts, npz = folder / "data", folder / RECORD, folder / "prompts.txt", folder / "stats.npz"
    data.mkdir()
    for name in ("a.png", "b.png"):
        (data / name).touch()
    table, lines = data / "img_txt.csv", data / "metadata.jsonl"
    table.write_text('dir,text\na.png,"a cat, a dog"\nb.png,two\na.png,"line\nbreak"\n')
    lines.write_text('{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png", "text": null}\n')
    record.write_text("".join(json.dumps({"file": f"{n:05}.png", **json.loads(FACTS)}) + "\n" for n in range(3)))
    prompts.write_text("a cat\n\na dog (red:1.3)\n")
    np.savez_compressed(npz, mu=np.zeros(8), sigma=np.eye(8), resize="clean", count=5)
    return {
        "captions": ([table], lambda: read_captions(data, table.name)),
        "jsonl": ([lines], lambda: read_captions(data, lines.name)),
        "record": ([record], lambda: read_record(record)),
        "prompts": ([prompts], lambda: read_lines(prompts)),
        "npz": ([npz], lambda: read_statistics(str(npz))),
    }


def _configs(folder: Path) -> dict:
    files = {kind: folder / f"{kind}.yaml" for kind in ("model", "mindone", "train")}
    save_model_config(CONFIG, files["model"])
    files["mindone"].write_text(MINDONE)
    shutil.copy(HERE / "configs/train/train_config_vanilla_v2_vpred.yaml", files["train"])
    parser = build_parser()
    return {
        "model": ([files["model"]], lambda: load_model_config(files["model"])),
        "mindone": ([files["mindone"]], lambda: load_model_config(files["mindone"])),
        "train": ([files["train"]], lambda: read_options(parser, ["--train_config", str(files["train"])])),
    }
