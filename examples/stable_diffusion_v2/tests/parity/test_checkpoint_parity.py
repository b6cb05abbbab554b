"""Files of PyTorch and diffusers read here, and our diffusers folders read there."""

import argparse
import datetime
import json
import pathlib
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make parity")
pytest.importorskip("transformers", reason="transformers is not installed: make parity")

import sdxl_reference
import tiny_sdxl
from reference import CONFIGS, THEIR_TYPES, reference, states

from ldm import checkpoint
from ldm.checkpoint import formats
from ldm.checkpoint.names import GUIDANCE, from_diffusers
from ldm.config.model import SamplingConfig, from_yaml, load_model_config
from ldm.diffusion.samplers import get_sampler
from ldm.model import StableDiffusion
from ldm.pipeline import Pipeline, sampler_of, settings_for
from ldm.weights import words_of

pytestmark = pytest.mark.parity
TINY = "models/tiny-vpred.safetensors"


def tensors():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 8, generator=generator)
    return {
        "weight": whole,
        "transposed": whole.T,
        "part": whole[1:4, 2:7],
        "half": whole.half(),
        "bfloat16": whole.bfloat16(),
        "double": whole.double(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(whole[0].clone()),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [dict, lambda t: {"state_dict": t, "epoch": 1, "lr": np.float64(0.1)}])
def test_what_torch_saves_is_read(tmp_path, legacy, wrap):
    torch.save(wrap(tensors()), tmp_path / "t.pt", _use_new_zipfile_serialization=not legacy)
    read = formats.read(tmp_path / "t.pt")[0]
    for name, tensor in tensors().items():
        expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        assert read[name].dtype == expected.dtype and np.array_equal(read[name], expected), name


def test_a_module_and_an_optimizer_are_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "t.pt")
    read = formats.read(tmp_path / "t.pt")[0]
    assert read.keys() == model.state_dict().keys()
    assert np.array_equal(read["0.weight"], model[0].weight.detach().numpy())


def test_a_textual_inversion_is_called_by_its_name(tmp_path):
    """As its authors' program writes it."""
    words = torch.nn.ParameterDict({"*": torch.ones(2, 768)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": words}, tmp_path / "t.pt")
    with pytest.raises(Exception, match="is a textual inversion"):
        checkpoint.load(tmp_path / "t.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_of_a_training_program(tmp_path, legacy):
    net = torch.nn.Linear(2, 3)
    content = {
        "state_dict": net.state_dict(),
        "global_step": torch.tensor(500),
        "optimizer": torch.optim.Adam(net.parameters()).state_dict(),
        "arguments": argparse.Namespace(path=pathlib.Path("x"), at=datetime.datetime.now(), rate=np.float64(0.1)),
        "random": {"numpy": np.random.get_state(), "torch": torch.get_rng_state()},
    }
    torch.save(content, tmp_path / "t.pt", _use_new_zipfile_serialization=not legacy)
    tensors = checkpoint.load(tmp_path / "t.pt").tensors
    assert {name: array.tolist() for name, array in tensors.items()} == {
        name: value.tolist() for name, value in net.state_dict().items()
    }


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 4), tmp_path / "t.pt")
    with pytest.raises(Exception, match=r"torch\.nn\.modules\.linear\.Linear; save its state_dict"):
        checkpoint.load(tmp_path / "t.pt")


@pytest.fixture(scope="module")
def ours():
    return checkpoint.load(TINY)


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "pipeline"
    checkpoint.save(path, ours.tensors, ours.meta, "diffusers", "float32")
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


def test_diffusers_draws_the_same_from_our_folder(ours, pipe):
    """Five guided DDIM steps from the same noise; the schedule, the type and the tokenizer come from the folder."""
    config = load_model_config("configs/tiny-vpred.yaml")
    model = StableDiffusion(config)
    model.load(ours.tensors, TINY)
    pipeline, prompts = Pipeline(config, model), ["a drawing of a tomato, red, noto style"]
    noise = np.random.default_rng(0).standard_normal((1, *model.latent_shape(64, 64)))
    denoise = pipeline.denoiser(prompts, [""], 5.0)
    end = "zero" if pipe.scheduler.config.set_alpha_to_one else "sigma_min"
    sampler = get_sampler("ddim", pipeline.schedule, final_sigma=end)
    latents = sampler(denoise, noise, sampler.times(pipeline.schedule, 5), pipeline.schedule)
    theirs = pipe(
        prompts,
        num_inference_steps=5,
        guidance_scale=5.0,
        height=64,
        width=64,
        latents=torch.from_numpy(noise).float(),
        output_type="latent",
    ).images.numpy()
    error = np.sqrt(np.mean((latents - theirs) ** 2) / np.mean(theirs**2))
    assert error < 1e-3
    decoded = pipe.vae.decode(torch.from_numpy(latents).float() / pipe.vae.config.scaling_factor).sample
    picture = decoded.detach().numpy()
    assert np.sqrt(np.mean((model.decode(latents) - picture) ** 2) / np.mean(picture**2)) < 1e-3


@pytest.mark.parametrize("scales", [(1.5,), (1.0, 8.0)])
def test_diffusers_draws_a_student_as_it_was_distilled(tmp_path, ours, scales):
    """What text_to_image.py takes from the checkpoint is all that StableDiffusionPipeline is told."""
    config, tensors = load_model_config("configs/tiny-vpred.yaml"), ours.tensors
    told, unet = scales[-1] - 1 if len(scales) == 2 else 1.0, config.unet
    if len(scales) == 2:
        weight = np.random.default_rng(1).standard_normal((64, 256)) / 16
        tensors, unet = {**tensors, GUIDANCE: weight.astype(np.float32)}, replace(unet, time_cond_proj_dim=256)
    sampling = SamplingConfig("ddim", 4, told, "trailing", "zero", distilled_guidance=scales)
    config = replace(config, unet=unet, sampling=sampling)
    checkpoint.save(tmp_path / "student", tensors, words_of(config), "diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    model = StableDiffusion(config)
    model.load(tensors, "student")
    pipeline, prompts = Pipeline(config, model), ["a drawing of a tomato, red, noto style"]
    settings = settings_for(config, sampler_of(config), 0)
    noise = np.random.default_rng(0).standard_normal((1, *model.latent_shape(64, 64)))
    times = settings.sampler.times(pipeline.schedule, settings.steps)
    latents = settings.sampler(pipeline.guided(prompts, [""], settings), noise, times, pipeline.schedule)
    theirs = pipe(
        prompts,
        num_inference_steps=sampling.steps,
        guidance_scale=told,
        height=64,
        width=64,
        latents=torch.from_numpy(noise).float(),
        output_type="latent",
    ).images.numpy()
    assert pipe.scheduler.config.timestep_spacing == "trailing" and pipe.scheduler.config.set_alpha_to_one
    assert bool(pipe.unet.config.time_cond_proj_dim) == (len(scales) == 2)
    assert np.sqrt(np.mean((latents - theirs) ** 2) / np.mean(theirs**2)) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"max_shard_size": "5MB"},
        {"safe_serialization": False, "max_shard_size": "5MB"},
        {"variant": "fp16", "max_shard_size": "5MB"},
    ],
    ids=str,
)
def test_what_diffusers_saves_is_read(tmp_path, ours, pipe, options):
    pipe.save_pretrained(tmp_path / "theirs", **options)
    read = checkpoint.load(tmp_path / "theirs")
    assert read.meta["prediction_type"] == "v"
    assert json.loads(read.meta["schedule"])["name"] == "scaled_linear"
    assert read.tensors.keys() == ours.tensors.keys()
    for name, array in ours.tensors.items():
        assert np.array_equal(read.tensors[name], array.astype(np.float32)), name


# ---- the shapes of SD 1.x and 2.x; with FULL_SIZE (reference.py) the published models' ----


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """(config, diffusers' and transformers' networks as tables of arrays, the same by Stability's names)."""
    config = CONFIGS[request.param]
    theirs = states(reference(config))
    return config, theirs, from_diffusers(*theirs, config.text.variant)


def same(got, wanted):
    """Equal names and bits."""
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert np.array_equal(got[name], array), name


@pytest.mark.parametrize("kind", checkpoint.FORMATS)
def test_a_round_trip_keeps_every_bit(tmp_path, model, kind):
    config, _, tensors = model
    path = tmp_path / "model"
    checkpoint.save(path, tensors, words_of(config), kind)
    read = checkpoint.load(path)
    same(read.tensors, tensors)
    assert read.meta["prediction_type"] == config.prediction_type


@pytest.mark.parametrize("legacy", [False, True])
def test_a_single_file_of_torch_is_read(tmp_path, model, legacy):
    """As Stability published them: under state_dict, with schedule buffers."""
    _, _, tensors = model
    state = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    content = {"state_dict": {**state, "betas": torch.zeros(1000)}, "global_step": 1}
    torch.save(content, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=not legacy)
    read = checkpoint.load(tmp_path / "sd.ckpt").tensors
    assert (
        checkpoint.match(read, {name: array.shape for name, array in tensors.items()}, "sd.ckpt").keys() == state.keys()
    )
    same({name: read[name] for name in tensors}, tensors)


@pytest.mark.parametrize("kind", ["folder", "single file"])
def test_diffusers_loads_what_we_write(tmp_path, model, kind):
    config, theirs, tensors = model
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    checkpoint.save(folder, tensors, words_of(config), "diffusers")
    if kind == "folder":
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    else:
        checkpoint.save(file, tensors, words_of(config), "safetensors")
        for weights in folder.glob("*/*.safetensors"):
            weights.unlink()  # what it reads must come from the file
        pipe = diffusers.StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    for network, table in zip((pipe.unet, pipe.vae, pipe.text_encoder), theirs):
        same({name: tensor.numpy() for name, tensor in network.state_dict().items()}, table)
    assert pipe.scheduler.config.prediction_type == THEIR_TYPES[config.prediction_type]


def test_a_folder_of_half_precision_draws(tmp_path, ours):
    """All of its networks are loaded in one type, whatever transformers would take from the weights."""
    checkpoint.save(tmp_path / "half", ours.tensors, ours.meta, "diffusers", "float16")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "half")
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    latents = pipe(["a tomato"], num_inference_steps=1, height=64, width=64, output_type="latent").images
    assert torch.isfinite(latents).all()


def test_the_config_of_what_diffusers_saves_is_whole(tmp_path, ours, pipe):
    pipe.save_pretrained(tmp_path / "theirs")
    said = from_yaml(checkpoint.load(tmp_path / "theirs").meta["model_config"], "theirs")
    wanted = load_model_config("configs/tiny-vpred.yaml")
    assert said == replace(wanted, sampling=SamplingConfig())  # of which diffusers' files have nothing


def test_an_autoencoder_that_diffusers_saves_serves(tmp_path, ours, pipe):
    pipe.vae.save_pretrained(tmp_path / "vae")
    read = checkpoint.load_vae(tmp_path / "vae", float(ours.meta["scale_factor"]))
    same(read, {name: array.astype(np.float32) for name, array in ours.tensors.items() if name in read})
    assert len(read) == sum(name.startswith("first_stage_model.") for name in ours.tensors)


# ---- SDXL ----

XL = {"base": tiny_sdxl.tiny_sdxl_config, "refiner": tiny_sdxl.tiny_refiner_config}


@pytest.fixture(scope="module", params=XL)
def xl(request, tmp_path_factory):
    """(our config, its pipeline's folder as diffusers writes it, the pipeline): random weights of diffusers."""
    place, config = tmp_path_factory.mktemp(request.param), XL[request.param]()
    tensors = tiny_sdxl.random_tensors(config)
    checkpoint.save(place / "ours", tensors, words_of(config), "diffusers")
    pipe = sdxl_reference.pipeline(place / "ours", request.param == "refiner")
    pipe.save_pretrained(place / "theirs")
    return config, place / "theirs", pipe


def tensors_of(pipe):
    """{part: {name: tensor}} of a pipeline's networks."""
    networks = ((name, getattr(pipe, name, None)) for name in ("unet", "vae", "text_encoder", "text_encoder_2"))
    return {name: network.state_dict() for name, network in networks if network is not None}


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for part, tensors in left.items():
        assert tensors.keys() == right[part].keys()
        assert all(torch.equal(tensor, right[part][name]) for name, tensor in tensors.items())


def test_sdxl_goes_through_our_hands_and_back_to_the_bit(tmp_path, xl):
    config, theirs, pipe = xl
    read = checkpoint.load(theirs)
    assert {name: array.shape for name, array in read.tensors.items()} == tiny_sdxl.parameters(config)
    said = from_yaml(read.meta["model_config"], "theirs")
    vpred = sdxl_reference.TABLES["scheduler"]
    assert (said.unet, said.vae) == (config.unet, config.vae) and said.scale_factor == config.scale_factor
    assert said.schedule.zero_terminal_snr is vpred["rescale_betas_zero_snr"] and said.prediction_type == "v"
    assert said.texts == config.texts
    zeros = pipe.config.force_zeros_for_empty_prompt
    assert said.sampling == SamplingConfig(spacing="trailing", zeros_for_empty_prompt=zeros)

    checkpoint.save(tmp_path / "ours", read.tensors, read.meta, "diffusers")
    ours = type(pipe).from_pretrained(tmp_path / "ours")
    assert_same_tensors(tensors_of(ours), tensors_of(pipe))
    assert ours.config.force_zeros_for_empty_prompt is zeros
    assert getattr(ours.config, "requires_aesthetics_score", False) is (config.size_numbers == 5)
    for part in ("unet", "vae"):
        mine, other = ({k: v for k, v in getattr(p, part).config.items() if k[0] != "_"} for p in (ours, pipe))
        assert mine == other
    for name in ("tokenizer", "tokenizer_2"):
        mine, other = getattr(ours, name), getattr(pipe, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            assert (
                mine("a red fox!", padding="max_length").input_ids
                == other("a red fox!", padding="max_length").input_ids
            )
    assert ours.tokenizer_2.pad_token == "!"


def test_our_files_of_sdxl_are_read_by_transformers_before_5(tmp_path, xl):
    """It wants text_model. in the names of both text encoders, and vocabularies in two files."""
    read = checkpoint.load(xl[1])
    checkpoint.save(tmp_path / "ours", read.tensors, read.meta, "diffusers")
    for part in [part for part in ("text_encoder", "text_encoder_2") if (tmp_path / "ours" / part).exists()]:
        names = formats.read(tmp_path / "ours" / part / "model.safetensors")[0]
        others = {name for name in names if not name.startswith("text_model.")}
        assert others == ({"text_projection.weight"} if part == "text_encoder_2" else set())
        assert all((tmp_path / "ours" / part.replace("text_encoder", "tokenizer") / name).exists() for name in NEEDED)


NEEDED = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")


def test_our_single_file_of_sdxl_is_read(tmp_path, xl):
    config, theirs, pipe = xl
    read = checkpoint.load(theirs)
    checkpoint.save(tmp_path / "xl.safetensors", read.tensors, read.meta, "safetensors")
    single = type(pipe).from_single_file(tmp_path / "xl.safetensors", config=str(theirs))
    assert_same_tensors(tensors_of(single), tensors_of(pipe))
    assert single.scheduler.config.prediction_type == "v_prediction"
