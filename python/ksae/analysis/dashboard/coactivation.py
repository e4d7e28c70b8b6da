# SPDX-License-Identifier: Apache-2.0
"""Which latents fire on the same tokens."""

from __future__ import annotations

import numpy as np
import torch

from ksae import functional
from ksae.analysis.dashboard.best import Floats, Ints

PAIRS = 2**27  # of latents on one token that are looked at: a few seconds
COUNTS_AT_ONCE = 2**23


class Codes:
    """The latents that fire on each token of every 2^s-th context, s the smallest number with which
    there are at most PAIRS pairs of latents on a token.

    Args:
        F: latents.
        pairs: the limit.
    """

    def __init__(self, F: int, pairs: int = PAIRS) -> None:
        self.F, self.limit = F, pairs
        self.stride = 1
        self.tokens = 0
        self._pairs = 0
        self._parts: list[tuple[Ints, Ints, Ints]] = []  # context and length of a row; its latents

    def add(self, row: Ints, latent: Ints, context: Ints) -> None:
        """Firings [E] of rows, sorted by row, and the context [N] of each row."""
        lengths = np.bincount(row, minlength=len(context))
        self._take(context, lengths, latent.astype(np.int32))
        while self._pairs > self.limit and self.stride < 2**40:
            self.stride *= 2
            parts, self._parts, self._pairs, self.tokens = self._parts, [], 0, 0
            for part in parts:
                self._take(*part)

    def _take(self, context: Ints, lengths: Ints, latent: Ints) -> None:
        keep = context % self.stride == 0
        if not keep.any():
            return
        latent = latent[np.repeat(keep, lengths)]
        context, lengths = context[keep], lengths[keep]
        self._parts.append((context, lengths, latent))
        self._pairs += int((lengths**2).sum())
        self.tokens += len(lengths)

    def neighbours(self, n: int) -> tuple[Floats, Ints]:
        """Of each latent the n others that share most of its tokens, most first and on equal shares
        the smaller index: [F, n] tokens with both over tokens with either, in (0, 1], and [F, n]
        latents; where there are fewer, 0."""
        none = np.zeros(0, np.int64)  # where no context is left
        lengths = np.concatenate([none, *(part[1] for part in self._parts)]).astype(np.int64)
        latents = np.concatenate([none, *(part[2] for part in self._parts)]).astype(np.int64)
        starts = np.cumsum(lengths) - lengths  # of each row
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        order = np.argsort(latents, kind="stable")  # firings, latent by latent
        fired = np.bincount(latents, minlength=self.F)
        bounds = np.concatenate([[0], np.cumsum(fired)])
        n = min(n, self.F)
        share, who = np.zeros((self.F, n), np.float32), np.zeros((self.F, n), np.int64)
        block = max(1, COUNTS_AT_ONCE // self.F)
        for begin in range(0, self.F, block):
            end = min(begin + block, self.F)
            mine = order[bounds[begin] : bounds[end]]
            both = np.zeros((end - begin) * self.F, np.int64)
            for part in np.array_split(
                mine, 1 + int(lengths[row_of[mine]].sum()) // COUNTS_AT_ONCE
            ):
                rows = row_of[part]
                width = lengths[rows]
                local = np.arange(int(width.sum())) - np.repeat(np.cumsum(width) - width, width)
                others = latents[np.repeat(starts[rows], width) + local]
                keys = np.repeat(latents[part] - begin, width) * self.F + others
                both += np.bincount(keys, minlength=len(both))
            counts = both.reshape(-1, self.F)
            counts[np.arange(end - begin), np.arange(begin, end)] = 0  # not with itself
            either = fired[begin:end, None] + fired[None] - counts
            shares = torch.from_numpy((counts / np.maximum(either, 1)).astype(np.float32))
            values, indices = functional.topk(shares, n)
            share[begin:end], who[begin:end] = values.numpy(), indices.numpy()
        return share, who
