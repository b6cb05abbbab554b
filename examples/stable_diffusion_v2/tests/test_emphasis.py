"""Weights in prompts, prompts longer than the encoder, and what both do to the features."""

import numpy as np
import pytest
from mindspore import Tensor

from ldm.conditioning import AS_IT_IS, Conditioner, Wording, weighed
from ldm.errors import UserError
from ldm.text.emphasis import check_weights, has_weights, spans, weighted_tokens
from ldm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(vocab_size=2000, context_length=7)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a fox", [("a fox", 1)]),
        ("", []),
        ("a (fox)", [("a ", 1), ("fox", 1.1)]),
        ("a ((fox)), [snow]", [("a ", 1), ("fox", 1.21), (", ", 1), ("snow", 1 / 1.1)]),
        ("(a (red:0.5) fox:2)", [("a ", 2), ("red", 1), (" fox", 2)]),
        ("(fox: 1.5 ) at 12:30", [("fox", 1.5), (" at 12:30", 1)]),
        ("(fox:.5)(cat:-1)", [("fox", 0.5), ("cat", -1)]),
        (r"a \(real\) fox \\ \[x\]", [(r"a (real) fox \ [x]", 1)]),
        (r"C:\dir", [(r"C:\dir", 1)]),
        ("a (fox in snow", [("a ", 1), ("fox in snow", 1.1)]),
        ("a fox) in ]snow", [("a fox) in ]snow", 1)]),
        ("(a:b) [c:1.2]", [("a:b", 1.1), (" ", 1), ("c:1.2", 1 / 1.1)]),
        ("fox:1.2)", [("fox:1.2)", 1)]),
        ("(one\ntwo)", [("one\ntwo", 1.1)]),
    ],
)
def test_brackets(prompt, said):
    found = spans(prompt)
    assert [text for text, _ in found] == [text for text, _ in said]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in said])
    assert has_weights(prompt) == (said not in ([], [(prompt, 1)]))


def test_every_text_of_brackets_is_read():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        prompt = "".join(rng.choice(list("()[]:\\\\a1. "), 12))
        assert all(np.isfinite(weight) for _, weight in spans(prompt))


@pytest.mark.parametrize(
    "prompt", ["(" * 200 + "fox", "(" * 9000 + "a" + ")" * 9000, f"(fox:{'9' * 400})", "(x:-1e)(fox:-1000001)"]
)
def test_weights_that_nothing_can_be_made_of(prompt):
    with pytest.raises(UserError, match="has weights above 1,000,000: lower them, or use fewer brackets"):
        check_weights(prompt)
    assert has_weights(prompt)  # without an error, because brackets can be plain characters


def test_thousands_of_brackets_that_say_little():
    check_weights("(fox:1.3) " + "([" * 3000 + "x" + "])" * 3000 + "[" * 9000 + "fox")
    check_weights("(" * 9000)


def test_tokens_have_the_weights_of_their_words():
    tokens, weights = weighted_tokens(TOKENIZER, "a (red:2) fox")
    assert tokens == TOKENIZER.tokens("a red fox")
    counts = [len(TOKENIZER.tokens(word)) for word in ("a", "red", "fox")]
    assert weights == np.repeat([1.0, 2.0, 1.0], counts).tolist()


def test_weights_keep_the_mean_of_each_text():
    context = np.random.default_rng(1).standard_normal((2, 7, 5)).astype(np.float32) + 1
    weights = np.ones((2, 7))
    weights[0, 2:4] = 1.5
    new = weighed(context, weights)
    np.testing.assert_array_equal(new[1], context[1])
    assert new.dtype == np.float32 and new[0].mean() == pytest.approx(context[0].mean(), rel=1e-6)
    np.testing.assert_allclose(new[0, 2] / new[0, 1] / (context[0, 2] / context[0, 1]), 1.5, rtol=1e-5)


def echo(ids):
    """An "encoder" whose features are the ids, and whose pooled vector is their sum."""
    numbers = ids.asnumpy().astype(np.float32)
    return Tensor(numbers[..., None] + np.zeros(3, np.float32)), Tensor(numbers.sum(1, keepdims=True))


def test_pieces_of_a_long_prompt():
    """Each has its own start and end; nothing is lost, and the pooled vector is the first one's."""
    conditioner, text = Conditioner([TOKENIZER], echo), "a red fox in the deep snow at night"
    tokens = TOKENIZER.tokens(text)
    assert 5 < len(tokens) <= 20
    condition = conditioner([text, "a"], Wording(pieces=4))
    rows = condition.context[0, :, 0].reshape(4, 7)
    assert (rows[:, 0] == TOKENIZER.start).all() and (rows == TOKENIZER.end).any(1).all()
    assert [int(k) for row in rows for k in row if k not in (TOKENIZER.start, TOKENIZER.end, TOKENIZER.pad)] == tokens
    np.testing.assert_array_equal(condition.context[1, 7:14], conditioner([""]).context[0])
    one = conditioner([text, "a"])
    np.testing.assert_array_equal(condition.context[:, :7], one.context)
    np.testing.assert_array_equal(condition.vector, one.vector)


def test_one_piece_of_plain_words_is_as_ever():
    conditioner = Conditioner([TOKENIZER], echo)
    for text in ("a fox", "a (red:1.2) fox", "", "word " * 50):
        assert (conditioner([text]).context[0, :, 0] == TOKENIZER.encode([text])[0]).all()
    weighted = Wording(weighted=True)
    np.testing.assert_array_equal(conditioner(["a fox"], weighted).context, conditioner(["a fox"], AS_IT_IS).context)
    heavy, plain = conditioner(["a (fox:1.5)"], weighted).context, conditioner(["a fox"]).context
    assert heavy.mean() == pytest.approx(plain.mean()) and np.abs(heavy - plain).max() > 1
