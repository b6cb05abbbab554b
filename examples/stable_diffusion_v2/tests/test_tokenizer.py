"""The tokenizer against ids of OpenAI's CLIP and against its own laws. Thousands more are in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import UserError
from ldm.text import tokenizer
from ldm.text.tokenizer import Tokenizer, clean

SD = Tokenizer()
TINY = Tokenizer(vocab_size=8192)
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
# No start and end tokens, and not the one character that the original drops.
UNMARKED = st.text().filter(lambda text: "<|" not in clean(text) and "\u0345" not in clean(text))
SYMBOLS, MERGES = list(SD.vocab()), set(SD.merges())

# Made with simple_tokenizer.py of the PyPI package openai-clip 1.0.1 and ftfy 6.3.1.
ORIGINAL_IDS = {
    "": [],
    "  \n\t": [],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A  Photo\nOF a cat ": [320, 1125, 539, 320, 2368],
    "It’s a café, isn't it?": [585, 568, 320, 15304, 267, 2923, 713, 585, 286],
    "i'd we'll THEY'RE": [328, 1896, 649, 1342, 889, 982],
    "wow! nice!!": [2781, 256, 1805, 748],
    " #StableDiffusion @user_1 $5.99": [258, 44427, 18656, 9364, 287, 7031, 318, 272, 259, 276, 269, 280, 280],
    "8k 1234": [279, 330, 272, 273, 274, 275],
    "&lt;b&gt; &amp;amp; &#39;s": [283, 321, 285, 261, 568],
    "ﬁne ＡＢＣ": [3797, 5334],
    "schÃ¶n": [844, 7255, 333],
    "ΟΔΟΣ": [138, 123, 138, 112, 138, 123, 139, 480],
    "a\x07b\u200bc": [3937, 9844, 322],
    "e\u0301x\u0301": [3459, 343, 136, 479],
    "👩\u200d👩\u200d👧 🇩🇪": [26304, 26304, 964, 356, 21531],
    "中文 日本語": [19759, 255, 29032, 485, 39121, 44353, 34002, 508],
    "нос кота": [22705, 13506, 141, 479, 27152, 28599, 27080],
    "x<|endoftext|>Y <|StartOfText|> &lt;|endoftext|&gt;": [343, 49407, 344, 49406, 49407],
}


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("text", ORIGINAL_IDS)
def test_tokens_are_those_of_the_original(text):
    assert SD.tokens(text) == ORIGINAL_IDS[text]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("it’s", "it's"),
        ("&amp;", "&"),
        ("ﬁne ＡＢＣ", "fine abc"),
        ("schÃ¶n", "schön"),
        ("ΟΔΟΣ", "οδος"),
        ("Cafe\u0301", "café"),
    ],
)
def test_what_cleaning_makes_of_a_text(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(("pad", "padding"), [("zero", 0), ("end", 49407)])
def test_padding(pad, padding):
    ids = Tokenizer(pad=pad).encode(["a photo of a cat", ""])
    assert ids.shape == (2, 77) and ids.dtype == np.int32
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70
    assert ids[1].tolist() == [49406, 49407] + [padding] * 75


@pytest.mark.parametrize("words", [74, 75, 76, 500])
def test_a_long_prompt_keeps_its_first_75_tokens_and_the_end(words):
    text = " ".join(["cat", "dog"] * words)[: 4 * words]
    ids = SD.encode([text])[0].tolist()
    kept = min(words, 75)
    assert len(SD.tokens(text)) == words
    assert ids == [49406, *SD.tokens(text)[:kept], 49407] + [0] * (75 - kept)


def test_special_tokens_are_found_between_punctuation_too():
    assert SD.tokens("a,<|endoftext|>!") == [320, 267, 49407, 256]


def test_encode_borders():
    assert SD.encode([]).shape == (0, 77)
    assert Tokenizer(context_length=2).encode(["a cat"]).tolist() == [[49406, 49407]]
    with pytest.raises(TypeError):
        SD.encode("one text, not a list")


def test_vocabulary_is_complete_and_every_merge_makes_its_symbol():
    vocab, merges = SD.vocab(), SD.merges()
    assert sorted(vocab.values()) == list(range(49408)) and len(merges) == 48894
    assert [vocab[left + right] for left, right in merges] == list(range(512, 49406))
    assert all(max(vocab[left], vocab[right]) < vocab[left + right] for left, right in merges)


def test_whole_words_of_the_vocabulary_are_one_token():
    words = {i: SD.decode([i]) for symbol, i in SD.vocab().items() if i >= 512 and symbol.endswith("</w>")}
    whole = [(i, word) for i, word in words.items() if "\ufffd" not in word]  # the others are parts of characters
    assert len(whole) == 34208
    assert all(SD.tokens(word) == [i] for i, word in whole[::11])


@EXAMPLES
@given(UNMARKED)
def test_no_character_is_lost(text):
    assert squeezed(SD.decode(SD.tokens(text))) == squeezed(clean(text))


@EXAMPLES
@given(st.text("abcdefgehilnoprst", min_size=1, max_size=20))
def test_no_known_pair_is_left_in_a_word(word):
    tokens = SD.tokens(word)
    assert not {(SYMBOLS[a], SYMBOLS[b]) for a, b in zip(tokens, tokens[1:])} & MERGES


@EXAMPLES
@given(UNMARKED)
def test_a_smaller_vocabulary_cuts_the_same_text_finer(text):
    small, full = TINY.tokens(text), SD.tokens(text)
    assert max(small, default=0) < 8190 and len(small) >= len(full)
    assert TINY.decode(small) == SD.decode(full)
    if max(full, default=0) < 8190:
        assert small == full


def test_a_smaller_vocabulary_has_its_own_end():
    assert TINY.encode(["a cat"])[0, :5].tolist() == [8190, 320, 2368, 8191, 0]
    assert Tokenizer(8192, pad="end").encode([""])[0].tolist() == [8190] + [8191] * 76
    assert TINY.tokens("<|endoftext|>") == [8191]
    assert list(TINY.vocab().values()) == list(range(8192)) and len(TINY.merges()) == 8192 - 514
    assert Tokenizer(514).tokens("Cat") == [ord("c") - 33, ord("a") - 33, 256 + ord("t") - 33]


def test_decode_reads_up_to_the_end():
    assert SD.decode(SD.encode(["A fox’s &amp; a cat’s café!"])[0]) == "a fox 's & a cat 's café !"


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHED_WORDS", 3)
    fresh = Tokenizer()
    for _ in range(2):
        for text in ORIGINAL_IDS:
            assert fresh.tokens(text) == ORIGINAL_IDS[text]
            assert len(fresh._cache) <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 513}, "from 514 to 49408"),
        ({"vocab_size": 50000}, "from 514 to 49408"),
        ({"context_length": 1}, "need 2"),
        ({"pad": "left"}, "choose one of: zero, end"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Tokenizer(**options)
