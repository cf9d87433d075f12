"""Text of the embedded models: every caption has words, what has none is refused, and padding changes nothing."""

from __future__ import annotations

import pytest
import torch

from tmpq_exp.scenes import captions
from tmpq_exp.zoo.text import END, NUM_TOKENS, START, UNKNOWN, text_encoder, tokenize, vocabulary, word_tokenizer


def test_every_caption_is_told_apart_and_no_word_is_idle() -> None:
    tokens = tokenize(captions())
    assert len(tokens.unique(dim=0)) == len(captions())
    known = vocabulary()
    assert [known[word] for word in (START, END, UNKNOWN)] == [0, 1, 2]
    assert set(tokens.flatten().tolist()) == set(known.values()) - {known[UNKNOWN]}


def test_digits_are_tokens_of_their_own() -> None:
    known = vocabulary()
    words = [START, "the", "number", "4", "7", END]
    expected = [known[word] for word in words] + [known[END]] * (NUM_TOKENS - len(words))
    assert tokenize(["The number 47"])[0].tolist() == expected
    assert tokenize([""])[0].tolist() == [known[START]] + [known[END]] * (NUM_TOKENS - 1)
    assert word_tokenizer().decode([known["four"], known["and"]]) == "four and"


@pytest.mark.parametrize(
    ("prompt", "word"), [("a big cat", "big"), ("a #", "#"), ("<unknown>", "<"), ("ünder", "ünder")]
)
def test_unknown_words_are_named(prompt: str, word: str) -> None:
    with pytest.raises(ValueError, match=rf"prompt '{prompt}': .* does not know '{word}'; its words are .*handwritten"):
        tokenize(["a three", prompt])


def test_prompts_that_are_too_long_are_refused() -> None:
    longest = "a " * (NUM_TOKENS - 2)
    assert tokenize([longest]).shape == (1, NUM_TOKENS)
    with pytest.raises(ValueError, match=r"has 11 words and digits, at most 10 fit"):
        tokenize([longest + "a"])


def test_the_pooled_state_is_that_of_the_end_and_sees_what_came_before() -> None:
    torch.manual_seed(0)
    encoder = text_encoder(32, 1).eval()
    assert not any(name.startswith("text_model") for name in encoder.state_dict())  # one set of names for all releases
    with torch.no_grad():
        output = encoder(input_ids=tokenize(["a three", "a five"]))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 3])
    torch.testing.assert_close(output.last_hidden_state[0, :2], output.last_hidden_state[1, :2])
    assert not torch.allclose(output.pooler_output[0], output.pooler_output[1])
