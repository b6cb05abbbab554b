"""The condition: what a network is given beside z and t, and how it is made from texts.

Loss, denoiser and caches pass a `Condition` on as a whole; no sampler sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor, nn

from ldm.text.tokenizer import Tokenizer


class Condition(NamedTuple):
    """Arrays of a batch on the host, or tensors for a network. A field that the network does not take is None.

    context: [B, L, D], the encoded text.
    vector: [B, V], joined to the time embedding.
    """

    context: Any
    vector: Any = None

    def given(self) -> tuple:
        """The arguments of a network after z and t: the fields that are not None, in their order."""
        return tuple(field for field in self if field is not None)

    def map(self, function: Callable) -> Condition:
        """The function's results for all fields that are not None."""
        return Condition(*(None if field is None else function(field) for field in self))

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """One batch from several; arrays."""
        fields = zip(*parts)
        return Condition(*(None if field[0] is None else np.concatenate(field) for field in fields))


class Conditioner:
    """Texts to a Condition.

    Args:
        tokenizer: of the text encoder.
        encoder: ids int32 [B, context_length] -> features [B, context_length, width].
    """

    def __init__(self, tokenizer: Tokenizer, encoder: nn.Cell):
        self.tokenizer, self.encoder = tokenizer, encoder

    def __call__(self, texts: list[str]) -> Condition:
        """The condition of a batch of texts, float32 arrays."""
        return Condition(self.encoder(Tensor(self.tokenizer.encode(texts))).asnumpy().astype(np.float32))
