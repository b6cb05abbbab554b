"""The text encoders: CLIP's of SD 1.x, OpenCLIP's of SD 2.x, one of each in SDXL (arXiv 2103.00020, arXiv 2212.07143).

All are causal pre-norm transformers. They differ in the activation, in the layer that is read, and in the parameters'
names. SD 2.x runs one block less than the file holds: its last output is the penultimate layer's, followed by the final
norm all the same. SDXL reads the penultimate layers without the norm, and pools its second encoder's last layer. The
names are those in the files, hence two classes of blocks.
"""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm import kernels
from ldm.kernels import add
from ldm.networks.layers import Affine, Embedding, LayerNorm, Linear, Weighted, normal, parameter


def causal_mask(length: int) -> Tensor:
    """[length, length]: 0 where a token may look, a large negative number where it may not."""
    return Tensor(np.triu(np.full((length, length), -1e9, np.float32), 1))


class TextEncoder(nn.Cell):
    """ids [B, context_length] int32 to (features [B, context_length, width], pooled [B, projection] if there is one).

    A subclass names the parts, and has `embed(ids)`, `blocks()` and `last_norm(x)`, which is the layer named `final`.
    `mask` is for its blocks.
    """

    final: str

    def __init__(self, config):
        super().__init__()
        self.mask = causal_mask(config.context_length)
        self.context_layer, self.pools = config.context_layer or 0, config.projection is not None
        self.runs = config.layers if self.pools or not self.context_layer else self.context_layer  # blocks that run
        if self.pools:
            self.text_projection = parameter(config.width, config.projection)
            self.project = ops.MatMul()

    def construct(self, ids):
        return encode(self, ids, run_block)

    def reset(self, rng: np.random.Generator) -> None:
        if self.pools:
            shape = self.text_projection.shape
            self.text_projection.set_data(normal(rng, shape, shape[0] ** -0.5))

    def pooled(self, x, ids):
        """The projected vector [B, projection] at the end token, which has the largest id, of the normed features."""
        ends = ops.argmax(ids, 1)  # the first of several
        return self.project(x[ops.arange(ids.shape[0]), ends], self.text_projection)

    def used_parameters(self) -> list[Parameter]:
        """The parameters that the outputs depend on. Those behind the layer that is read are none of them."""
        unused = list(self.blocks())[self.runs :]
        if self.context_layer and not self.pools:
            unused.append(getattr(self, self.final))
        without = {id(parameter) for cell in unused for parameter in cell.get_parameters()}
        return [parameter for parameter in self.get_parameters() if id(parameter) not in without]


def run_block(block, x, mask):
    return block(x, mask)


def encode(net: TextEncoder, ids, run):
    """The only way through a text encoder; `run`: (block, x, mask) -> the block's output, on the host or in a graph."""
    x = context = net.embed(ids)
    for number, block in enumerate(net.blocks()):
        if number < net.runs:
            x = run(block, x, net.mask)
        if number + 1 == net.context_layer:
            context = x
    if net.context_layer and not net.pools:
        return (context,)
    x = net.last_norm(x)
    if not net.context_layer:
        context = x
    return (context, net.pooled(x, ids)) if net.pools else (context,)


class TextEncoders(nn.Cell):
    """Two encoders, as in SDXL: ids [B, 2, context_length] int32, one row for each, to (features, pooled).

    The features are those of both, side by side. The pooled vector is the second one's.
    """

    def __init__(self, first: TextEncoder, second: TextEncoder):
        super().__init__(auto_prefix=False)  # the encoders' parameters keep their names
        self.first, self.second = first, second

    def construct(self, ids):
        return both(self.first(ids[:, 0]), self.second(ids[:, 1]))

    def used_parameters(self) -> list[Parameter]:
        """As those of each encoder."""
        return self.first.used_parameters() + self.second.used_parameters()


def both(first, second):
    """The condition's fields of two encoders, from each one's."""
    return (ops.concat((first[0], second[0]), -1), *second[1:])


class OpenCLIPText(TextEncoder):
    """The text encoder with OpenCLIP's names and the exact GELU."""

    final = "ln_final"

    def __init__(self, config):
        super().__init__(config)
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.positional_embedding = parameter(config.context_length, config.width)
        self.transformer = OpenCLIPBlocks(config)
        self.ln_final = LayerNorm(config.width)

    def embed(self, ids):
        return self.token_embedding(ids) + self.positional_embedding

    def blocks(self):
        return self.transformer.resblocks

    def last_norm(self, x):
        return self.ln_final(x)

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        self.positional_embedding.set_data(normal(rng, self.positional_embedding.shape, 0.01))


class OpenCLIPBlocks(nn.Cell):
    def __init__(self, config):
        super().__init__()
        self.resblocks = nn.CellList([OpenCLIPBlock(config) for _ in range(config.layers)])


class OpenCLIPBlock(nn.Cell):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.width), MergedAttention(config.width, config.heads)
        self.ln_2 = LayerNorm(config.width)
        self.mlp = OpenCLIPMLP(config.width, config.mlp_ratio * config.width)

    def construct(self, x, mask):
        x = add(x, self.attn(self.ln_1(x), mask))
        return add(x, self.mlp(self.ln_2(x)))


class MergedAttention(Weighted):
    """Self-attention whose three projections are one parameter, as in PyTorch's MultiheadAttention."""

    multiplies = False  # its `affine` does

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = parameter(3 * width, width), parameter(3 * width)
        self.out_proj = Linear(width, width)
        self.heads = kernels.select().Heads(heads)
        self.affine, self.split = Affine(), ops.Split(2, 3)

    def construct(self, x, mask):
        x = self.affine(x, self.effective_weight(), self.in_proj_bias)  # [B, N, 3C]
        q, k, v = self.split(x)
        return self.out_proj(self.heads(q, k, v, mask))

    def effective_weight(self):
        if self.adapter is None:
            return self.in_proj_weight
        return add(self.in_proj_weight, self.adapter())

    def reset(self, rng: np.random.Generator) -> None:
        self.in_proj_weight.set_data(normal(rng, self.in_proj_weight.shape, self.in_proj_weight.shape[1] ** -0.5))


class OpenCLIPMLP(nn.Cell):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.c_fc, self.c_proj = Linear(width, inner), Linear(inner, width)
        self.gelu = kernels.select().GELU()

    def construct(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class CLIPText(TextEncoder):
    """The text encoder with transformers' names and the quick GELU."""

    final = "final_layer_norm"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPBlocks(config)
        self.final_layer_norm = LayerNorm(config.width)

    def embed(self, ids):
        return self.embeddings(ids)

    def blocks(self):
        return self.encoder.layers

    def last_norm(self, x):
        return self.final_layer_norm(x)


class CLIPEmbeddings(nn.Cell):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding = Embedding(config.context_length, config.width)

    def construct(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight


class CLIPBlocks(nn.Cell):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.CellList([CLIPBlock(config) for _ in range(config.layers)])


class CLIPBlock(nn.Cell):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1, self.self_attn = LayerNorm(config.width), SplitAttention(config.width, config.heads)
        self.layer_norm2 = LayerNorm(config.width)
        self.mlp = CLIPMLP(config.width, config.mlp_ratio * config.width)

    def construct(self, x, mask):
        x = add(x, self.self_attn(self.layer_norm1(x), mask))
        return add(x, self.mlp(self.layer_norm2(x)))


class SplitAttention(nn.Cell):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width) for _ in range(3))
        self.out_proj = Linear(width, width)
        self.heads = kernels.select().Heads(heads)

    def construct(self, x, mask):
        return self.out_proj(self.heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), mask))


class CLIPMLP(nn.Cell):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, inner), Linear(inner, width)
        self.gelu = kernels.select().QuickGELU()

    def construct(self, x):
        return self.fc2(self.gelu(self.fc1(x)))


class Under(nn.Cell):
    """A cell that only puts a name before its child's parameter names."""

    def __init__(self, **child: nn.Cell):
        super().__init__()
        for name, cell in child.items():
            setattr(self, name, cell)


def build(configs) -> tuple[TextEncoder | TextEncoders, nn.Cell]:
    """The text encoders of a model, and the cell that gives their parameters the names in files.

    Args:
        configs: TextConfig of one encoder or of two.
    """
    encoders, named = [], []
    for config in configs:
        network, under_prefix = VARIANTS[config.variant]
        encoders.append(network(config))
        named.append(under_prefix(encoders[-1]))
    if len(encoders) == 1:
        return encoders[0], named[0]
    return TextEncoders(*encoders), Under(embedders=nn.CellList(named))


VARIANTS = {  # name: (the network, a wrapper that adds the file's prefix)
    "openclip": (OpenCLIPText, lambda net: Under(model=net)),
    "clip": (CLIPText, lambda net: Under(transformer=Under(text_model=net))),
}
