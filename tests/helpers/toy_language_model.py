# SPDX-License-Identifier: Apache-2.0
"""A tiny random language model with a tokenizer of whole words, some of which are markup."""

from __future__ import annotations

from typing import Any

import tiny_lm
import torch

from ksae.activations import Contexts, tokenize

D, LAYERS, VOCABULARY = 16, 2, 40
HOOK = "layers.1.resid_post"
MARKUP = ("<script>alert(1)</script>", "<b>bold</b>", "&amp;", '"><img/src=x/onerror=alert(2)>')


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<unk>", "a", *MARKUP]
    words += [f"word{i}" for i in range(VOCABULARY - len(words))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="<unk>"
    )


def llama() -> Any:
    more = {"num_key_value_heads": 1, "max_position_embeddings": 64}
    model: Any = tiny_lm.llama(
        VOCABULARY, D, 24, LAYERS, bos_token_id=0, eos_token_id=0, **more
    ).requires_grad_(False)
    model.model.norm.weight.uniform_(0.5, 2.0)  # a gain that matters
    return model


def texts(count: int = 24, words: int = 40) -> list[str]:
    """Texts of different lengths; two of them quote one another."""
    generator = torch.Generator().manual_seed(1)
    names = ["a", *MARKUP, *(f"word{i}" for i in range(30))]
    found = []
    for number in range(count):
        length = 3 + int(torch.randint(words, (1,), generator=generator))
        picks = torch.randint(len(names), (length,), generator=generator).tolist()
        found.append(" ".join(names[i] for i in picks))
        if number % 5 == 0:
            found.append(found[-1])
    return found


def contexts(length: int = 24) -> Contexts:
    return tokenize(texts(), tokenizer(), length=length)
