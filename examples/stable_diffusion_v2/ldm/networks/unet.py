"""The denoising network of Stable Diffusion: a U-Net that attends to text (arXiv 2112.10752, section 3.3).

Layers are numbered as in Stability's files: `input_blocks`, `middle_block`, `output_blocks`, each a list of stages of
one to three layers. Every layer takes (h, emb, context) and uses what it needs, so that a stage is a plain loop.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm import kernels
from ldm.kernels import add, concat_channels, reshape, transpose
from ldm.networks.layers import Conv2d, GroupNorm, LayerNorm, Linear, MatMul, ShiftedConv2d


class UNet(nn.Cell):
    """f(z_t, t, context, *told), the raw prediction: eps, x0 or v, as the network was trained.

    Shapes: z [B, in_channels, H, W], t [B] (integer or float), context [B, L, context_dim] -> [B, out_channels, H, W].
    H and W must be divisible by `config.factor`. SDXL (arXiv 2307.01952, section 2.2) is told a vector
    [B, adm_in_channels] too: the pooled text, and embedded numbers of the picture's size and crop. A network that was
    distilled for a range of guidance scales (arXiv 2210.03142, section 3) is told the embedded scale
    [B, time_cond_proj_dim] last. `told` is what the network takes of these two.
    """

    def __init__(self, config):
        super().__init__()
        width, emb = config.model_channels, 4 * config.model_channels
        self.frequencies, self.time_embed = Frequencies(width), in_order(**mlp(width, emb))
        self.takes_guidance = config.time_cond_proj_dim is not None
        if self.takes_guidance:  # zeros: a student starts as its teacher
            self.guidance_embed = Linear(config.time_cond_proj_dim, width, bias=False, zero=True)
        self.takes_vector = config.adm_in_channels is not None
        if self.takes_vector:
            self.label_emb = nn.CellList([in_order(**mlp(config.adm_in_channels, emb))])
        self.silu = kernels.select().SiLU()
        depths = config.transformer_depths

        def residual(inputs, outputs, level):
            layers = [ResBlock(inputs, outputs, emb)]
            if 2**level in config.attention_resolutions:
                layers.append(SpatialTransformer(outputs, config, depths[level]))
            return layers

        stages, skips, channels = [[ConvIn(config.in_channels, width, 3)]], [width], width
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                stages.append(residual(channels, mult * width, level))
                channels = mult * width
                skips.append(channels)
            if level + 1 < len(config.channel_mult):
                stages.append([Downsample(channels)])
                skips.append(channels)
        self.input_blocks = nn.CellList([nn.CellList(stage) for stage in stages])

        transformer = SpatialTransformer(channels, config, depths[-1])
        self.middle_block = nn.CellList(
            [ResBlock(channels, channels, emb), transformer, ResBlock(channels, channels, emb)]
        )

        stages = []
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for block in range(config.num_res_blocks + 1):
                stages.append(residual(channels + skips.pop(), mult * width, level))
                channels = mult * width
                if level and block == config.num_res_blocks:
                    stages[-1].append(Upsample(channels))
        self.output_blocks = nn.CellList([nn.CellList(stage) for stage in stages])
        self.out = nn.SequentialCell(
            [GroupNorm(channels, 1e-5, silu=True), nn.Identity(), Conv2d(channels, config.out_channels, 3, zero=True)]
        )

    def construct(self, z, t, context, *told):
        return self.read_out(walk(self, z, self.embed(t, *told), context, run_layer, join))

    def embed(self, t, *told):
        """[B, 4 width], what every residual block is told: the time, and the guidance scale and the vector if the
        network takes them.

        It ends with the SiLU that every residual block would begin with.
        """
        time = self.frequencies(t)
        if self.takes_guidance:
            time = add(time, self.guidance_embed(told[-1]))
        emb = self.time_embed(time)
        if self.takes_vector:
            emb = add(emb, self.label_emb[0](told[0]))
        return self.silu(emb)

    def embeddings(self) -> list[nn.Cell]:
        """The layers of `embed` with parameters."""
        guidance = [self.guidance_embed] if self.takes_guidance else []
        return [self.time_embed, *guidance, *(self.label_emb if self.takes_vector else ())]

    def read_out(self, h):
        """The prediction, float32, from the last layer's output."""
        return self.out(h).astype(ms.float32)

    def recompute_blocks(self) -> None:
        """Keep only the inputs of these parts for the backward pass of one graph: less memory for a third more time.

        A whole transformer block is not among them: MindSpore 2.8 makes a loop in its graph, around the norms' own
        gradients.
        """
        for _, cell in self.cells_and_names():
            if isinstance(cell, (ResBlock, CrossAttention, FeedForward)):
                cell.recompute()


class Embed(nn.Cell):
    """`UNet.embed` as a cell of its own, so that it is compiled."""

    def __init__(self, net: UNet):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, t, *told):
        return self.net.embed(t, *told)


def in_order(**layers: nn.Cell) -> nn.SequentialCell:
    """Layers by name, one after the other."""
    return nn.SequentialCell(OrderedDict(layers))


def mlp(inputs: int, emb: int) -> dict[str, nn.Cell]:
    """The layers of an embedding, by their names in files."""
    return {"0": Linear(inputs, emb), "1": kernels.select().SiLU(), "2": Linear(emb, emb)}


def run_layer(layer, h, emb, context):
    return layer(h, emb, context)


def join(h, skip):
    """h's channels, then the skip's."""
    return concat_channels((h, skip))


def walk(net: UNet, z, emb, context, run, join):
    """The only walk through the U. A whole network walks inside its graph. Drawing block by block and training layer by
    layer walk on the host, with their own `run` and `join`.

    Args:
        z: [B, in_channels, H, W].
        emb: [B, 4 width], the time embedding.
        context: [B, L, context_dim].
        run: (layer, h, emb, context) -> the layer's output.
        join: (h, skip) -> both, [B, C of h + C of skip, H, W].

    Returns:
        the last layer's output [B, C, H, W], for `UNet.read_out`.
    """
    h, skips = z, ()
    for stage in net.input_blocks:
        for layer in stage:
            h = run(layer, h, emb, context)
        skips += (h,)
    for layer in net.middle_block:
        h = run(layer, h, emb, context)
    for i, stage in enumerate(net.output_blocks):
        h = join(h, skips[-1 - i])
        for layer in stage:
            h = run(layer, h, emb, context)
    return h


def parts_of(layer: nn.Cell) -> tuple[nn.Cell, ...]:
    """What the host runs one by one of a layer of a stage."""
    return layer.parts if isinstance(layer, SpatialTransformer) else (layer,)


def in_parts(run, add_back):
    """A `run` for `walk` on the host: it gives every part of a layer to `run`, which is called alike.

    The memory of a compiled layer grows with its size, so the parts of a deep transformer are small layers.

    Args:
        add_back: (h, x) -> the sum of a transformer's input and the output of its last part.
    """

    def run_parts(layer, h, emb, context):
        x = h
        for part in parts_of(layer):
            x = run(part, x, emb, context)
        return add_back(h, x) if isinstance(layer, SpatialTransformer) else x

    return run_parts


class Frequencies(nn.Cell):
    """Times [B] to [B, width]: their cosines and sines at geometrically falling frequencies."""

    def __init__(self, width: int):
        super().__init__()
        self.frequencies = Tensor(np.exp(-math.log(10000) * np.arange(width // 2) / (width // 2)), ms.float32)

    def construct(self, t):
        angles = t.astype(ms.float32).reshape(-1, 1) * self.frequencies
        return ops.concat((ops.cos(angles), ops.sin(angles)), -1)


class ConvIn(Conv2d):
    """A convolution that is called like every layer of a stage."""

    def construct(self, h, emb, context):
        return self.conv(h, self.effective_weight(), self.bias)


class ResBlock(nn.Cell):
    """Two convolutions with the time embedding between them, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, emb: int):
        super().__init__()
        self.in_layers = nn.CellList(
            [GroupNorm(inputs, 1e-5, silu=True), nn.Identity(), ShiftedConv2d(inputs, outputs, 3)]
        )
        self.emb_layers = nn.CellList([nn.Identity(), Linear(emb, outputs)])
        self.out_layers = nn.CellList(
            [GroupNorm(outputs, 1e-5, silu=True), nn.Identity(), nn.Identity(), Conv2d(outputs, outputs, 3, zero=True)]
        )
        self.skip_connection = nn.Identity() if inputs == outputs else Conv2d(inputs, outputs, 1)

    def construct(self, h, emb, context):
        norm, _, conv = self.in_layers
        inner = conv(norm(h), self.emb_layers[1](emb))
        inner = self.out_layers[3](self.out_layers[0](inner))
        return add(self.skip_connection(h), inner)


class Downsample(nn.Cell):
    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2)

    def construct(self, h, emb, context):
        return self.op(h)


class Upsample(nn.Cell):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)
        self.enlarge = kernels.select().Upsample2()

    def construct(self, h, emb, context):
        return self.conv(self.enlarge(h))


class SpatialTransformer(nn.Cell):
    """The picture's positions as tokens: attention among them, to the text, and a gated MLP.

    SD 2.x projects with linear layers, SD 1.x with 1×1 convolutions: the same map, other shapes in the file.

    Attributes:
        parts: the way in, the blocks, the way out; each is called like every layer of a stage. MindSpore finds no
            parameters in this tuple. The host runs them one by one (`in_parts`), and SDXL has ten blocks here.
    """

    def __init__(self, channels: int, config, depth: int = 1):
        super().__init__()
        heads = config.num_heads or channels // config.num_head_channels
        self.norm = GroupNorm(channels, 1e-6)
        self.linear = config.use_linear_in_transformer
        self.proj_in = Linear(channels, channels) if self.linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.CellList(
            [TransformerBlock(channels, heads, config.context_dim) for _ in range(depth)]
        )
        self.proj_out = (
            Linear(channels, channels, zero=True) if self.linear else Conv2d(channels, channels, 1, zero=True)
        )
        self.parts = (WayIn(self), *self.transformer_blocks, WayOut(self))

    def construct(self, h, emb, context):
        x = to_tokens(self, h)
        for block in self.transformer_blocks:
            x = block(x, emb, context)
        return add_back(h, from_tokens(self, x))


def to_tokens(transformer, h):
    """A picture [B, C, H, W] to its tokens [B, HW, C], normed and projected."""
    b, c, height, width = h.shape
    x = transformer.norm(h)
    if not transformer.linear:
        x = transformer.proj_in(x)
    x = transpose(reshape(x, (b, c, height * width)), (0, 2, 1))
    return transformer.proj_in(x) if transformer.linear else x


def from_tokens(transformer, x):
    """Tokens [B, HW, C], projected, to [B, C, HW, 1]."""
    b, count, c = x.shape
    if transformer.linear:
        x = transformer.proj_out(x)
    x = reshape(transpose(x, (0, 2, 1)), (b, c, count, 1))
    return x if transformer.linear else transformer.proj_out(x)


def add_back(h, x):
    """The sum of a picture and what `from_tokens` gives."""
    return add(h, reshape(x, h.shape))


class WayIn(nn.Cell):
    """`to_tokens` as a layer."""

    def __init__(self, of: SpatialTransformer):
        super().__init__(auto_prefix=False)
        self.norm, self.proj_in, self.linear = of.norm, of.proj_in, of.linear

    def construct(self, h, emb, context):
        return to_tokens(self, h)


class WayOut(nn.Cell):
    """`from_tokens` as a layer."""

    def __init__(self, of: SpatialTransformer):
        super().__init__(auto_prefix=False)
        self.proj_out, self.linear = of.proj_out, of.linear

    def construct(self, x, emb, context):
        return from_tokens(self, x)


class TransformerBlock(nn.Cell):
    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(channels), SelfAttention(channels, heads)
        self.norm2, self.attn2 = LayerNorm(channels), CrossAttention(channels, heads, context_dim)
        self.norm3, self.ff = LayerNorm(channels), FeedForward(channels)

    def construct(self, x, emb, context):
        x = add(x, self.attn1(self.norm1(x)))
        x = add(x, self.attn2(self.norm2(x), context))
        return add(x, self.ff(self.norm3(x)))


class CrossAttention(nn.Cell):
    """Queries from the picture, keys and values from the text."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_dim, channels, bias=False)
        self.to_v = Linear(context_dim, channels, bias=False)
        self.to_out = nn.CellList([Linear(channels, channels), nn.Identity()])
        self.heads = kernels.select().Heads(heads)

    def construct(self, x, context):
        return self.to_out[0](self.heads(self.to_q(x), self.to_k(context), self.to_v(context)))


class SelfAttention(CrossAttention):
    """Attention among the tokens, by one matrix product for q, k and v where that is faster."""

    def __init__(self, channels: int, heads: int):
        super().__init__(channels, heads, channels)
        self.joins = kernels.select().joins_products
        self.matmul, self.join, self.split = MatMul(), ops.Concat(0), ops.Split(2, 3)

    def construct(self, x):
        if not self.joins:
            return self.to_out[0](self.heads(self.to_q(x), self.to_k(x), self.to_v(x)))
        weights = self.to_q.effective_weight(), self.to_k.effective_weight(), self.to_v.effective_weight()
        weight = self.join(weights)  # [3C, C]
        q, k, v = self.split(self.matmul(x, weight))  # [B, N, C] each
        return self.to_out[0](self.heads(q, k, v))


class FeedForward(nn.Cell):
    """A GEGLU MLP, four times as wide inside."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.CellList([GatedLinear(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def construct(self, x):
        return self.net[2](self.net[0](x))


class GatedLinear(nn.Cell):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = Linear(inputs, 2 * outputs)
        self.geglu = kernels.select().GEGLU()

    def construct(self, x):
        return self.geglu(self.proj(x))
