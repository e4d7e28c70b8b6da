# SPDX-License-Identifier: Apache-2.0
"""Tiny random language models with a tokenizer, in memory and in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ksae.activations import Contexts

WORDS = ["<s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran"]
D = 12


def llama(
    vocabulary: int = len(WORDS), d: int = D, inner: int = 16, layers: int = 2, **more: object
) -> nn.Module:
    """Of two heads, each with keys of its own; the same weights at each call."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=inner, num_hidden_layers=layers,
        **{"num_attention_heads": 2, "num_key_value_heads": 2, **more},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def language_model(encoder: bool = False, **more: object) -> nn.Module:
    """A decoder or an encoder of two layers."""
    import transformers

    if not encoder:
        return llama(**{"bos_token_id": 0, "eos_token_id": 0, **more})
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": D, "intermediate_size": 16}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    return transformers.BertModel(config).eval()


def contexts(count: int, length: int = 8) -> Contexts:
    """Contexts of one document each, which start with BOS."""
    ids = torch.randint(2, len(WORDS), (count, length), dtype=torch.int32)
    ids[:, 0] = 0
    numbers = torch.arange(count, dtype=torch.int32)
    lengths = torch.full((count,), length, dtype=torch.int32)
    return Contexts(ids, lengths, numbers, tuple(bytes([i]) for i in range(count)), (0,))


def save(folder: Path, encoder: bool = False, **more: object) -> Path:
    """Model and tokenizer as Hugging Face stores them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers.utils.logging.disable_progress_bar()
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    language_model(encoder, **more).save_pretrained(folder)
    return folder


def text(words: int, seed: int = 0) -> str:
    """Words that the tokenizer knows."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randint(2, len(WORDS), (words,), generator=g).tolist()
    return " ".join(WORDS[number] for number in numbers)
