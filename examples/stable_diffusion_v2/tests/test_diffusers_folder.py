"""A diffusers pipeline as a folder: written from the tiny model and read back; shards, variants, what is missing."""

import json
import shutil

import numpy as np
import pytest

from ldm import checkpoint
from ldm.checkpoint import diffusers_folder, formats
from ldm.config import load_model_config
from ldm.errors import UserError
from ldm.pipeline import read_checkpoint

TINY = "models/tiny-vpred.safetensors"


@pytest.fixture(scope="module")
def tiny():
    return checkpoint.load(TINY)


@pytest.fixture
def folder(tmp_path, tiny):
    checkpoint.save(tmp_path / "pipeline", tiny.tensors, tiny.meta, "diffusers")
    return tmp_path / "pipeline"


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]), name


def test_round_trip_is_exact_and_says_what_it_is(tmp_path, tiny, folder):
    read = checkpoint.load(folder)
    assert read.format == "diffusers"
    same(read.tensors, tiny.tensors)
    for key in ("prediction_type", "resolution", "model_config", "scale_factor"):
        assert read.meta[key] == tiny.meta[key], key
    assert json.loads(read.meta["schedule"]) == json.loads(tiny.meta["schedule"])
    assert not list(tmp_path.glob("*.partial"))


def test_other_formats_and_back(tmp_path, tiny, folder):
    for kind, name in (("mindspore", "a.ckpt"), ("safetensors", "b.safetensors"), ("diffusers", "c")):
        checkpoint.save(tmp_path / name, checkpoint.load(folder).tensors, tiny.meta, kind)
        same(checkpoint.load(tmp_path / name).tensors, tiny.tensors)


def test_configs_describe_the_networks(folder):
    def config(part, name="config"):
        return json.loads((folder / part / f"{name}.json").read_text())

    assert config("scheduler", "scheduler_config")["prediction_type"] == "v_prediction"
    unet, vae, text = config("unet"), config("vae"), config("text_encoder")
    assert unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1) == vae["sample_size"] == 64
    assert unet["in_channels"] == vae["latent_channels"]
    assert unet["cross_attention_dim"] == text["hidden_size"]
    assert len(json.loads((folder / "tokenizer/vocab.json").read_text())) == text["vocab_size"]
    assert text["eos_token_id"] == text["vocab_size"] - 1


def test_a_folder_by_others_is_described_by_its_scheduler(folder):
    """Without our entries in the UNet's file, as diffusers itself writes it."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    formats.write(path, formats.read(path)[0], {"format": "pt"}, "safetensors")
    meta = checkpoint.load(folder).meta
    assert meta["prediction_type"] == "v"
    assert meta["resolution"] == "64x64"
    schedule = json.loads(meta["schedule"])
    assert (schedule["name"], schedule["timesteps"], schedule["zero_terminal_snr"]) == ("scaled_linear", 1000, False)


def test_another_latents_scale_is_noticed(folder):
    config = load_model_config("configs/tiny-vpred.yaml")
    read_checkpoint(str(folder), config)
    path = folder / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.13025}))
    with pytest.raises(UserError, match="latents scaled by 0.13025, the config's scale_factor is 0.855"):
        read_checkpoint(str(folder), config)


def test_a_changed_prediction_type_contradicts_the_weights(folder):
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(UserError, match="trained with prediction_type 'v'.* says 'epsilon'"):
        checkpoint.load(folder)


def test_zero_terminal_snr_is_written_and_read(tmp_path, tiny):
    config = tiny.meta["model_config"].replace("zero_terminal_snr: false", "zero_terminal_snr: true")
    config = config.replace("spacing: leading", "spacing: trailing")
    schedule = json.dumps({**json.loads(tiny.meta["schedule"]), "zero_terminal_snr": True, "spacing": "trailing"})
    meta = {**tiny.meta, "model_config": config, "schedule": schedule}
    checkpoint.save(tmp_path / "z", tiny.tensors, meta, "diffusers")
    written = json.loads((tmp_path / "z/scheduler/scheduler_config.json").read_text())
    assert written["rescale_betas_zero_snr"] is True and written["timestep_spacing"] == "trailing"
    assert json.loads(checkpoint.load(tmp_path / "z").meta["schedule"])["zero_terminal_snr"] is True


def shard(folder, parts, variant=""):
    """The UNet's file as so many, with an index, as diffusers names them."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors, names = formats.read(path)[0], {}
    for n in range(parts):
        name = f"diffusion_pytorch_model{variant}-{n + 1:05}-of-{parts:05}.safetensors"
        mine = {key: tensors[key] for key in sorted(tensors)[n::parts]}
        formats.write(path.with_name(name), mine, {"format": "pt"}, "safetensors")
        names.update(dict.fromkeys(mine, name))
    index = path.with_name(f"diffusion_pytorch_model.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    path.unlink()
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(folder, tiny, variant):
    shard(folder, 3, variant)
    same(checkpoint.load(folder).tensors, tiny.tensors)


def test_a_missing_shard_is_named(folder):
    index = shard(folder, 3)
    index.with_name("diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards .*00002"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", 7])
def test_shards_elsewhere_are_refused(folder, name):
    index = shard(folder, 1)
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="no usable weight_map"):
        checkpoint.load(folder)


def test_full_precision_is_read_before_variants(folder, tiny):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    other = {name: np.zeros_like(array) for name, array in formats.read(path)[0].items()}
    formats.write(path.with_name("diffusion_pytorch_model.fp16.safetensors"), other, {}, "safetensors")
    same(checkpoint.load(folder).tensors, tiny.tensors)
    path.unlink()
    assert not checkpoint.load(folder).tensors["first_stage_model.decoder.conv_in.weight"].any()


def test_what_is_no_pipeline(tmp_path, folder):
    with pytest.raises(UserError, match="no diffusers pipeline"):
        checkpoint.load(tmp_path)
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="unet has no weights .* but config.json"):
        checkpoint.load(folder)
    (folder / "scheduler/scheduler_config.json").write_text("{")
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="scheduler_config.json"):
        checkpoint.load(folder)


def test_a_pipeline_takes_the_place_of_one(tmp_path, tiny, folder):
    zeros = {name: np.zeros_like(array) for name, array in tiny.tensors.items()}
    checkpoint.save(folder, zeros, tiny.meta, "diffusers")
    assert not checkpoint.load(folder).tensors["first_stage_model.decoder.conv_in.weight"].any()
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_writing_takes_no_other_place_and_leaves_nothing_half(tmp_path, tiny, folder, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.png").write_bytes(b"x")
    with pytest.raises(UserError, match="photos exists and is no diffusers pipeline"):
        checkpoint.save(tmp_path / "photos", tiny.tensors, tiny.meta, "diffusers")
    with pytest.raises(UserError, match="give the model's config"):
        checkpoint.save(tmp_path / "new", tiny.tensors, {}, "diffusers")

    def full(*_):
        raise UserError("cannot write: No space left on device")

    monkeypatch.setattr(diffusers_folder.formats, "write", full)
    with pytest.raises(UserError, match="No space"):
        checkpoint.save(tmp_path / "new", tiny.tensors, tiny.meta, "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "pipeline"]
