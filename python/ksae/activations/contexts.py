# SPDX-License-Identifier: Apache-2.0
"""Documents as token contexts of one length, and their held-out split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksae.activations.texts import Document
from ksae.errors import UserError

BOS_POLICIES = ("auto", "always", "never")
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Contexts:
    """Token ids [contexts, length] int32, padded on the right, with the number of tokens of each
    context, the number of its document, and a hash of each document's text. `special_ids` are the
    tokens that `mask` leaves out."""

    ids: Tensor  # [contexts, length] int32
    lengths: Tensor  # [contexts] int32
    documents: Tensor  # [contexts] int32
    document_keys: tuple[bytes, ...]
    special_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding, special ones included."""
        return int(self.lengths.sum())

    def attended(self) -> Tensor:
        """[contexts, length] bool: False at padding."""
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    def mask(self, exclude_special: bool = True) -> Tensor:
        """[contexts, length] bool: the positions whose activations are used."""
        used = self.attended()
        if exclude_special and self.special_ids:
            used &= ~torch.isin(self.ids, torch.tensor(self.special_ids, dtype=torch.int32))
        return used

    def select(self, contexts: Tensor) -> Contexts:
        """Some contexts, by index or by mask."""
        return Contexts(
            self.ids[contexts],
            self.lengths[contexts],
            self.documents[contexts],
            self.document_keys,
            self.special_ids,
        )

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[Contexts, Contexts]:
        """(train, held-out), divided by document: equal documents stay together. Documents are
        ranked by a hash of (seed, text), and the first `held_out` share of them, at least one, is
        held out. Of a text that is one document, the last `held_out` share of its contexts is."""
        if not 0 < held_out < 1:
            raise UserError(f"split: held_out must be between 0 and 1, got {held_out}")
        present = {self.document_keys[i] for i in set(self.documents.tolist())}
        if len(present) == 1 and len(self) >= 2 and len(set(self.documents.tolist())) == 1:
            last = min(max(1, round(held_out * len(self))), len(self) - 1)
            places = torch.arange(len(self))
            return self.select(places[:-last]), self.select(places[-last:])
        if len(present) < 2:
            raise UserError(
                f"split: needs at least 2 different documents, got {len(present)}, or one of at "
                "least 2 contexts; give more text, or a separator that divides it into documents"
            )
        salt = str(seed).encode() + b"/"
        ranked = sorted(present, key=lambda key: hashlib.blake2b(salt + key).digest())
        count = min(max(1, round(held_out * len(ranked))), len(ranked) - 1)
        chosen = set(ranked[:count])
        of_document = torch.tensor([key in chosen for key in self.document_keys])
        held = of_document[self.documents.long()]
        return self.select(~held), self.select(held)

    def fingerprint(self) -> str:
        """A hash of the tokens and of which are special: what a cache was made from."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((tuple(self.ids.shape), self.special_ids)).encode())
        for tensor in (self.ids, self.lengths):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def tokenize(
    texts: Iterable[Document],
    tokenizer: Any,
    *,
    length: int = 128,
    bos: str = "auto",
    max_tokens: int | None = None,
    exclude: str | Iterable[str | int] = (),
) -> Contexts:
    """Cut each document into contexts of `length` tokens; the last one of a document is shorter and
    padded. No context holds tokens of two documents.

    Args:
        texts: documents, as from `documents(...)`: texts, or their token ids.
        tokenizer: a Hugging Face tokenizer.
        length: tokens of a context, special ones included.
        bos: which special tokens go around every context. "auto": those the tokenizer adds itself
            (BOS, or CLS and SEP); if it adds none, its BOS token if it has one. Without such a
            token many models use the first word as attention sink, with activations far above the
            rest. "always": BOS, an error if the tokenizer has none. "never": none. A
            document that has them itself, as chat templates do, gets no second ones.
        max_tokens: stop once there are this many tokens.
        exclude: tokens whose activations are left out beside those of special tokens, by id or as
            the tokenizer names them; or all of them in one string, with spaces or commas between.

    Raises:
        UserError: an option out of range, a token that the tokenizer does not have, no tokens.
    """
    if bos not in BOS_POLICIES:
        raise UserError(f"tokenize: bos must be one of {', '.join(BOS_POLICIES)}, got {bos!r}")
    excluded = _excluded(tokenizer, exclude)
    before, after = _surroundings(tokenizer, bos)
    room = length - len(before) - len(after)
    if room < 1:
        raise UserError(f"tokenize: length must be at least {length - room + 1}, got {length}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows: list[Tensor] = []  # a tensor each: a list of ints takes 30 times the memory
    lengths: list[int] = []
    numbers: list[int] = []
    keys: list[bytes] = []
    total = 0
    for number, (text, whole) in enumerate(_encoded(texts, tokenizer)):
        keys.append(_key(text))
        ids = _bare(whole, before, after)
        for begin in range(0, len(ids), room):
            row = [*before, *ids[begin : begin + room], *after]
            rows.append(torch.tensor(row + [pad] * (length - len(row)), dtype=torch.int32))
            lengths.append(len(row))
            numbers.append(number)
            total += len(row)
        if max_tokens is not None and total >= max_tokens:
            break
    if not rows:
        raise UserError("tokenize: the documents hold no tokens")
    return Contexts(
        torch.stack(rows),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(numbers, dtype=torch.int32),
        tuple(keys),
        tuple(sorted(excluded.union(tokenizer.all_special_ids))),
    )


def _excluded(tokenizer: Any, tokens: str | Iterable[str | int]) -> set[int]:
    """Ids of tokens given by id or by name."""
    found = set()
    for token in re.split(r"[,\s]+", tokens.strip(", ")) if isinstance(tokens, str) else tokens:
        if isinstance(token, int) or token.isdecimal():
            found.add(int(token))
        elif token:
            id_ = tokenizer.convert_tokens_to_ids(token)
            unknown = id_ is None or (
                id_ == tokenizer.unk_token_id and token != tokenizer.unk_token
            )
            if unknown:
                raise UserError(
                    f"tokenize: exclude must name tokens of the tokenizer, or their ids, got"
                    f" {token!r}"
                )
            found.add(id_)
    return found


def _key(document: Document) -> bytes:
    """A hash that equal documents share."""
    if isinstance(document, str):
        content = document.encode(errors="surrogatepass")
    else:
        content = np.array(document, dtype=np.int64).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _bare(ids: list[int], before: list[int], after: list[int]) -> list[int]:
    """A document without the special tokens that every context gets."""
    if before and ids[: len(before)] == before:
        ids = ids[len(before) :]
    return ids[: -len(after)] if after and ids[-len(after) :] == after else ids


def _surroundings(tokenizer: Any, bos: str) -> tuple[list[int], list[int]]:
    """The special tokens before and after every context."""
    if bos == "never":
        return [], []
    if bos == "auto":
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        for begin in range(len(full) - len(bare) + 1):
            end = begin + len(bare)
            if full[begin:end] == bare and len(full) > len(bare):
                return full[:begin], full[end:]
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], []
    if bos == "always":
        raise UserError('tokenize: this tokenizer has no BOS token; set bos to "auto" or "never"')
    return [], []


def _encoded(texts: Iterable[Document], tokenizer: Any) -> Iterator[tuple[Document, list[int]]]:
    stream = iter(texts)
    while chunk := list(islice(stream, _DOCUMENTS_AT_ONCE)):
        plain = [text for text in chunk if isinstance(text, str)]
        # verbose=False: a document longer than the model's window is what we are here to cut
        options = {"add_special_tokens": False, "verbose": False}
        encoded = iter(tokenizer(plain, **options)["input_ids"] if plain else [])
        yield from ((text, next(encoded) if isinstance(text, str) else text) for text in chunk)
