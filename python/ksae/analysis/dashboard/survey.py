# SPDX-License-Identifier: Apache-2.0
"""One pass of a coder over a text: what each latent's statistics, contexts and samples are.

Memory does not grow with the text beyond its token ids: top contexts and samples have a fixed
number a latent, and the codes kept for co-activation are thinned to a fixed number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ksae.activations import ArraySource, Contexts, capture, resolve_hook
from ksae.analysis.dashboard.best import Best, Floats, Ints
from ksae.analysis.dashboard.coactivation import Codes
from ksae.analysis.dashboard.histograms import Histograms
from ksae.analysis.evaluate import eval_mode
from ksae.coders.code import Code
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError

ROWS_AT_ONCE = 2048
PHRASE = 8  # tokens up to the firing one; contexts that share them are one quotation


@dataclass(frozen=True)
class Window:
    """Tokens shown around a firing token."""

    before: int = 20
    after: int = 11

    @property
    def size(self) -> int:
        return self.before + 1 + self.after


@dataclass
class Survey:
    """What a pass found. A place is context * length + position."""

    contexts: Contexts
    window: Window
    top: Best  # one firing a context, quotations once, by value
    sample: Best  # firing tokens, drawn uniformly
    fired: Ints  # [F] tokens on which a latent fired
    total: npt.NDArray[np.float64]  # [F] sum of its activations
    largest: Floats  # [F]
    histograms: Histograms
    codes: Codes
    tokens: int = 0  # tokens encoded

    def window_of(self, place: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Token ids [..., window] around places, and which of them are in the context: neither
        beyond its ends nor padding."""
        length = self.contexts.ids.shape[1]
        offsets = np.arange(-self.window.before, self.window.after + 1)
        context = (place // length)[..., None]
        position = (place % length)[..., None] + offsets
        inside = (position >= 0) & (position < self.contexts.lengths.numpy()[context])
        position = np.clip(position, 0, length - 1)
        return self.contexts.ids.numpy()[context, position].astype(np.int64), inside


@torch.no_grad()
def survey(
    coder: SparseCoder,
    model: nn.Module,
    contexts: Contexts,
    hook: str,
    *,
    top: int = 12,
    sample: int = 32,
    window: Window | None = None,
    batch_size: int = 16,
    source: ArraySource | None = None,
    progress: Callable[[int], object] | None = None,
) -> Survey:
    """Run a language model and a coder over a text once, for the activations above 0: the negative
    ones of AbsTopK are left out.

    Args:
        coder: a GradTopK coder selects without gradients here.
        contexts: special tokens are left out, as in training.
        hook: where the coder reads.
        top: contexts with the largest activations of each latent. A context counts once, by its
            strongest token; of contexts that share the 8 tokens up to that token the strongest is
            kept; on equal values the earlier one.
        sample: firing tokens of each latent, drawn uniformly: those with the smallest hash.
        batch_size: contexts in one forward pass; does not change the result but for the rounding
            of the model.
        source: the activations of these contexts at the hook, if they are at hand; else the model
            makes them.
        progress: called with the number of tokens of each batch done.

    Raises:
        UserError: the coder's width is not the hook's, the text has no token to use, an activation
            is not finite, or the source is of another text.
    """
    F = coder.d_sae
    shape = window or Window()
    found = Survey(
        contexts,
        shape,
        top=Best(F, top, shape.size, distinct=True),
        sample=Best(F, sample, shape.size),
        fired=np.zeros(F, np.int64),
        total=np.zeros(F, np.float64),
        largest=np.zeros(F, np.float32),
        histograms=Histograms(F),
        codes=Codes(F),
    )
    for row, latent, value, places in firings(
        coder, model, contexts, hook, batch_size=batch_size, source=source
    ):
        _add(found, row, latent, value, places)
        if progress is not None:
            progress(len(places))
    return found


@torch.no_grad()
def firings(
    coder: SparseCoder,
    model: nn.Module,
    contexts: Contexts,
    hook: str,
    *,
    batch_size: int = 16,
    source: ArraySource | None = None,
) -> Iterator[tuple[Ints, Ints, Floats, Ints]]:
    """The firings of a coder on a text, a batch of contexts at a time: row, latent and value [E] of
    each, row by row, and the place [N] of each row in the text."""
    if source is None:
        batches = _rows_of_model(model, contexts, hook, batch_size)
    else:
        batches = _rows_of_source(source, contexts)
    with eval_mode(model), eval_mode(coder):
        for rows, places in batches:
            yield *_active(coder, rows, hook), places


def _rows_of_model(
    model: nn.Module, contexts: Contexts, hook: str, batch_size: int
) -> Iterator[tuple[Tensor, Ints]]:
    """Activations [N, d] and their places, of whole contexts."""
    resolve_hook(model, hook)
    length = contexts.ids.shape[1]
    used, attended = contexts.mask(), contexts.attended()
    if not used.any():
        raise UserError("dashboard: the text must have at least one token that is not special")
    for begin in range(0, len(contexts), batch_size):
        part = slice(begin, begin + batch_size)
        if not used[part].any():
            continue
        x = _activations(model, contexts.ids[part], attended[part], hook)
        where = used[part].nonzero()
        places = ((where[:, 0] + begin) * length + where[:, 1]).numpy()
        yield x[used[part].to(x.device)], places


def _rows_of_source(source: ArraySource, contexts: Contexts) -> Iterator[tuple[Tensor, Ints]]:
    """The same from rows that are stored."""
    tokens, context, position = source.tokens_of(torch.arange(source.num_tokens))
    within = int(context.max()) < len(contexts) and int(position.max()) < contexts.ids.shape[1]
    if not within or not torch.equal(contexts.ids[context.long(), position.long()], tokens):
        raise UserError(f"dashboard: {source.name} must be the activations of the text, got others")
    places = (context.long() * contexts.ids.shape[1] + position).numpy()
    ends = np.append(np.flatnonzero(context[1:] != context[:-1]) + 1, len(context))
    begin = 0
    for end in ends.tolist():
        if end - begin >= ROWS_AT_ONCE or end == len(context):
            yield source.gather(torch.arange(begin, end))[0], places[begin:end]
            begin = end


def _activations(model: nn.Module, ids: Tensor, attended: Tensor, hook: str) -> Tensor:
    """At a hook, [contexts, length, d]."""
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.long().to(device)}
    if not attended.all():
        inputs["attention_mask"] = attended.long().to(device)
    x = capture(model, [hook], inputs)[hook]
    if x.ndim == 2 and len(x) == ids.numel():
        x = x.view(*ids.shape, -1)  # OPT's MLP sees a list of tokens
    if x.shape[:2] != ids.shape:
        raise UserError(
            f"hook {hook}: must give activations of shape {list(ids.shape)} + [d], "
            f"got {list(x.shape)}"
        )
    return x


def _active(coder: SparseCoder, rows: Tensor, hook: str) -> tuple[Ints, Ints, Floats]:
    """Row, latent and value of each firing, row by row."""
    if rows.shape[1] != coder.d_in:
        raise UserError(
            f"dashboard: {hook} must have the coder's width d_in = {coder.d_in}, "
            f"got {rows.shape[1]}"
        )
    parameter = coder.W_enc
    code = Code(*coder.encode(rows.to(parameter.device, parameter.dtype)))
    values, indices = code.values.float().cpu(), code.indices.cpu()
    if not values.isfinite().all():
        raise UserError(f"dashboard: the coder gives non-finite values at {hook}")
    fires = values > 0
    numbers = torch.arange(len(rows))
    if code.offsets is None:
        row = numbers.unsqueeze(1).expand_as(fires)
    else:
        row = numbers.repeat_interleave(code.offsets.diff().cpu())
    return row[fires].numpy(), indices[fires].numpy(), values[fires].numpy()


def _add(found: Survey, row: Ints, latent: Ints, value: Floats, places: Ints) -> None:
    """The firings of a batch, whose rows are at `places` [N]."""
    length = found.contexts.ids.shape[1]
    found.tokens += len(places)
    found.codes.add(row, latent, places // length)
    if len(latent) == 0:
        return
    order = np.lexsort((row, latent))
    latent, value, place = latent[order], value[order], places[row[order]]
    starts = np.flatnonzero(np.concatenate([[True], latent[1:] != latent[:-1]]))
    rows = latent[starts]
    found.fired[rows] += np.diff(np.append(starts, len(latent)))
    found.total[rows] += np.add.reduceat(value.astype(np.float64), starts)
    found.largest[rows] = np.maximum(found.largest[rows], np.maximum.reduceat(value, starts))
    found.histograms.add(latent, value)

    around = _Around(found, latent, value, place)
    key = value.view(np.int32).astype(np.int64)  # bits of positive floats are in their order
    best = _strongest_of_context(latent, key, place, length)
    tags = _phrase(found, place[best])
    found.top.offer(latent[best], key[best], place[best], tags, around)
    found.sample.offer(latent, _hash(latent, place), place, np.zeros_like(place), around)


class _Around:
    """The activations of a latent in the window around a place, from the firings of a batch."""

    def __init__(self, found: Survey, latent: Ints, value: Floats, place: Ints) -> None:
        self.window, self.length = found.window, found.contexts.ids.shape[1]
        self.span = len(found.contexts) * self.length
        self.keys, self.value = latent * self.span + place, value  # sorted

    def __call__(self, latent: Ints, place: Ints) -> Floats:
        offsets = np.arange(-self.window.before, self.window.after + 1)
        near = place[:, None] + offsets
        same = near // self.length == (place // self.length)[:, None]
        wanted = latent[:, None] * self.span + near
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        hit = same & (self.keys[at] == wanted)
        return np.where(hit, self.value[at], np.float32(0))


def _strongest_of_context(latent: Ints, key: Ints, place: Ints, length: int) -> Ints:
    """Which firings, sorted by latent and place, are the first largest of their context."""
    context = place // length
    order = np.lexsort((place, -key, context, latent))
    a, b = latent[order], context[order]
    first = np.ones(len(order), bool)
    first[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    chosen: Ints = order[first]
    return chosen


def _phrase(found: Survey, place: Ints) -> Ints:
    """A hash of the PHRASE tokens up to each place, within its context."""
    length = found.contexts.ids.shape[1]
    ids = found.contexts.ids.numpy()
    context, position = place // length, place % length
    tag = np.zeros(len(place), np.uint64)
    for back in range(PHRASE):
        at = position - back
        token = np.where(at >= 0, ids[context, np.maximum(at, 0)].astype(np.int64) + 1, 0)
        tag = _mix(tag + token.astype(np.uint64))
    return tag.view(np.int64)


def _hash(latent: Ints, place: Ints) -> Ints:
    """A random number of 63 bits for each firing, the same in every run."""
    mixed = _mix(_mix(latent.astype(np.uint64)) + place.astype(np.uint64))
    return (mixed >> np.uint64(1)).view(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele et al., 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
