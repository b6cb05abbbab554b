"""Low-rank adapters in a network (LoRA, arXiv 2106.09685): beside a frozen weight W stands scale · B A.

`attach` puts them beside the weights of chosen layers. A layer with an adapter works with the sum (`Weighted`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ldm.errors import UserError
from ldm.kernels import multiply, reshape
from ldm.networks.layers import Conv2d, Weighted, parameter
from ldm.networks.text import MergedAttention
from ldm.randomness import generator

PRESETS = {  # what --lora_targets calls by one word: (patterns over the names of layers, with convolutions)
    "attention": ([r"\.(to_q|to_k|to_v|to_out\.0)$", r"\.(q_proj|k_proj|v_proj|out_proj|attn)$"], False),
    "all-linear": (
        [r"\.transformer_blocks\.", r"\.proj_(in|out)$", r"\.(self_attn|mlp)\.", r"\.attn(\.out_proj)?$"],
        False,
    ),
    "conv": ([r"\.(in_layers\.2|out_layers\.3|skip_connection|op|conv)$"], True),
}


class LowRank(nn.Cell):
    """scale · B A, of a weight's shape [out, in] or [out, in, k, k].

    A starts uniform as PyTorch's linear layers do (Kaiming with a = sqrt 5), B at zero: the first step is the base's.

    Attributes:
        lora_A: [rank, in, ...]. lora_B: [out, rank].
        kept: [in]; what dropout leaves of the inputs of a step, by 0 and 1 / (1 - p). Ones outside of training.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float):
        super().__init__()
        self.shape, self.rank, self.scale = tuple(shape), rank, scale
        self.lora_A, self.lora_B = parameter(rank, *shape[1:]), parameter(shape[0], rank)
        self.kept = parameter(1, shape[1], *(1 for _ in shape[2:]), value=1.0)
        self.kept.requires_grad = False
        self.matmul = ops.MatMul()

    def construct(self):
        inner = reshape(multiply(self.lora_A, self.kept), (self.rank, -1))
        return reshape(multiply(self.matmul(self.lora_B, inner), self.scale), self.shape)

    def reset(self, rng: np.random.Generator) -> None:
        bound = 1 / math.sqrt(math.prod(self.shape[1:]))
        values = (rng.random(self.lora_A.shape, np.float32) * 2 - 1) * np.float32(bound)
        self.lora_A.set_data(Tensor(values))

    def drop(self, rng: np.random.Generator | None, share: float) -> None:
        """Leave out a share of the input features; none without a generator."""
        kept = np.ones(self.kept.shape, np.float32)
        if rng is not None:
            kept = (rng.random(kept.shape) >= share).astype(np.float32) / np.float32(1 - share)
        self.kept.set_data(Tensor(kept))


class Stacked(nn.Cell):
    """The adapters of q, k and v beside one weight of all three, [3 W, W]."""

    def __init__(self, parts: Sequence[LowRank]):
        super().__init__()
        self.parts, self.join = nn.CellList(parts), ops.Concat(0)

    def construct(self):
        return self.join((self.parts[0](), self.parts[1](), self.parts[2]()))


class Place(NamedTuple):
    """An adapter, the name of the weight that it stands beside, and which of q, k, v it is in a joined weight."""

    weight: str
    which: int | None
    adapter: LowRank


def attach(net: nn.Cell, names: Iterable[str], rank: int, scale: float) -> list[Place]:
    """Put an adapter beside the weights of these layers, which are named by their paths in the whole model `net`.

    Raises:
        UserError: the rank is more than a weight has.
    """
    cells, places = dict(net.cells_and_names()), []
    for name in names:
        layer = cells[name]
        weight = layer.in_proj_weight if isinstance(layer, MergedAttention) else layer.weight
        if rank > min(weight.shape[0], math.prod(weight.shape[1:])):
            raise UserError(f"lora_rank is {rank}, but {name} has a weight of {list(weight.shape)}: give a smaller one")
        if isinstance(layer, MergedAttention):
            width = weight.shape[1]
            parts = [LowRank((width, width), rank, scale) for _ in range(3)]
            layer.adapt(Stacked(parts))
            places += [Place(weight.name, n, part) for n, part in enumerate(parts)]
        else:
            adapter = LowRank(weight.shape, rank, scale)
            layer.adapt(adapter)
            places.append(Place(weight.name, None, adapter))
    net.update_parameters_name()
    return places


def chosen(net: nn.Cell, targets: Sequence[str], under: tuple[str, ...] = ("",)) -> list[str]:
    """The paths under these prefixes of layers that the targets mean: words of PRESETS, or regular expressions.

    Raises:
        UserError: a target is no regular expression, or means no layer.
    """
    layers = {
        name: cell for name, cell in net.cells_and_names() if isinstance(cell, Weighted) and name.startswith(under)
    }
    found = set()
    for target in targets:
        patterns, with_convolutions = PRESETS.get(target, ([target], True))
        try:
            of_target = {name for name in layers for pattern in patterns if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"lora_targets: '{target}' is not a regular expression: {error}") from None
        if not with_convolutions:
            of_target = {name for name in of_target if not is_wide(layers[name])}
        if not of_target:
            raise UserError(
                f"lora_targets: '{target}' means none of {len(layers)} layers, such as {[*layers][len(layers) // 2]}; "
                f"words are {', '.join(PRESETS)}"
            )
        found |= of_target
    return [name for name in layers if name in found]


def is_wide(layer: nn.Cell) -> bool:
    """Whether it is a convolution of more than 1×1."""
    return isinstance(layer, Conv2d) and layer.weight.shape[2] > 1


def parameters(places: Iterable[Place]) -> Iterator[Parameter]:
    """What is trained of the adapters."""
    for place in places:
        yield from (place.adapter.lora_A, place.adapter.lora_B)


def initialize(places: Iterable[Place], seed: int) -> None:
    """Random A: each depends only on the seed and the weight's name."""
    for place in places:
        place.adapter.reset(generator(seed, f"lora {place.weight} {place.which}"))
