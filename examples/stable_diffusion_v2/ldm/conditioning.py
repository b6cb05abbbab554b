"""The condition: what a network is given beside z and t, and how it is made from texts and sizes.

Loss, denoiser and caches pass a `Condition` on as a whole; no sampler sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor, nn

from ldm.config.model import REFINER_NUMBERS
from ldm.text.emphasis import weighted_tokens
from ldm.text.tokenizer import Tokenizer


class Condition(NamedTuple):
    """Arrays of a batch on the host, or tensors for a network. A field that the network does not take is None.

    context: [B, L, D], the encoded text.
    vector: [B, V], joined to the time embedding: the pooled text and embedded sizes.
    guidance: [B, G], the embedded guidance scale of a distilled network; see `embed_guidance`.
    channels: [B, N, H, W], joined to z: a mask and the picture around it, or a depth map.
    """

    context: Any
    vector: Any = None
    guidance: Any = None
    channels: Any = None

    def given(self) -> tuple:
        """The arguments of a network after z and t: the fields that are not None, in their order."""
        return tuple(field for field in self[:3] if field is not None)

    def beside(self, z: np.ndarray) -> np.ndarray:
        """What the network takes for z: z, and the channels where there are any; arrays."""
        return z if self.channels is None else np.concatenate((z, self.channels), 1)

    def with_sizes(self, sizes: np.ndarray) -> Condition:
        """The condition whose vector is the pooled text and then the sizes, as `embed_numbers` gives them."""
        return self._replace(vector=np.concatenate((self.vector, sizes), 1))

    def with_guidance(self, scales: np.ndarray, channels: int) -> Condition:
        """The condition that tells these guidance scales, [B], in so many channels."""
        return self._replace(guidance=embed_guidance(scales, channels))

    def where(self, kept: np.ndarray) -> Condition:
        """The condition with zeros for the samples that are not kept; `kept`: [B], truth values."""
        return self.map(lambda field: field * kept.astype(np.float32).reshape(-1, *[1] * (field.ndim - 1)))

    def map(self, function: Callable) -> Condition:
        """The function's results for all fields that are not None."""
        return Condition(*(None if field is None else function(field) for field in self))

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """One batch from several; arrays."""
        fields = zip(*parts)
        return Condition(*(None if field[0] is None else np.concatenate(field) for field in fields))


AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5  # that Stability's refiner is drawn with


class Sizes(NamedTuple):
    """What SDXL is told of a picture (arXiv 2307.01952, section 2.2). Sides are in pixels, heights before widths.

    original: of the picture's file, before it was scaled.
    crop: (top, left), where the picture was cut out after it was scaled.
    target: of the picture that the network sees or draws.
    aesthetic_score: the refiner is told this number, from 0 to 10, in the place of the target.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]
    aesthetic_score: float = AESTHETIC_SCORE

    def numbers(self, count: int) -> tuple[float, ...]:
        """The numbers in the network's order; `count` is `ModelConfig.size_numbers`."""
        last = (self.aesthetic_score,) if count == REFINER_NUMBERS else self.target
        return (*self.original, *self.crop, *last)


class Wording(NamedTuple):
    """How prompts are read.

    pieces: how many times the encoder's length of a prompt is seen; each piece has its own start and end token, and
        their features are joined. A shorter prompt has empty pieces.
    weighted: brackets are weights; see `ldm.text.emphasis`.
    """

    pieces: int = 1
    weighted: bool = False

    def read(self, tokenizer: Tokenizer, text: str) -> tuple[list[int], list[float]]:
        """The token ids of a prompt, all of them, and the weight of each."""
        if self.weighted:
            return weighted_tokens(tokenizer, text)
        tokens = tokenizer.tokens(text)
        return tokens, [1.0] * len(tokens)


AS_IT_IS = Wording()  # one piece, plain words


class Conditioner:
    """Texts to a Condition, which lacks the sizes.

    Args:
        tokenizers: of each text encoder.
        encoder: ids, as `ids` gives them -> the condition's fields.
    """

    def __init__(self, tokenizers: Sequence[Tokenizer], encoder: nn.Cell):
        self.tokenizers, self.encoder = tokenizers, encoder

    def ids(self, texts: list[str], pieces: int = 1) -> np.ndarray:
        """Token ids int32 [B, L], or [B, encoders, L] of several encoders; B is texts times pieces, a text's pieces
        follow each other."""
        return self._side_by_side([_rows(tokenizer, texts, pieces) for tokenizer in self.tokenizers])

    def __call__(self, texts: list[str], wording: Wording = AS_IT_IS) -> Condition:
        """The condition of a batch of texts, float32 arrays. The pooled vector is the first piece's."""
        pieces = [self._piece(texts, wording, number) for number in range(wording.pieces)]
        return pieces[0]._replace(context=np.concatenate([piece.context for piece in pieces], 1))

    def _piece(self, texts: list[str], wording: Wording, number: int) -> Condition:
        ids, weights = [], np.ones((len(texts), self.tokenizers[0].context_length))  # [B, L]
        for tokenizer in self.tokenizers:
            room = tokenizer.context_length - 2
            here = slice(number * room, (number + 1) * room)
            read = [wording.read(tokenizer, text) for text in texts]
            ids.append(np.array([tokenizer.row(tokens[here]) for tokens, _ in read], np.int32))
            for row, (_, said) in zip(weights, read):
                row[1 : 1 + len(said[here])] = said[here]
        fields = self.encoder(Tensor(self._side_by_side(ids)))
        condition = Condition(*(field.asnumpy().astype(np.float32) for field in fields))
        return condition._replace(context=weighed(condition.context, weights))

    @staticmethod
    def _side_by_side(ids: list[np.ndarray]) -> np.ndarray:
        return ids[0] if len(ids) == 1 else np.stack(ids, 1)


def _rows(tokenizer: Tokenizer, texts: list[str], pieces: int) -> np.ndarray:
    """Token ids int32 [texts times pieces, L]."""
    room = tokenizer.context_length - 2
    starts = range(0, pieces * room, room)
    tokens = [tokenizer.tokens(text) for text in texts]
    return np.array([tokenizer.row(each[start : start + room]) for each in tokens for start in starts], np.int32)


def weighed(context: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Features [B, L, D] times weights [B, L], brought back to the mean that a text's features had before, as in A1111.

    Features whose weights are all 1 stay as they are.
    """
    heavy = context.astype(np.float64) * weights[:, :, None]
    means = (each.mean((1, 2), dtype=np.float64, keepdims=True) for each in (context, heavy))
    before, after = means
    heavy *= np.divide(before, after, out=np.ones_like(after), where=after != 0)
    plain = (weights == 1).all(1)[:, None, None]
    return np.where(plain, context, heavy).astype(np.float32)


def embed_numbers(numbers: np.ndarray, channels: int) -> np.ndarray:
    """Cosines, then sines of each number at geometrically falling frequencies, float32 [B, n * channels].

    Args:
        numbers: [B, n].
        channels: how many values stand for one number; even.
    """
    half = channels // 2
    angles = np.asarray(numbers, np.float64)[..., None] * np.exp(-np.log(10000) * np.arange(half) / half)
    return np.concatenate((np.cos(angles), np.sin(angles)), -1).reshape(len(numbers), -1).astype(np.float32)


def embed_guidance(scales: np.ndarray, channels: int) -> np.ndarray:
    """Guidance scales w as distilled networks are told them (arXiv 2210.03142, section 3), float32 [B, channels].

    They are sines, then cosines of 1000 (w - 1), at frequencies that fall geometrically from 1 to 1/10000, both
    included. diffusers reads this form; its angles are float32, and so differ by up to 2e-4 at w = 5.

    Args:
        scales: [B]; 1 is no guidance.
        channels: even, at least 4.
    """
    frequencies = 10000 ** -np.linspace(0, 1, channels // 2)
    angles = 1000 * (np.asarray(scales, np.float64)[:, None] - 1) * frequencies
    return np.concatenate((np.sin(angles), np.cos(angles)), -1).astype(np.float32)
