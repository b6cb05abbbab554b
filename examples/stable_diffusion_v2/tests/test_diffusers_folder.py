"""A diffusers pipeline as a folder: written from the tiny model and read back; shards, variants, what is missing."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_sdxl

from ldm import checkpoint
from ldm.checkpoint import diffusers_config as configs
from ldm.checkpoint import diffusers_folder, formats, names
from ldm.checkpoint.names import GUIDANCE
from ldm.config.model import SamplingConfig, from_dict, from_yaml, load_model_config, to_dict
from ldm.errors import UserError
from ldm.weights import read_checkpoint, words_of

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
    with pytest.raises(UserError, match="latents scaled by 0.13025, the config says scale_factor 0.855"):
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


def test_a_shard_whose_name_is_too_long_for_a_disk(folder):
    shard(folder, 1).write_text(json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}}))
    with pytest.raises(UserError, match="lacks 1 of 1 shards"):
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


# ---- what the JSON files say ----


def change(folder, part, **values):
    """Other values in a part's config."""
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def strip(folder):
    """The folder as diffusers itself would have written it: nothing of ours in the UNet's file."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    formats.write(path, formats.read(path)[0], {"format": "pt"}, "safetensors")


def described(folder):
    return from_yaml(checkpoint.load(folder).meta["model_config"], str(folder))


@pytest.mark.parametrize("guidance", [None, 256])
@pytest.mark.parametrize(
    "name",
    [
        *("tiny-vpred", "v1-inference", "v2-inference", "v2-vpred-inference"),
        *("sdxl-inference", "sdxl-vpred-inference", "sdxl-refiner-inference"),
    ],
)
def test_a_config_survives_diffusers_files(tmp_path, name, guidance):
    config = load_model_config(f"configs/{name}.yaml")
    config = replace(config, unet=replace(config.unet, time_cond_proj_dim=guidance))
    for path, text in configs.files(to_dict(config)["model"]).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    unet, vae, scheduler = (configs.Table(tmp_path / p) for p in (configs.UNET, configs.VAE, configs.SCHEDULER))
    places = (tmp_path / path for path in (configs.TEXT, configs.TEXT_2))
    texts = [configs.Table(place) for place in places if place.exists()]
    configs.check_unet(unet)
    configs.check_vae(vae)
    for table in texts:
        configs.check_text_encoder(table)
    index = configs.Table(tmp_path / configs.INDEX)
    read = from_dict({"model": configs.model_config(unet, vae, texts, scheduler, index)}, name)
    kept = SamplingConfig(
        spacing=config.sampling.spacing if "xl" in name else None,
        zeros_for_empty_prompt=config.sampling.zeros_for_empty_prompt,
    )
    assert read == replace(config, unet=replace(config.unet, use_checkpoint=False), sampling=kept)
    assert unet.content.get("time_cond_proj_dim") == guidance


def test_a_folder_by_others_has_the_whole_config(folder):
    strip(folder)
    assert described(folder) == replace(load_model_config("configs/tiny-vpred.yaml"), sampling=SamplingConfig())


def test_a_network_that_is_told_the_guidance_scale(tmp_path, tiny):
    config = from_yaml(tiny.meta["model_config"], TINY)
    config = replace(config, unet=replace(config.unet, time_cond_proj_dim=8))
    weight = np.random.default_rng(0).standard_normal((config.unet.model_channels, 8), np.float32)
    tensors = {**tiny.tensors, GUIDANCE: weight}
    checkpoint.save(tmp_path / "guided", tensors, words_of(config), "diffusers")
    unet, _, _ = formats.read(tmp_path / "guided/unet/diffusion_pytorch_model.safetensors")
    assert np.array_equal(unet["time_embedding.cond_proj.weight"], weight)
    strip(tmp_path / "guided")
    same(checkpoint.load(tmp_path / "guided").tensors, tensors)
    assert described(tmp_path / "guided").unet == config.unet
    same(names.from_mindone(names.to_mindone(tensors)), names.from_mindone(tensors))


def test_other_heads_are_another_config(folder):
    """What the JSON files say counts, not our own text beside them. Levels 2 and 3 attend, 128 wide."""
    change(folder, configs.TEXT, num_attention_heads=8)
    for heads, each in (([1, 1, 4, 4], (None, 32)), ([5, 5, 2, 2], (None, 64)), (4, (4, None))):
        change(folder, configs.UNET, attention_head_dim=heads)
        read = described(folder)
        assert (read.unet.num_heads, read.unet.num_head_channels) == each
    assert read.text.heads == 8
    assert read.vae == load_model_config("configs/tiny-vpred.yaml").vae


def test_as_many_heads_at_each_width(tmp_path):
    model = to_dict(load_model_config("configs/v1-inference.yaml"))["model"]
    table = json.loads(configs.files(model)[configs.UNET])
    (tmp_path / "config.json").write_text(json.dumps({**table, "attention_head_dim": [8, 8, 8, 8]}))
    assert configs._unet_config(configs.Table(tmp_path / "config.json"))["num_heads"] == 8


FOREIGN = [
    (configs.UNET, "act_fn", "gelu"),
    (configs.UNET, "flip_sin_to_cos", False),
    (configs.UNET, "freq_shift", 1),
    (configs.UNET, "center_input_sample", True),
    (configs.UNET, "only_cross_attention", [True, False, False, False]),
    (configs.UNET, "only_cross_attention", [[True]]),
    (configs.UNET, "norm_num_groups", 16),
    (configs.UNET, "norm_eps", 1e-6),
    (configs.UNET, "mid_block_scale_factor", 2),
    (configs.UNET, "mid_block_type", "UNetMidBlock2D"),
    (configs.UNET, "downsample_padding", 0),
    (configs.UNET, "addition_embed_type", "text_image"),
    (configs.UNET, "addition_embed_type", ["text_time", "image"]),
    (configs.UNET, "projection_class_embeddings_input_dim", 2816),
    (configs.UNET, "class_embed_type", "projection"),
    (configs.UNET, "resnet_time_scale_shift", "scale_shift"),
    (configs.UNET, "down_block_types", ["AttnDownBlock2D"] * 4),
    (configs.UNET, "up_block_types", ["CrossAttnUpBlock2D"] * 4),
    (configs.UNET, "attention_head_dim", [1, 2, 3, 4]),
    (configs.UNET, "transformer_layers_per_block", [1, 2, 4]),
    (configs.UNET, "transformer_layers_per_block", [[1, 2], 2, 4, 4]),
    (configs.UNET, "something_new", 3),
    (configs.VAE, "act_fn", "relu"),
    (configs.VAE, "norm_num_groups", 16),
    (configs.VAE, "mid_block_add_attention", False),
    (configs.VAE, "use_quant_conv", False),
    (configs.VAE, "shift_factor", 0.1159),
    (configs.VAE, "latents_mean", [0.5]),
    (configs.VAE, "block_out_channels", [32, 48, 64]),
    (configs.TEXT, "hidden_act", "relu"),
    (configs.TEXT, "layer_norm_eps", 1e-6),
    (configs.TEXT, "intermediate_size", 500),
    (configs.SCHEDULER, "trained_betas", [0.1, 0.2]),
    (configs.SCHEDULER, "beta_schedule", "sigmoid"),
    (configs.SCHEDULER, "_class_name", "EDMDPMSolverMultistepScheduler"),
]


@pytest.mark.parametrize(("part", "key", "value"), FOREIGN)
def test_choices_that_the_networks_here_lack_are_refused_by_name(folder, part, key, value):
    change(folder, part, **{key: value})
    with pytest.raises(UserError, match=rf"{part}: '?{key}\b.* is ") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (configs.UNET, "block_out_channels", "wide"),
        (configs.UNET, "block_out_channels", [64, "\n"]),
        (configs.UNET, "layers_per_block", [1, 2]),
        (configs.UNET, "in_channels", 1 << 40),
        (configs.UNET, "attention_head_dim", "x" * 10_000_000),
        (configs.UNET, "cross_attention_dim", True),
        (configs.VAE, "scaling_factor", ["0.18"]),
        (configs.VAE, "latent_channels", -4),
        (configs.TEXT, "hidden_act", ["gelu", 3]),
        (configs.TEXT, "hidden_size", 0),
        (configs.SCHEDULER, "prediction_type", ["v_prediction"]),
        (configs.SCHEDULER, "beta_start", "0.1"),
        (configs.SCHEDULER, "num_train_timesteps", 1e3),
    ],
)
def test_values_of_another_kind_are_one_line(folder, part, key, value):
    strip(folder)
    change(folder, part, **{key: value})
    with pytest.raises(UserError, match=key) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_text_encoder_is_loaded_in_the_type_of_the_rest(tmp_path, tiny):
    checkpoint.save(tmp_path / "half", tiny.tensors, tiny.meta, "diffusers", "float16")
    assert json.loads((tmp_path / "half" / configs.TEXT).read_text())["torch_dtype"] == "float32"


def test_linspace_is_not_promised(tmp_path, tiny, caplog):
    meta = {**tiny.meta, "model_config": tiny.meta["model_config"].replace("spacing: leading", "spacing: linspace")}
    checkpoint.save(tmp_path / "p", tiny.tensors, meta, "diffusers")
    assert json.loads((tmp_path / "p" / configs.SCHEDULER).read_text())["timestep_spacing"] == "trailing"
    assert "cannot sample with spacing 'linspace'" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("channel_mult: [1, 1, 2, 2]", "channel_mult: [2, 1, 2, 2]", "model.unet.channel_mult begins with 2"),
        ("ch_mult: [1, 1, 2]", "ch_mult: [2, 1, 2]", "model.vae.ch_mult begins with 2"),
        ("z_channels: 9", "z_channels: 12", "model.vae.z_channels 12 is not model.vae.embed_dim 9"),
    ],
)
def test_models_that_diffusers_cannot_hold_are_not_written(tmp_path, tiny, old, new, said):
    assert old in tiny.meta["model_config"]
    meta = {**tiny.meta, "model_config": tiny.meta["model_config"].replace(f" {old}", f" {new}")}
    with pytest.raises(UserError, match=f"diffusers has no network like this one: {said}"):
        checkpoint.save(tmp_path / "p", tiny.tensors, meta, "diffusers")
    assert not list(tmp_path.iterdir())


def test_a_config_of_other_weights_is_not_written(tmp_path, tiny):
    meta = {**tiny.meta, "model_config": tiny.meta["model_config"].replace("width: 128", "width: 256")}
    with pytest.raises(
        UserError, match="another model than the weights: model.text.width is 256, the weights have 128"
    ):
        checkpoint.save(tmp_path / "p", tiny.tensors, meta, "diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [23, 24, 30])
def test_the_last_text_block_is_written_where_it_runs(tmp_path, tiny, layers):
    """SD 2.x's files hold a block 23 that does not run; an encoder of 24 layers needs it."""
    block, tensors = "cond_stage_model.model.transformer.resblocks.", dict(tiny.tensors)
    for name in [name for name in tensors if name.startswith(f"{block}3.")]:
        tensors.update(
            {name.replace("blocks.3.", f"blocks.{n}."): tensors[name] + n for n in range(4, max(layers, 24))}
        )
    meta = {**tiny.meta, "model_config": tiny.meta["model_config"].replace("layers: 4", f"layers: {layers}")}
    checkpoint.save(tmp_path / "p", tensors, meta, "diffusers")
    read = checkpoint.load(tmp_path / "p").tensors
    kept = {name: array for name, array in tensors.items() if layers > 23 or not name.startswith(f"{block}23.")}
    same(read, kept)


# ---- SDXL ----


@pytest.fixture(params=["base", "refiner"])
def xl(request, tmp_path):
    """(config, tensors, folder) of a tiny model of SDXL's kind; no word of ours is in the folder."""
    config = {"base": tiny_sdxl.tiny_sdxl_config, "refiner": tiny_sdxl.tiny_refiner_config}[request.param]()
    tensors = tiny_sdxl.random_tensors(config)
    checkpoint.save(tmp_path / "xl", tensors, words_of(config), "diffusers")
    strip(tmp_path / "xl")
    return config, tensors, tmp_path / "xl"


def test_a_pipeline_of_sdxl_says_what_it_is(xl):
    config, tensors, folder = xl
    same(checkpoint.load(folder).tensors, tensors)
    kept = replace(config, sampling=replace(SamplingConfig(), **vars_of(config.sampling)))
    assert described(folder) == kept
    zeros = config.sampling.zeros_for_empty_prompt
    index = json.loads((folder / configs.INDEX).read_text())
    assert index["force_zeros_for_empty_prompt"] is zeros and list(index) == sorted(index)
    change(folder, configs.INDEX, force_zeros_for_empty_prompt=not zeros)
    assert described(folder).sampling.zeros_for_empty_prompt is not zeros
    change(folder, configs.INDEX, force_zeros_for_empty_prompt=None)
    assert described(folder).sampling.zeros_for_empty_prompt is True  # diffusers' default
    change(folder, configs.VAE, force_upcast=False)
    change(folder, configs.SCHEDULER, timestep_spacing="leading")
    assert (described(folder).vae.force_upcast, described(folder).sampling.spacing) == (False, None)


def vars_of(sampling):
    """What diffusers' files say of the sampling."""
    return {"spacing": sampling.spacing, "zeros_for_empty_prompt": sampling.zeros_for_empty_prompt}


def test_each_tokenizer_of_sdxl_pads_in_its_own_way(xl):
    config, _, folder = xl
    tokens = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    places = [folder / name for name in tokens if (folder / name).exists()]
    assert len(places) == len(config.texts)
    for place in places:
        assert json.loads((place / "special_tokens_map.json").read_text())["pad_token"] == tokens[place.name]
        (place / "special_tokens_map.json").unlink()  # as transformers 5 leaves it out
    assert [text.padding for text in described(folder).texts] == [None] * len(places)
    for place, pad in zip(places, ("!", "<|endoftext|>")[-len(places) :]):
        change(folder, f"{place.name}/tokenizer_config.json", pad_token={"content": pad})
    assert [text.padding for text in described(folder).texts] == ["zero", "end"][-len(places) :]


def test_what_a_pipeline_of_sdxl_lacks_is_one_line(xl):
    config, _, folder = xl
    with pytest.raises(
        UserError, match="text_encoder_2 is a text encoder of Stable Diffusion XL alone: give the whole"
    ):
        checkpoint.load(folder / "text_encoder_2")
    for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"):
        was = json.loads((folder / configs.UNET).read_text())[key]
        change(folder, configs.UNET, **{key: None})
        with pytest.raises(UserError, match=f"unet/config.json: {key} is missing, though addition_embed_type is"):
            checkpoint.load(folder)
        change(folder, configs.UNET, **{key: was})
    change(folder, configs.TEXT_2, projection_dim=50)
    with pytest.raises(UserError, match="adm_in_channels must be the projection 50"):
        described(folder)
    shutil.rmtree(folder / "text_encoder_2")
    if config.text_2:
        with pytest.raises(UserError, match="model.text.width, 32, and model.unet.context_dim 96 must be equal"):
            described(folder)
    else:
        assert "model_config" not in checkpoint.load(folder).meta


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: replace(c, text=replace(c.text, context_layer=1)),
            "context_layer is 1, and diffusers' is 2 of its 3",
        ),
        (lambda c: replace(c, text=replace(c.text, context_layer=None)), "context_layer is None, and diffusers' is 2"),
        (lambda c: replace(c, text_2=replace(c.text_2, variant="clip")), "the projection is no openclip"),
    ],
)
def test_sdxl_that_diffusers_cannot_hold_is_not_written(tmp_path, change, said):
    config = tiny_sdxl.tiny_sdxl_config()
    tensors = tiny_sdxl.random_tensors(config)
    with pytest.raises(UserError, match=f"diffusers has no network like this one: .*{said}"):
        checkpoint.save(tmp_path / "p", tensors, words_of(change(config)), "diffusers")
    with pytest.raises(UserError, match="of another model than the weights: model.unet.context_dim is 64"):
        checkpoint.save(tmp_path / "p", tensors, words_of(tiny_sdxl.tiny_refiner_config()), "diffusers")
    assert not list(tmp_path.iterdir())


# ---- folders that are no whole pipeline ----


def test_one_part_of_a_pipeline_is_read(folder, tiny):
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model."), ("text_encoder", "cond_")):
        read = checkpoint.load(folder / part).tensors
        same(read, {name: array for name, array in tiny.tensors.items() if name.startswith(prefix)})
    change(folder, configs.UNET, act_fn="gelu")
    with pytest.raises(UserError, match="config.json: act_fn"):
        checkpoint.load(folder / "unet")
    change(folder, configs.UNET, _class_name="SD3Transformer2DModel")
    with pytest.raises(UserError, match="no part of one: its config.json says 'SD3Transformer2DModel'"):
        checkpoint.load(folder / "unet")


def test_the_average_of_a_trainer_is_drawn_with_and_its_weights_are_trained(folder, tiny, caplog):
    caplog.set_level("INFO")
    for other in ("vae", "text_encoder", "scheduler", "tokenizer"):
        shutil.rmtree(folder / other)
    (folder / "model_index.json").unlink()
    shutil.copytree(folder / "unet", folder / "unet_ema")
    change(folder, "unet_ema/config.json", decay=0.9999, optimization_step=500, use_ema_warmup=True, power=2 / 3)
    path, name = folder / "unet_ema/diffusion_pytorch_model.safetensors", "model.diffusion_model.out.2.bias"
    tensors = formats.read(path)[0]
    formats.write(path, {**tensors, "conv_out.bias": tensors["conv_out.bias"] + 1}, {}, "safetensors")
    for raw, place in ((False, "unet_ema"), (True, "unet")):
        read = checkpoint.load(folder, raw=raw).tensors
        assert np.array_equal(read[name], tiny.tensors[name] + (not raw))
        assert f"its UNet is read from {place}/" in caplog.messages[-1]


def test_other_folders_are_named(folder):
    (folder / "text_encoder_3").mkdir()
    change(folder, "model_index.json", _class_name="StableDiffusion3Pipeline")
    with pytest.raises(UserError, match="is a StableDiffusion3Pipeline, with a text_encoder_3/: choose a pipeline of"):
        checkpoint.load(folder)
    (folder / "unet/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="unet holds a LoRA: give it"):
        checkpoint.load(folder / "unet")
