"""Networks compiled block by block."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ldm.config import TextConfig, UNetConfig
from ldm.models.blockwise import BlockwiseText, BlockwiseUNet
from ldm.models.clip import VARIANTS
from ldm.models.layers import fill
from ldm.models.unet import UNet


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def filled(net, rng):
    net.set_train(False)
    for parameter in net.get_parameters():
        fill(parameter, rng.standard_normal(parameter.shape, np.float32) * np.float32(0.1))
    return net


def compare(net, blockwise, inputs):
    wanted = [net(*each).asnumpy() for each in inputs]
    for _ in range(2):  # the second time nothing is as it was before the first
        for each, want in zip(inputs, wanted):
            got = blockwise(*each)
            assert got.dtype == ms.float32
            np.testing.assert_allclose(got.asnumpy(), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert len(blockwise.kinds) < len(blockwise.weights)


def test_unet(rng):
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=2,
        attention_resolutions=(2,),
        context_dim=32,
        num_heads=2,
    )
    net = filled(UNet(config), rng)
    z, context = rng.standard_normal((2, 4, 8, 8), np.float32), rng.standard_normal((2, 7, 32), np.float32)
    inputs = [(Tensor(z * s), Tensor(np.array([t, t], np.int32)), Tensor(context)) for s, t in ((1, 3), (2, 900))]
    compare(net, BlockwiseUNet(net), inputs)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_text_encoder(rng, variant):
    config = TextConfig(variant=variant, vocab_size=50, context_length=7, width=32, layers=3, heads=2)
    net = filled(VARIANTS[variant][0](config), rng)
    compare(net, BlockwiseText(net), [(Tensor(rng.integers(50, size=(2, 7)).astype(np.int32)),) for _ in range(2)])
