"""Low-rank adapters: in the networks, in training and in drawing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import text_to_image
import train_text_to_image
from mindspore import Tensor
from PIL import Image
from test_scripts import SMALLER, call, fill_place, refusal, sampling, tensors, training

from ldm import checkpoint
from ldm.checkpoint import lora
from ldm.config.model import ScheduleConfig, UNetConfig
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.errors import UserError
from ldm.networks import adapter
from ldm.networks.blockwise import lent_parameters
from ldm.networks.layers import fill
from ldm.networks.text import VARIANTS
from ldm.networks.unet import UNet
from ldm.train.gradients import LayerByLayer, WholeGraph
from ldm.train.log import read_log

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    context_dim=32,
    num_heads=2,
    num_head_channels=None,
)


def filled(net, seed=0):
    rng = np.random.default_rng(seed)
    for param in net.get_parameters():
        fill(param, rng.standard_normal(param.shape, np.float32) * np.float32(0.1), copy=True)
    return net


def lively(net):
    """Weights with which every layer's output, and so every gradient, has a size that can be compared."""
    rng = np.random.default_rng(0)
    for param in net.get_parameters():
        numbers = rng.standard_normal(param.shape, np.float32)
        if len(param.shape) > 1:
            numbers /= np.sqrt(np.float32(np.prod(param.shape[1:])))
        elif param.name.endswith("weight"):
            numbers = 1 + numbers / 10
        fill(param, numbers, copy=True)
    return net


def adapted(net, targets, rank=3, scale=0.5, zero=False):
    """The network with adapters, whose B are not zero unless `zero`; the adapters."""
    places = adapter.attach(net, adapter.chosen(net, targets), rank, scale)
    adapter.initialize(places, 1)
    rng = np.random.default_rng(2)
    for place in places:
        if not zero:
            fill(place.adapter.lora_B, rng.standard_normal(place.adapter.lora_B.shape, np.float32), copy=True)
    return places


def merge(net, places, scale=0.5):
    """Add the adapters' products to the weights of a network without adapters, in NumPy."""
    params = {param.name: param for param in net.get_parameters()}
    for place in places:
        down, up = place.adapter.lora_A.asnumpy(), place.adapter.lora_B.asnumpy()
        weight = params[place.weight].asnumpy().copy()
        product = scale * (up @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])
        if place.which is None:
            weight += product
        else:
            weight[place.which * len(up) :][: len(up)] += product
        fill(params[place.weight], weight, copy=True)
    return net


@pytest.fixture(scope="module")
def plain():
    """A UNet without adapters; its graph is compiled once, whatever its weights are."""
    return UNet(SMALL)


@pytest.mark.parametrize("targets", [["all-linear", "conv"], [r"attn2\.to_v$"]])
def test_a_unet_with_adapters_is_the_merged_one(plain, targets):
    rng = np.random.default_rng(0)
    z, t = Tensor(rng.standard_normal((2, 4, 8, 8), np.float32)), Tensor(np.array([3, 900], np.int32))
    context = Tensor(rng.standard_normal((2, 7, 32), np.float32))
    net = filled(UNet(SMALL))
    before = {param.name: param.shape for param in net.get_parameters()}
    places = adapted(net, targets)
    wanted = merge(filled(plain), places)(z, t, context).asnumpy()
    np.testing.assert_allclose(net(z, t, context).asnumpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert {p.name: p.shape for p in net.get_parameters() if ".adapter." not in p.name} == before
    assert len({place.weight for place in places}) == len(places)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_encoder_with_adapters_is_the_merged_one(variant):
    config = replace(SMALLER.text, variant=variant, vocab_size=600)
    ids = Tensor(np.random.default_rng(0).integers(600, size=(2, config.context_length)).astype(np.int32))
    net = filled(VARIANTS[variant][0](config))
    places = adapted(net, ["all-linear"])
    assert len(places) == 6 * config.layers  # q, k, v, out and the two of the MLP, however the file joins them
    wanted = merge(filled(VARIANTS[variant][0](config)), places)(ids)[0].asnumpy()
    np.testing.assert_allclose(net(ids)[0].asnumpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_gradients_of_adapters_and_the_same_layer_by_layer():
    """They are those of the merged weight by the chain rule, and the first step's B alone has one."""
    rng = np.random.default_rng(0)
    z, eps, context = (rng.standard_normal(s, np.float32) for s in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 7, 32)))
    batch = tuple(map(Tensor, (z, eps, np.array([3, 900], np.int32), np.ones(2, np.float32), context)))
    schedule, prediction, one = build_schedule(ScheduleConfig()), get_prediction("v"), Tensor(1.0)
    config = replace(SMALL, channel_mult=(1,), attention_resolutions=(1,))
    nets = [filled(UNet(config)) for _ in range(2)]
    places = [adapted(net, ["attention"]) for net in nets]
    params = [list(adapter.parameters(some)) for some in places]
    losses = [DiffusionLoss(net, schedule, prediction) for net in nets]
    _, whole = WholeGraph(losses[0], params[0])(one, *batch)
    _, layered = LayerByLayer(losses[1], params[1])(one, *batch)
    merged = merge(filled(UNet(config)), places[0])
    weights = {param.name: param for param in merged.get_parameters()}
    chosen = [weights[place.weight] for place in places[0]]
    _, full = WholeGraph(DiffusionLoss(merged, schedule, prediction), chosen)(one, *batch)
    for n, place in enumerate(places[0]):
        down, up, dw = place.adapter.lora_A.asnumpy(), place.adapter.lora_B.asnumpy(), full[n].asnumpy()
        for got, wanted in zip((whole[2 * n], whole[2 * n + 1]), (0.5 * up.T @ dw, 0.5 * dw @ down.T)):
            np.testing.assert_allclose(got.asnumpy(), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    for one_graph, by_layer in zip(whole, layered):
        most = np.abs(one_graph.asnumpy()).max()
        np.testing.assert_allclose(by_layer.asnumpy(), one_graph.asnumpy(), rtol=0, atol=1e-4 * most)


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_of_a_unet_that_is_told_a_vector(lora):
    """Layer by layer and in one graph: those of all weights, or, recomputed, of adapters in all linear layers.

    Under adapters weights are of half precision, and layer by layer they are lent to the layers that run.
    With one channel in each group, as at the width 32, norms would take away what the vector adds.
    """
    rng, schedule, prediction = np.random.default_rng(0), build_schedule(ScheduleConfig()), get_prediction("v")
    z, eps, context = (rng.standard_normal(s, np.float32) for s in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 7, 32)))
    vector = rng.standard_normal((2, 24), np.float32)
    batch = tuple(map(Tensor, (z, eps, np.array([3, 900], np.int32), np.ones(2, np.float32), context, vector)))
    config = replace(SMALL, channel_mult=(2,), attention_resolutions=(1,), adm_in_channels=24, size_channels=2)
    found = []
    for way in (WholeGraph, LayerByLayer):
        net = lively(UNet(config))
        if lora and way is WholeGraph:
            net.recompute_blocks()
        if lora:
            halve(net, way is LayerByLayer)
        targets = ["all-linear", r"label_emb\."]
        params = list(adapter.parameters(adapted(net, targets)) if lora else net.get_parameters())
        _, grads = way(DiffusionLoss(net, schedule, prediction), params)(Tensor(1.0), *batch)
        found.append({param.name: grad.asnumpy() for param, grad in zip(params, grads)})
    assert sum("label_emb" in name for name in found[0]) == 4
    for name, wanted in found[0].items():
        assert np.abs(wanted).max() > 1e-6, name
        np.testing.assert_allclose(found[1][name], wanted, rtol=0, atol=2e-4 * np.abs(wanted).max(), err_msg=name)


def halve(net, lend):
    """Round the weights of the layers to float16; `lend`: as stored weights, with zeros in the parameters."""
    lent = lent_parameters(net)
    for param in net.get_parameters():
        if id(param) in lent:
            half = param.asnumpy().astype(np.float16)
            fill(param, np.zeros(half.shape) if lend else half, copy=True)
            param.stored = half if lend else None


def test_dropout_leaves_out_input_features_and_is_the_same_for_the_same_step():
    low_rank = adapter.LowRank((6, 40), 3, 1.0)
    fill(low_rank.lora_A, np.ones((3, 40), np.float32), copy=True)
    fill(low_rank.lora_B, np.ones((6, 3), np.float32), copy=True)
    low_rank.drop(np.random.default_rng(1), 0.5)
    dropped = low_rank().asnumpy()
    assert set(np.unique(dropped)) == {0.0, 6.0} and 0 < (dropped[0] == 0).sum() < 40
    low_rank.drop(np.random.default_rng(1), 0.5)
    assert np.array_equal(low_rank().asnumpy(), dropped)
    low_rank.drop(None, 0.0)
    assert (low_rank().asnumpy() == 3).all()


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["("], "not a regular expression"), (["attn9"], "means none of .* attention, all-linear, conv")],
)
def test_targets_that_mean_nothing(targets, message):
    with pytest.raises(UserError, match=message):
        adapter.chosen(UNet(SMALL), targets)


# ---- the scripts ----


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    fill_place(folder, SMALLER)
    return folder


def lora_training(place, output, *more):
    words = ["--use_lora", True, "--lora_rank", 2, "--lora_ft_text_encoder", True, "--lora_dropout", 0.3]
    return training(place, output, *words, "--step_mode", True, "--ckpt_save_interval", 5, "--ckpt_max_keep", 2, *more)


@pytest.fixture
def runs(small):
    """The folders of two runs of ten steps: one draws pictures on the way, the other is in two parts of five steps."""
    one, two = small / "one", small / "two"
    prompts = ["--validation_prompts", "a cat", "--validation_interval", 5, "--validation_steps", 2]
    with pytest.MonkeyPatch.context() as patch:
        for output, *more in (
            (one, "--train_steps", 10, *prompts),
            (two, "--train_steps", 5, "--lora_format", "kohya"),
            (two, "--train_steps", 10, "--resume", True),
        ):
            call(patch, train_text_to_image, lora_training(small, output, "--scheduler", "constant", *more))
    return one, two


def test_adapters_are_trained_resumed_bit_for_bit_and_drawn_with(small, runs, tmp_path, monkeypatch):
    one, two = runs
    first, second = (tensors(out / "ckpt/rank_0/train_resume.safetensors") for out in (one, two))
    assert first.keys() == second.keys() and all(".adapter." in name for name in first)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert np.isfinite(read_log(one / "result.log")["loss"]).all()
    states = (one / "ckpt/rank_0/train_resume.safetensors").stat().st_size
    assert states < (small / "base.safetensors").stat().st_size / 4
    made = lora.load(one / "ckpt/rank_0/sd-10.ckpt")
    assert made.form == "mindone" and any(pair.up.any() for pair in made.pairs.values())
    assert {name.split(".")[0] for name in made.pairs} == {"unet", "text_encoder"}
    assert lora.load(two / "ckpt/rank_0/sd-5.safetensors").form == "kohya"
    assert sorted(path.name for path in (one / "validation").iterdir()) == ["000000.png", "000005.png", "000010.png"]
    draw = ["--n_iter", 1, "--n_samples", 1, "--prompt", "a cat", "--skip_grid"]
    plain, with_one = tmp_path / "plain", tmp_path / "with"
    call(monkeypatch, text_to_image, sampling(small, plain, *draw))
    words = ["--lora_ckpt_path", one / "ckpt/rank_0/sd-10.ckpt", "--lora_scale", 0.8]
    call(monkeypatch, text_to_image, sampling(small, with_one, *draw, *words))
    told = json.loads((with_one / "samples/prompts.jsonl").read_text())
    assert told["lora"] == [["sd-10.ckpt", 0.8]] and len(told["lora_sha256"][0]) == 64
    assert (plain / "samples/00000.png").read_bytes() != (with_one / "samples/00000.png").read_bytes()
    merged = lora.merged(checkpoint.load(small / "base.safetensors").tensors, [(made, 0.8)])
    meta = checkpoint.load(small / "base.safetensors").meta
    checkpoint.save(tmp_path / "merged.safetensors", merged, meta, "safetensors")
    swap = sampling(small, tmp_path / "swapped", *draw)
    swap[swap.index(str(small / "base.safetensors"))] = str(tmp_path / "merged.safetensors")
    call(monkeypatch, text_to_image, swap)
    pictures = [tmp_path / name / "samples/00000.png" for name in ("with", "swapped")]
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in pictures))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rank", 0], "lora_rank is 0"),
        (["--lora_rank", 999], "give a smaller one"),
        (["--lora_dropout", 1], "lora_dropout is 1"),
        (["--lora_alpha", 2, "--lora_scale", 3], "say the same"),
        (["--lora_targets", "nothing"], "means none"),
        (["--lora_targets", "conv"], "MindONE"),
        (["--trainable_modules", "attn2"], "leave out trainable_modules"),
        (["--lora_ft_unet", False, "--lora_ft_text_encoder", False], "nothing is left to train"),
    ],
)
def test_adapters_that_cannot_be_trained(small, tmp_path, monkeypatch, capsys, words, message):
    line = refusal(monkeypatch, capsys, train_text_to_image, training(small, tmp_path, "--use_lora", True, *words))
    assert message in line


def test_training_goes_on_with_adapters_of_any_form(small, tmp_path, monkeypatch, capsys):
    """After a step so small that nothing moves, what comes out is what went in, at any scale of the run."""
    base = checkpoint.load(small / "base.safetensors")
    layout, rng, pairs = lora.layout_of(base.tensors), np.random.default_rng(0), {}
    for name, weight in base.tensors.items():
        if name.startswith("model.") and name.endswith(
            (".to_q.weight", ".to_k.weight", ".to_v.weight", "to_out.0.weight")
        ):
            down, up = (rng.standard_normal(s).astype(np.float32) for s in ((2, weight.shape[1]), (weight.shape[0], 2)))
            pairs[lora.module(name, layout)] = lora.Pair(down, up, 3.0)
    lora.save(tmp_path / "start", lora.Adapter(pairs, base.meta, "peft"), "peft")
    words = ["--use_lora", True, "--lora_ckpt_path", tmp_path / "start", "--lora_format", "kohya", "--train_steps", 1]
    still = ["--lora_rank", 2, "--use_ema", False, "--start_learning_rate", 1e-12, "--end_learning_rate", 1e-12]
    call(monkeypatch, train_text_to_image, training(small, tmp_path / "out", *words, *still))
    made = lora.load(tmp_path / "out/ckpt/rank_0/sd-1.safetensors")
    assert made.pairs.keys() == pairs.keys()
    for module, pair in made.pairs.items():
        np.testing.assert_allclose(pair.product(), pairs[module].product(), rtol=0, atol=1e-5)
    for more, message in ((["--lora_rank", 3], "by --lora_rank 2"), (["--lora_targets", r"to_q$"], "in one of them")):
        wrong = training(small, tmp_path / "no", *words[:6], *more)
        assert message in refusal(monkeypatch, capsys, train_text_to_image, wrong)
