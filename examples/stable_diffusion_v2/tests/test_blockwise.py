"""Networks compiled block by block."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ldm.config.model import ScheduleConfig, TextConfig, UNetConfig
from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.prediction import get_prediction
from ldm.diffusion.schedule import build_schedule
from ldm.networks.blockwise import BlockwiseText, BlockwiseUNet, graph_key
from ldm.networks.layers import Conv2d, GroupNorm, fill
from ldm.networks.text import VARIANTS
from ldm.networks.unet import ResBlock, SpatialTransformer, UNet, parts_of
from ldm.train.ema import Ema
from ldm.train.gradients import LayerByLayer, WholeGraph
from ldm.train.optimizer import build_optimizer
from ldm.train.step import TrainStep
from ldm.train.trainable import trainable

CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(2,),
    context_dim=32,
    num_heads=2,
    num_head_channels=None,
)
TOLD = replace(CONFIG, adm_in_channels=6, size_channels=2, time_cond_proj_dim=8)  # a vector and a guidance scale
CONVOLVED = replace(CONFIG, use_linear_in_transformer=False)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def filled(net, rng):
    net.set_train(False)
    for parameter in net.get_parameters():
        fill(parameter, rng.standard_normal(parameter.shape, np.float32) * np.float32(0.1), copy=True)
    return net


def draws(rng, config):
    """Contexts, and what else the network takes."""
    widths = [width for width in (config.adm_in_channels, config.time_cond_proj_dim) if width]
    return [rng.standard_normal(shape, np.float32) for shape in ((2, 7, 32), *((2, width) for width in widths))]


def outputs(net, inputs):
    given = net(*inputs)
    return given if isinstance(given, tuple) else (given,)


def compare(net, blockwise, inputs):
    wanted = [outputs(net, each) for each in inputs]
    for _ in range(2):  # the second time nothing is as it was before the first
        for each, wants in zip(inputs, wanted):
            for got, want in zip(outputs(blockwise, each), wants, strict=True):
                assert got.dtype == ms.float32
                want = want.asnumpy()
                np.testing.assert_allclose(got.asnumpy(), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert len(blockwise.kinds) < len(blockwise.weights)


@pytest.mark.parametrize("linear", [True, False])
def test_unet(rng, linear):
    net = filled(UNet(replace(TOLD, use_linear_in_transformer=linear)), rng)
    z, told = rng.standard_normal((2, 4, 8, 8), np.float32), [Tensor(array) for array in draws(rng, TOLD)]
    inputs = [(Tensor(z * s), Tensor(np.array([t, t], np.int32)), *told) for s, t in ((1, 3), (2, 900))]
    compare(net, BlockwiseUNet(net), inputs)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_text_encoder(rng, variant):
    config = TextConfig(variant=variant, vocab_size=50, context_length=7, width=32, layers=3, heads=2)
    net = filled(VARIANTS[variant][0](config), rng)
    compare(net, BlockwiseText(net), [(Tensor(rng.integers(50, size=(2, 7)).astype(np.int32)),) for _ in range(2)])


PART = ["attn2", r"^out\.2"]  # the way back ends at the first transformer


def test_layers_share_a_graph_where_all_that_makes_it_is_the_same():
    """Shapes of parameters alone do not tell: heads, strides, epsilons and groups are in none of them."""
    parts = parts_of(SpatialTransformer(64, CONFIG, 2))
    silu = [GroupNorm(32, eps, silu=act) for eps, act in ((1e-5, False), (1e-6, False), (1e-5, True))]
    different = [
        *silu,
        Conv2d(32, 32, 3),
        Conv2d(32, 32, 3, stride=2),
        Conv2d(32, 32, 3, padding=(0, 1, 0, 1)),
        Conv2d(32, 32, 1),
        parts[0],
        *parts[2:],
        parts_of(SpatialTransformer(64, replace(CONFIG, num_heads=4)))[1],
        *parts_of(SpatialTransformer(64, replace(CONFIG, use_linear_in_transformer=False)))[::2],
    ]
    assert len({graph_key(layer) for layer in different}) == len(different)
    for cls, *words in ((SpatialTransformer, 64, CONFIG, 2), (ResBlock, 32, 64, 128)):
        keys = [[graph_key(part) for part in parts_of(cls(*words))] for _ in range(2)]
        assert keys[0] == keys[1]
    assert graph_key(parts[1]) == graph_key(parts[2])


@pytest.mark.parametrize("chosen, limits, config", [([], [1.0, None], TOLD), (PART, [None], CONVOLVED)])
def test_training(rng, chosen, limits, config):
    """Of one and of two micro-batches: all that a step changes is as with one graph for all of the network. Without
    clipping, a layer is updated as soon as its gradients are there. What is not trained stays as it is."""
    schedule, prediction, both = build_schedule(ScheduleConfig()), get_prediction("v"), []
    for gradients in (WholeGraph, LayerByLayer):
        net = UNet(replace(config, num_res_blocks=1))
        loss = DiffusionLoss(net, schedule, prediction)
        params = {param.name: param for param in net.get_parameters()}
        params = [params[name] for name in trainable(params, chosen)]
        both.append((loss, params, gradients(loss, params)))
    for most in limits:
        compare_steps(both, most, rng, config)


def compare_steps(both, most, rng, config):
    """Four steps with the gradients of one graph and of many: (loss, trained parameters, gradients) of each way."""
    steps = []
    for loss, params, gradients in both:
        filled(loss.network, np.random.default_rng(0))
        optimizer = build_optimizer("adamw", params, (0.9, 0.999), weight_decay=0.01)
        steps.append(TrainStep(loss, optimizer, Ema(params, 0.9), most, gradients=gradients))
        assert steps[-1].by_layers == (gradients.layer_by_layer and most is None)
    for number in range(4):
        micro = []
        for _ in range(1 + number % 2):
            z, eps = rng.standard_normal((2, 2, 4, 8, 8), np.float32)
            t, weight = np.array([300, 3 + number], np.int32), np.array([1, 0.5], np.float32)
            micro.append(tuple(map(Tensor, (z, eps, t, weight, *draws(rng, config)))))
        wanted, got = (step(micro, 1e-3, number) for step in steps)
        for step in steps:
            with step.ema.applied():  # gives the weights other memory
                pass
        assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
        np.testing.assert_allclose(*(result.extras for result in (got, wanted)), rtol=1e-5)
    assert len(steps[1].gradients.kinds) < len(steps[1].gradients.weights)
    wanted, got = ({name: v.asnumpy() for name, v in step.variables().items()} for step in steps)
    assert wanted.keys() == got.keys()
    untouched = filled(UNet(replace(config, num_res_blocks=1)), np.random.default_rng(0))
    for before, after in zip(untouched.get_parameters(), steps[1].gradients.network.get_parameters()):
        assert np.array_equal(before.asnumpy(), after.asnumpy()) == (after.name not in got), after.name
    for name, array in wanted.items():
        most = np.abs(array).max()
        if most > 1e-8:  # elsewhere rounding errors
            np.testing.assert_allclose(got[name], array, rtol=0, atol=2e-3 * most, err_msg=name)
