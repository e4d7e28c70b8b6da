# SPDX-License-Identifier: Apache-2.0
"""The text of single tokens, and short numbers for those that the pages show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ksae.analysis.dashboard.best import Ints


class Vocabulary:
    """Tokens in the order of how often they are shown, so that frequent ones have short numbers.

    Args:
        counts: [V] how often each token id is shown.
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, counts: Ints, tokenizer: Any) -> None:
        shown = np.flatnonzero(counts)
        self.ids: Ints = shown[np.argsort(-counts[shown], kind="stable")]
        self.number: Ints = np.full(len(counts), -1, np.int64)  # of a token id
        self.number[self.ids] = np.arange(len(self.ids))
        self._texts = TokenTexts(tokenizer)

    def numbers(self, ids: Iterable[int]) -> list[int]:
        """Of those token ids that are shown."""
        known = [self.number[i] for i in ids if i < len(self.number)]
        return [int(n) for n in known if n >= 0]

    def texts(self) -> list[str]:
        return [self._texts(i) for i in self.ids.tolist()]


class TokenTexts:
    """The text of a token id where it follows another token: with the space that it stands for,
    which SentencePiece drops at the start of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._lead = self._decode(self._anchor)

    def __call__(self, token: int) -> str:
        text = self._decode([*self._anchor, token])
        if text.startswith(self._lead):
            return text[len(self._lead) :]
        return self._decode([token])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text
