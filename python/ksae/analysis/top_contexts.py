# SPDX-License-Identifier: Apache-2.0
"""Top activating contexts: where in a text a latent fires most strongly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ksae.coders.code import Code
from ksae.coders.coder import SparseCoder


@dataclass(frozen=True)
class Context:
    """A place where a latent fires, and the tokens around it."""

    latent: int
    value: float
    row: int  # index of the firing token among the rows
    before: list[int]  # token ids
    token: int
    after: list[int]

    def text(self, decode: Callable[[list[int]], str], mark: tuple[str, str] = ("«", "»")) -> str:
        """One line of text with the firing token marked; line breaks are shown as ⏎."""
        before, token, after = (decode(ids) for ids in (self.before, [self.token], self.after))
        return f"{_line(before)}{mark[0]}{_line(token)}{mark[1]}{_line(after)}"


@torch.no_grad()
def encode_rows(model: SparseCoder, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes of a stream of activations, in order: values, indices [N, k] on the CPU; where tokens
    differ in their number of entries, zeros up to the largest."""
    device = model.W_enc.device
    codes = [[t.cpu() for t in Code(*model.encode(x.to(device))).padded()] for x in batches]
    if not codes:
        raise ValueError("contexts: the stream must have at least one token, got none")
    width = max(values.shape[1] for values, _ in codes)
    values, indices = zip(
        *([pad(t, (0, width - t.shape[1])) for t in code] for code in codes), strict=True
    )
    return torch.cat(values), torch.cat(indices)


def top_contexts(
    values: Tensor,
    indices: Tensor,
    ids: Tensor,
    sequence: Tensor,
    latents: Sequence[int],
    *,
    n: int = 5,
    before: int = 12,
    after: int = 4,
) -> dict[int, list[Context]]:
    """The strongest firings of some latents, strongest first: of AbsTopK the largest in size, of
    either sign. At most one is from a text, and none repeats the tokens of a
    stronger one: texts quote each other.

    Args:
        values, indices: the codes, [N, k].
        ids: token id of each row, [N].
        sequence: number of the text that each row belongs to, [N]; rows of a text are adjacent and
            in order.
        latents: which latents to look at.
        n: contexts a latent.
        before, after: tokens shown on each side, within the same text.
    """
    N = len(values)
    if indices.shape != values.shape or ids.shape != (N,) or sequence.shape != (N,):
        raise ValueError(
            f"contexts: indices must be of shape {list(values.shape)}, ids and sequence of [{N}], "
            f"got {list(indices.shape)}, {list(ids.shape)}, {list(sequence.shape)}"
        )
    found: dict[int, list[Context]] = {}
    for latent in latents:
        rows, slots = ((indices == latent) & (values.abs() > 0)).nonzero(as_tuple=True)
        value = values[rows, slots].float()
        texts: set[int] = set()
        phrases: set[tuple[int, ...]] = set()
        contexts: list[Context] = []
        for i in value.abs().argsort(descending=True, stable=True).tolist():
            row = int(rows[i])
            text = int(sequence[row])
            phrase = tuple(ids[max(0, row - 2) : row + 1].tolist())
            if text in texts or phrase in phrases:
                continue
            texts.add(text)
            phrases.add(phrase)
            low, high = max(0, row - before), min(N, row + after + 1)
            same = (sequence[low:high] == text).tolist()
            window = ids[low:high].tolist()
            contexts.append(
                Context(
                    latent,
                    float(value[i]),
                    row,
                    [t for t, s in zip(window[: row - low], same, strict=False) if s],
                    int(ids[row]),
                    [
                        t
                        for t, s in zip(window[row - low + 1 :], same[row - low + 1 :], strict=True)
                        if s
                    ],
                )
            )
            if len(contexts) == n:
                break
        found[latent] = contexts
    return found


def repeats(ids: Tensor, mask: Tensor, seen: Tensor, length: int = 20) -> Tensor:
    """Which texts share a run of `length` tokens with a text seen before, [texts] bool.

    Documents quote each other, so a held-out one may hold passages that were trained on.

    Args:
        ids, mask: token ids and which of them count, [texts, tokens].
        seen: the tokens seen before, in order, [N].
    """
    before = seen.tolist()
    runs = {tuple(before[i : i + length]) for i in range(len(before) - length + 1)}
    found = []
    for row, used in zip(ids, mask, strict=True):
        text = row[used].tolist()
        places = range(len(text) - length + 1)
        found.append(any(tuple(text[i : i + length]) in runs for i in places))
    return torch.tensor(found, dtype=torch.bool)


def telling_latents(
    values: Tensor, indices: Tensor, ids: Tensor, F: int, count: int, *, min_fired: int = 60
) -> list[int]:
    """Latents that are worth a look: rare, strong whenever they fire, and on more than one word.

    The largest mean size of a value among latents that fire at least `min_fired` times and on at
    most 1 % of the tokens, and whose strongest quarter is on six or more different tokens, none of
    which makes up more than half of it. On text these fire on the forms of a word, or on a phrase;
    without the last rule most detect a single token.
    """
    N, k = values.shape
    active = values.abs() > 0  # [N, k]
    latent, value = indices[active], values[active].double().abs()  # [M]
    token = ids.long().unsqueeze(1).expand(N, k)[active]  # [M]
    fired = torch.bincount(latent, minlength=F)  # [F]
    mean = torch.bincount(latent, value, minlength=F) / fired  # [F] NaN if never fired
    candidates = (fired >= min_fired) & (fired <= max(min_fired, N // 100))  # [F]

    order = latent.argsort(stable=True)
    ends = fired.cumsum(0)
    chosen: list[int] = []
    for i in mean.where(candidates, -torch.inf).argsort(descending=True, stable=True).tolist():
        if len(chosen) == count or not candidates[i]:
            break
        mine = order[int(ends[i] - fired[i]) : int(ends[i])]
        strongest = mine[value[mine].argsort(descending=True, stable=True)[: (len(mine) + 3) // 4]]
        counts = torch.bincount(token[strongest])
        if int((counts > 0).sum()) >= 6 and 2 * int(counts.max()) <= len(strongest):
            chosen.append(i)
    return chosen


def _line(text: str) -> str:
    return re.sub(
        r" {3,}", "  ", text.replace("\n", "⏎")
    )  # indented examples would push the rest off the screen
