"""Token ids against transformers' CLIPTokenizer, and against OpenAI's own code where it is installed.

10,000 strings of thirteen kinds. From version 5 on transformers cleans text otherwise than CLIP did (see
ldm/text/tokenizer.py). The tests therefore give transformers text that our cleaning has cleaned already.
"""

# ruff: noqa: SIM905 - word lists are easier to read and to extend as one string

from __future__ import annotations

import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from ldm.text.tokenizer import SPECIAL, Tokenizer, clean

transformers = pytest.importorskip("transformers", reason="compares with transformers' CLIPTokenizer")
pytestmark = pytest.mark.parity

WORDS = (
    "a an the of in with portrait photograph astronaut horse riding fox tail castle Vincent van Gogh Rembrandt "
    "trending on artstation octane render 8k UHD 4K f/1.8 50mm cinematic lighting hyper-realistic highly detailed, "
    "(masterpiece:1.2) [blurry] {{{sharp}}} unreal_engine #art @greg, bokeh. -- --no text; 1girl 3d"
).split()
CONTRACTIONS = "it's IT'S don't we're they've I'm you'll he'd 'tis rock'n'roll O'Neill should've dogs' ''s".split()
TYPOGRAPHY = "it’s “quoted” ‘single’ „tief“ ﬁne oﬃce ＡＢＣ １２ ｶﾅ".split()
PUNCTUATION = list("!?.,;:-_/\\|()[]{}<>@#$%^*+=~`\"'") + ["...", "!!!", "?!", "--", "—", "–", "…", "«»", "•", "§"]
ENTITIES = "&amp; &lt; &gt; &quot; &#39; &eacute; &nbsp; &amp;amp; &#x27; &copy; &hearts; &amp &notanentity; &".split()
MARKS = [chr(c) for c in range(0x300, 0x330)]
EMOJI = "😀 🦊 🐱 👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪 1️⃣ ❤️ ☆ ♥ ✨✨ 👨🏿\u200d🚀 🫠 ©".split()
CONTROLS = [*"\x00\x07\x0b\x1c\x7f\x85\u200b\u200d\u202e\ufeff\ufffd", "\x1b[31m"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028"]
MARKERS = ["<|startoftext|>", "<|endoftext|>", "<|endoftext", "endoftext|>", "<start_of_text>"]
BLOCKS = [
    *[(0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x587), (0x5D0, 0x5EA), (0x621, 0x64A), (0x660, 0x669)],
    *[(0x904, 0x94D), (0x985, 0x9CD), (0xB85, 0xBCD), (0xE01, 0xE5B), (0x10D0, 0x10F0), (0x1200, 0x1248)],
    *[(0x1E00, 0x1EFF), (0x1F00, 0x1FFE), (0x2100, 0x214F), (0x2160, 0x217F), (0x2200, 0x22FF), (0x3041, 0x3096)],
    *[(0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x1D400, 0x1D7C9), (0x20000, 0x2A6D6)],
]


def letters(rng: random.Random) -> str:
    """A word of one script, of characters as old as Unicode 3.2, which all the libraries agree on."""
    first, last = rng.choice(BLOCKS)
    codes = [rng.randint(first, last) for _ in range(rng.randint(1, 9))]
    known = [c for c in codes if unicodedata.ucd_3_2_0.category(chr(c)) != "Cn"]
    return "".join(map(chr, known))


def garbled(rng: random.Random) -> str:
    """UTF-8 read as another encoding."""
    text = rng.choice(["schön", "café", "naïve", "“quote”", "it’s", "Ελλάδα", "кот", "日本", "🦊"])
    return text.encode().decode(rng.choice(["latin-1", "cp1252", "cp437"]), "replace")


PIECES = {
    "english": lambda rng: rng.choice([str, str.upper, str.title])(rng.choice(WORDS)),
    "contractions": lambda rng: rng.choice(CONTRACTIONS),
    "digits": lambda rng: str(rng.randrange(10 ** rng.randint(1, 9))) + rng.choice(["", "px", "%", ".5", "k"]),
    "punctuation": lambda rng: "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 5))),
    "scripts": letters,
    "marks": lambda rng: "".join(
        rng.choice("aeiouxçß") + "".join(rng.choices(MARKS, k=rng.randint(0, 3))) for _ in "123"
    ),
    "emoji": lambda rng: rng.choice(EMOJI),
    "typography": lambda rng: rng.choice(TYPOGRAPHY),
    "entities": lambda rng: rng.choice(ENTITIES),
    "garbled": garbled,
    "controls": lambda rng: rng.choice(CONTROLS) + rng.choice(WORDS),
    "special": lambda rng: rng.choice(MARKERS),
}


def make_strings(count: int) -> list[tuple[str, str]]:
    """Pairs (kind, text): words of one kind among English ones, or of all kinds; every tenth text is a long one."""
    rng = random.Random(20220220)
    strings = []
    for i in range(count):
        kind = [*PIECES, "mixed"][i % (len(PIECES) + 1)]
        length = rng.randint(40, 120) if i % 10 == 0 else rng.randint(0, 20)
        kinds = [*PIECES] if kind == "mixed" else [kind, "english"]
        pieces = [
            PIECES[rng.choice(kinds)](rng) + rng.choice([" ", " ", " ", "", rng.choice(SPACES)]) for _ in range(length)
        ]
        strings.append((kind, "".join(pieces)))
    return strings


@pytest.fixture(scope="module")
def strings():
    return make_strings(10_000)


@pytest.fixture(scope="module")
def texts(strings):
    return [text for _, text in strings]


@pytest.fixture(scope="module")
def our_tokens(texts):
    """Our tokens, of any length."""
    return list(map(Tokenizer().tokens, texts))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Writes a tokenizer of ours as transformers' vocab.json and merges.txt and loads it there."""

    def load(ours: Tokenizer, pad_token: str):
        folder = tmp_path_factory.mktemp("tokenizer")
        (folder / "vocab.json").write_text(json.dumps(ours.vocab()), encoding="utf-8")
        merges = "".join(f"{left} {right}\n" for left, right in ours.merges())
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
        return transformers.CLIPTokenizerFast.from_pretrained(folder, pad_token=pad_token)

    return load


def cleaned(text: str) -> str:
    pieces = SPECIAL.split(text)
    return "".join([piece if i % 2 else clean(piece) for i, piece in enumerate(pieces)])


def padded(theirs, texts: list[str]) -> np.ndarray:
    return theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids


def test_the_strings_are_varied(texts, our_tokens):
    lengths = list(map(len, our_tokens))
    assert len(set(texts)) > 9_000 and sum(n > 75 for n in lengths) > 800 and min(lengths) == 0
    assert len({unicodedata.category(c) for text in texts for c in text}) > 22


@pytest.mark.parametrize(("vocab_size", "every"), [(49408, 1), (8192, 5)])
def test_ids_are_those_of_transformers_on_clean_text(texts, load, vocab_size, every):
    texts = texts[::every]
    ours = Tokenizer(vocab_size, pad="end")
    same = ours.encode(texts) == padded(load(ours, "<|endoftext|>"), list(map(cleaned, texts)))
    assert [text for text, row in zip(texts, same) if not row.all()] == []


def test_tokens_are_those_of_transformers_on_clean_text(texts, our_tokens, load):
    theirs = load(Tokenizer(), "<|endoftext|>")(list(map(cleaned, texts)), add_special_tokens=False).input_ids
    assert [text for text, a, b in zip(texts, our_tokens, theirs) if a != b] == []


def test_tokens_differ_only_where_text_needs_repair(strings, texts, our_tokens, load):
    theirs = load(Tokenizer(), "<|endoftext|>")(texts, add_special_tokens=False).input_ids
    kinds = {kind for (kind, _), a, b in zip(strings, our_tokens, theirs) if a != b}
    assert kinds == {"typography", "entities", "garbled", "controls", "scripts", "mixed"}


def test_diffusers_reads_the_exclamation_marks_of_sd2_as_padding(texts, load):
    ours = Tokenizer(pad="zero")
    theirs = load(ours, "!")
    assert ours.encode(["wow!"])[0, :4].tolist() == [49406, 2781, 256, 49407]
    assert padded(theirs, ["wow!"])[0, :4].tolist() == [49406, 2781, 0, 49407]
    others = [text for text in texts[::5] if "!" not in cleaned(text)]
    same = ours.encode(others) == padded(theirs, list(map(cleaned, others)))
    assert len(others) > 1_000 and same.all()


def test_tokens_are_those_of_the_original(texts, our_tokens):
    package = importlib.util.find_spec("clip")
    if package is None or not package.submodule_search_locations:
        pytest.skip("compares with OpenAI's CLIP, PyPI package openai-clip, of which one file is enough")
    file = Path(package.submodule_search_locations[0]) / "simple_tokenizer.py"
    spec = importlib.util.spec_from_file_location("simple_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original, ours = module.SimpleTokenizer(), Tokenizer()
    assert ours.vocab() == original.encoder and ours.merges() == list(original.bpe_ranks)
    plain = [(text, tokens) for text, tokens in zip(texts, our_tokens) if not SPECIAL.search(text)]
    assert len(plain) > 9_000
    assert [text for text, tokens in plain if tokens != original.encode(text)] == []
