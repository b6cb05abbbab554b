"""CLIP's tokenizer: prompts to token ids (arXiv 2103.00020, section 2.4; byte-pair encoding: arXiv 1508.07909).

The tokenizer cleans a prompt, puts it in lower case and cuts it into words. The UTF-8 bytes of a word are its first
symbols. Neighbouring symbols are joined, the pair that was most frequent in the training text first, until the word
holds no known pair.

Ids 0-255 are bytes inside a word, and ids 256-511 are the same bytes at a word's end. Then every merge has one id, in
order of priority. The start token and the end token come last. A smaller vocabulary is therefore the full one without
its last merges.

Cleaning is what OpenAI's CLIP does. The text encoders of Stable Diffusion were trained with it, SD 2's by OpenCLIP:
ftfy repairs the text, and HTML entities are resolved twice. Transformers, and diffusers with it, cleans otherwise from
version 5 on (Unicode normal form C only). Its ids therefore differ from ours on typographic quotes, ligatures,
full-width letters, broken encodings, control characters, HTML entities and the final sigma (`it’s`, `&amp;`). Its slow
tokenizer before version 5 does the same as ours where ftfy is installed, except for some entities: those escaped twice,
those without a semicolon, and those beside a `<`.

`<|startoftext|>` and `<|endoftext|>` in a prompt are the start token and the end token wherever they stand, as in
transformers. Spelled in capitals or with entities, they are these tokens if cleaning makes them words of their own.

diffusers declares SD 2's padding token 0 as a special token named `!`, so it reads every `!` of a prompt as padding.
Here a `!` is a `!`, as in OpenAI's CLIP and in OpenCLIP.
"""

from __future__ import annotations

import functools
import gzip
import html
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import ftfy
import numpy as np
import regex

from ldm.errors import UserError

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
# The text is in lower case already. Ignoring case changes odd characters only, as the original does: a long s is read
# as an s, and a lone combining iota (U+0345) is dropped.
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
FULL_SIZE = 49408  # 256 bytes twice, 48,894 merges, start and end
CACHED_WORDS = 1 << 14
PADDINGS = ("zero", "end")  # the token 0, and the end token
_TRAINED_PADDING = {"openclip": "zero", "clip": "end"}  # of each text encoder: SD 2.x and SD 1.x

# The vocabulary file writes a byte as one visible character: printable Latin-1 as itself, the rest from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]  # in the order of their ids
CHARACTERS = [chr(byte) for byte in PRINTABLE] + [chr(0x100 + i) for i in range(256 - len(PRINTABLE))]
BYTE_TO_ID = {byte: i for i, byte in enumerate(BYTES)}
CHARACTER_TO_BYTE = dict(zip(CHARACTERS, BYTES))


def clean(text: str) -> str:
    """Text as OpenAI's CLIP and OpenCLIP read it. They also collapse white space, which never reaches a token."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).lower()


class Tokenizer:
    """Byte-level BPE with CLIP's vocabulary.

    Args:
        vocab_size: 49408 for Stable Diffusion; less keeps the first `vocab_size - 514` merges only (at least 514).
        context_length: tokens per prompt, start and end token included.
        pad: what fills up a short prompt: "zero" (token 0, SD 2) or "end" (the end token, SD 1).

    Raises:
        UserError: a size out of range or an unknown name.
    """

    def __init__(self, vocab_size: int = FULL_SIZE, context_length: int = 77, pad: str = "zero") -> None:
        if not 514 <= vocab_size <= FULL_SIZE:
            raise UserError(f"vocab_size is {vocab_size}; choose one from 514 to {FULL_SIZE}")
        if context_length < 2:
            raise UserError(f"context_length is {context_length}; start and end token alone need 2")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.start, self.end = vocab_size - 2, vocab_size - 1
        fillers = {"zero": 0, "end": self.end}
        if pad not in fillers:
            raise UserError(f"unknown pad {pad!r}; choose one of: {', '.join(fillers)}")
        self.pad = fillers[pad]
        symbols, pairs = _vocabulary()
        self._symbols = [*symbols[: vocab_size - 2], START, END]
        self._merges = {pair: 512 + rank for rank, pair in enumerate(pairs[: vocab_size - 514])}
        self._special = {START: [self.start], END: [self.end]}
        self._cache: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [len(texts), context_length]: start, the text's first tokens, end, padding."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        rows = [self.row(self.tokens(text)) for text in texts]
        return np.array(rows, np.int32).reshape(len(texts), self.context_length)

    def row(self, tokens: list[int]) -> list[int]:
        """Token ids of one text, `context_length` of them: start, as many of the tokens as fit, end, padding."""
        ids = [self.start, *tokens[: self.context_length - 2], self.end]
        return ids + [self.pad] * (self.context_length - len(ids))

    def tokens(self, text: str) -> list[int]:
        """All token ids of a text, without start, end and padding; more than `context_length - 2` do not fit."""
        pieces = SPECIAL.split(text)  # every second piece is a special token
        pieces[::2] = map(clean, pieces[::2])
        return [token for piece in pieces for word in WORD.findall(piece) for token in self._word_tokens(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of the ids before the first end token, with a space after each word."""
        symbols = [self._symbols[i] for i in takewhile(lambda i: i != self.end, ids) if i != self.start]
        characters = "".join(symbols).replace("</w>", CHARACTERS[BYTE_TO_ID[ord(" ")]])
        return bytes(CHARACTER_TO_BYTE[c] for c in characters).decode("utf-8", "replace").strip()

    def vocab(self) -> dict[str, int]:
        """Symbol to id, as in the vocab.json of a transformers tokenizer."""
        return {symbol: i for i, symbol in enumerate(self._symbols)}

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of symbols, first priority first, as in the merges.txt of a transformers tokenizer."""
        return [(self._symbols[left], self._symbols[right]) for left, right in self._merges]

    def _word_tokens(self, word: str) -> list[int]:
        tokens = self._special.get(word) or self._cache.get(word)
        if tokens is None:
            if len(self._cache) == CACHED_WORDS:
                self._cache.clear()
            tokens = self._cache[word] = self._merge(word)
        return tokens

    def _merge(self, word: str) -> list[int]:
        ids = [BYTE_TO_ID[byte] for byte in word.encode()]
        ids[-1] += 256
        while True:
            pair = min(zip(ids, ids[1:]), key=lambda pair: self._merges.get(pair, FULL_SIZE), default=None)
            if pair not in self._merges:
                return ids
            ids = _join(ids, pair, self._merges[pair])


def _join(ids: list[int], pair: tuple[int, int], merged: int) -> list[int]:
    """Every occurrence of the pair, from the left, becomes one symbol."""
    joined, i = [], 0
    while i < len(ids):
        found = ids[i] == pair[0] and ids[i + 1 : i + 2] == [pair[1]]
        joined.append(merged if found else ids[i])
        i += 2 if found else 1
    return joined


@functools.lru_cache(maxsize=1)
def _vocabulary() -> tuple[list[str], list[tuple[int, int]]]:
    """All symbols but start and end in the order of their ids, and the pair of ids that each merge joins."""
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        merges = [line.split() for line in file.read().splitlines()[1:]]  # the first line is a title
    symbols = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), *map("".join, merges)]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    return symbols, [(ids[left], ids[right]) for left, right in merges]


def padding_of(variant: str, said: str | None = None) -> str:
    """What fills short prompts up: what the model's config says, or else what its text encoder was trained with."""
    return said or _TRAINED_PADDING[variant]
