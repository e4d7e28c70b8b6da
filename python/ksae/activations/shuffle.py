# SPDX-License-Identifier: Apache-2.0
"""The endless shuffled stream that every source uses.

The data is a list of units (a block of rows on disk, or a context still to be run). Each epoch
permutes the units, cuts the permuted list into windows of about `buffer_tokens` rows, loads one
window at a time, and emits its rows in random order. The stream is the epochs one after the other,
so a batch may span two epochs and no row is dropped or repeated within an epoch.

Which rows make up batch t follows from (unit sizes, batch size, seed, t) alone: each epoch and each
window has a random generator of its own. Starting at a later step loads only that step's window.

How good it is: any two rows of one unit share a window, so of the B rows of a batch about
B * unit / buffer_tokens come from the same unit as a given row. With one window it is a uniform
permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksae.activations.rows import Rows, take
from ksae.errors import UserError


class Loaded(NamedTuple):
    """Some rows: all that belongs to a row of x travels and is shuffled with it."""

    x: Tensor  # [N, d_in]
    y: Tensor | None  # [N, d_out]
    g: Tensor | None  # [N, d_out or d_in] gradient of the loss at y, or at x
    rows: Rows  # [N] row numbers

    def take(self, chosen: Rows) -> Loaded:
        x, y, g = (None if t is None else take(t, chosen) for t in self[:3])
        assert x is not None
        return Loaded(x, y, g, self.rows[chosen])


def check_stream(batch_size: int, seed: int, start_step: int) -> None:
    if batch_size < 1:
        raise UserError(f"batches: batch_size must be at least 1, got {batch_size}")
    if seed < 0:
        raise UserError(f"batches: seed must be at least 0, got {seed}")
    if start_step < 0:
        raise UserError(f"batches: start_step must be at least 0, got {start_step}")


def plan(counts: Rows, buffer_tokens: int, seed: int, epoch: int) -> tuple[list[Rows], Rows]:
    """One epoch: the units of each window, in rising order so that reading is nearly sequential,
    and the stream position at which each window ends."""
    order = np.random.default_rng((seed, epoch)).permutation(len(counts))
    ends = np.cumsum(counts[order])
    total = int(ends[-1])
    # Windows of equal size: a short last one would hold few units and shuffle badly.
    windows = max(1, round(total / buffer_tokens))
    window_of = np.minimum((ends - 1) * windows // total, windows - 1)
    last = np.flatnonzero(np.diff(window_of, append=windows))
    units = [np.sort(part) for part in np.split(order, last[:-1] + 1)]
    return units, ends[last]


def shuffled(
    counts: Rows,
    load: Callable[[Rows], Loaded],
    batch_size: int,
    *,
    buffer_tokens: int,
    seed: int = 0,
    start_step: int = 0,
) -> Iterator[Loaded]:
    """Endless batches from `start_step` on. `counts` [units] are rows per unit; `load(units)`
    returns the rows of some units."""
    total = int(counts.sum())
    epoch, offset = divmod(start_step * batch_size, total)
    parts: list[Loaded] = []
    missing = batch_size
    while True:
        windows, ends = plan(counts, buffer_tokens, seed, epoch)
        first = int(np.searchsorted(ends, offset, side="right"))
        for number in range(first, len(windows)):
            window = load(windows[number])
            count = len(window.rows)
            order = np.random.default_rng((seed, epoch, number)).permutation(count)
            begin = offset - int(ends[number] - count) if number == first else 0
            while begin < len(order):
                chosen = order[begin : begin + missing]
                begin += len(chosen)
                missing -= len(chosen)
                parts.append(window.take(chosen))
                if missing == 0:
                    yield _join(parts)
                    parts, missing = [], batch_size
            del window  # before the next window is loaded: one in memory at a time
        epoch, offset = epoch + 1, 0


def _join(parts: list[Loaded]) -> Loaded:
    if len(parts) == 1:
        return parts[0]
    ys = [part.y for part in parts if part.y is not None]
    gs = [part.g for part in parts if part.g is not None]
    return Loaded(
        torch.cat([part.x for part in parts]),
        torch.cat(ys) if ys else None,
        torch.cat(gs) if gs else None,
        np.concatenate([part.rows for part in parts]),
    )
