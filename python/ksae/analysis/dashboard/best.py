# SPDX-License-Identifier: Apache-2.0
"""The n best firings of each latent, kept while a text streams by: exact, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
EMPTY = -1  # the key of a free slot


class Best:
    """Of each latent the n firings with the largest keys, largest first; on equal keys the earlier
    place first.

    Memory: F * n * (24 + 4 * window) bytes, whatever the length of the text.

    Args:
        F: latents.
        n: firings of a latent.
        window: activations kept around a firing.
        distinct: firings of a latent with equal tags count once, by the best of them.
    """

    def __init__(self, F: int, n: int, window: int, *, distinct: bool = False) -> None:
        self.n, self.distinct = n, distinct
        self.key: Ints = np.full((F, n), EMPTY, np.int64)
        self.place: Ints = np.zeros((F, n), np.int64)  # of the firing token in the text
        self.tag: Ints = np.zeros((F, n), np.int64)
        self.acts: Floats = np.zeros((F, n, window), np.float32)

    def offer(
        self,
        latent: Ints,
        key: Ints,
        place: Ints,
        tag: Ints,
        window: Callable[[Ints, Ints], Floats],
    ) -> None:
        """Take the best of some firings, whose places come after those of earlier calls.

        Args:
            latent, key, place, tag: [M] of each firing; keys are at least 0.
            window: the activations [m, window] around firings (latent, place), asked for those
                that are kept.
        """
        if self.n == 0:
            return
        better = key > self.key[latent, -1]  # on equal keys the earlier one stays
        latent, key, place, tag = (a[better] for a in (latent, key, place, tag))
        if len(latent) == 0:
            return
        rows = np.unique(latent)
        # those there and those offered, as one list
        held, slot = (self.key[rows] != EMPTY).nonzero()
        held = rows[held]
        old = len(held)
        every = [
            np.concatenate(pair)
            for pair in (
                (held, latent),
                (self.key[held, slot], key),
                (self.place[held, slot], place),
                (self.tag[held, slot], tag),
            )
        ]
        chosen = self._choose(*every)
        latent, key, place, tag = (a[chosen] for a in every)
        rank = _rank(latent)
        acts = np.empty((len(chosen), self.acts.shape[2]), np.float32)
        is_old = chosen < old
        acts[is_old] = self.acts[latent[is_old], slot[chosen[is_old]]]
        acts[~is_old] = window(latent[~is_old], place[~is_old])
        self.key[rows] = EMPTY
        self.key[latent, rank], self.place[latent, rank] = key, place
        self.tag[latent, rank], self.acts[latent, rank] = tag, acts

    def _choose(self, latent: Ints, key: Ints, place: Ints, tag: Ints) -> Ints:
        """Which of all firings stay, latent by latent and best first."""
        order: Any = np.arange(len(latent))
        if self.distinct:
            order = np.lexsort((place, -key, tag, latent))
            first = np.ones(len(order), bool)
            a, b = latent[order], tag[order]
            first[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
            order = order[first]
        order = order[np.lexsort((place[order], -key[order], latent[order]))]
        found: Ints = order[_rank(latent[order]) < self.n]
        return found


def _rank(latent: Ints) -> Ints:
    """Number of each entry within its latent's run of a sorted list."""
    starts = np.flatnonzero(np.concatenate([[True], latent[1:] != latent[:-1]]))
    lengths = np.diff(np.append(starts, len(latent)))
    ranks: Ints = np.arange(len(latent)) - np.repeat(starts, lengths)
    return ranks
