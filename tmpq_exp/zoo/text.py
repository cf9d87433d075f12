"""Text of the embedded models: a tokenizer of words and single digits, and a small CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

VOCABULARY = Path(__file__).parent / "sd_digits" / "vocabulary.txt"
"""Words by their token, one a line; the first three begin a prompt, end and pad it, and stand for unknown words."""

START, END, UNKNOWN = "<start>", "<end>", "<unknown>"

NUM_TOKENS = 12
"""Tokens of a prompt, its beginning, end and padding counted."""


@cache
def vocabulary() -> dict[str, int]:
    """Word -> token."""
    words = VOCABULARY.read_text(encoding="utf-8").split()
    return {word: token for token, word in enumerate(words)}


@cache
def word_tokenizer() -> Tokenizer:
    """The tokenizer: lower case, single digits, between a first and a last token, padded to ``NUM_TOKENS``.

    Padding repeats the last token, as CLIP's does.
    """
    known = vocabulary()
    tokenizer = Tokenizer(WordLevel(known, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, known[START]), (END, known[END])]
    )
    tokenizer.enable_padding(pad_id=known[END], pad_token=END, length=NUM_TOKENS)
    return tokenizer


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Tokens of prompts, ``(n, NUM_TOKENS)``; the empty prompt is the absence of a condition.

    Raises:
        ValueError: If a prompt holds a word that the vocabulary lacks, or is too long; prompt and word are named.
    """
    encodings = word_tokenizer().encode_batch(list(prompts))
    for prompt, encoding in zip(prompts, encodings, strict=True):
        if UNKNOWN in encoding.tokens:
            first, last = encoding.offsets[encoding.tokens.index(UNKNOWN)]
            raise ValueError(
                f"prompt {prompt!r}: the embedded text encoder does not know {prompt[first:last]!r}; its words are "
                f"{', '.join(sorted(vocabulary().keys() - {START, END, UNKNOWN}))}"
            )
        if len(encoding.tokens) > NUM_TOKENS:
            raise ValueError(
                f"prompt {prompt!r} has {len(encoding.tokens) - 2} words and digits, at most {NUM_TOKENS - 2} fit"
            )
    return torch.tensor([encoding.ids for encoding in encodings])


def text_encoder(width: int, num_layers: int) -> nn.Module:
    """CLIP's text encoder over the vocabulary, without a projection.

    Called with tokens ``(n, NUM_TOKENS)``; ``.last_hidden_state`` is ``(n, NUM_TOKENS, width)``, ``.pooler_output`` its
    entry at the first end token. The names of its parameters are the same under all supported releases of transformers.

    Args:
        width: Of the hidden states, a multiple of 16.
        num_layers: Transformer layers.

    References:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """
    from transformers import CLIPTextConfig, CLIPTextModel  # here, because the import takes seconds

    known = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(known),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 16,
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=known[START],
        eos_token_id=known[END],
        pad_token_id=known[END],
    )
    model: Any = CLIPTextModel(config)
    tower: nn.Module = getattr(model, "text_model", model)  # before release 5 the model is a shell around its tower
    return tower
