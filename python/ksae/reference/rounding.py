# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding to bfloat16 by a counter-based generator (Philox)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["stochastic_bfloat16"]

_WORD = 0xFFFFFFFF


def stochastic_bfloat16(x: Tensor, rng_state: Tensor, draw: int, start: int) -> Tensor:
    """x [F, columns] float32 at columns [start, start + columns) of a matrix, rounded to a bfloat16
    neighbour, away from zero with the probability of the share that lies below x.

    The 16 bits that are added before the last 16 are cut off are those of `draw`, 0 to 3, of the
    seed and step in rng_state [2] int64. Infinities and NaN stay.
    """
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    column = torch.arange(start, start + x.shape[1], device=x.device)
    words = _philox((column // 4, row, rng_state[1] & _WORD, draw // 2), rng_state[0])
    low, high = words[2 * (draw % 2) : 2 * (draw % 2) + 2]
    bits = torch.where(column % 4 < 2, low, high) >> 16 * (column % 2) & 0xFFFF
    cut = (x.contiguous().view(torch.int32) + bits.int()) >> 16 << 16  # [F, columns]
    return torch.where(x.isfinite(), cut.view(torch.float32), x).bfloat16()


def _philox(counter: Sequence[Tensor | int], key: Tensor) -> list[Tensor]:
    """Four words of 32 bits, in int64, of Philox4x32-10 (Salmon et al., SC 2011)."""
    zero = torch.zeros_like(key)
    c0, c1, c2, c3 = (c + zero for c in counter)
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the lower 64 bits, which is all of them
        c0, c1, c2, c3 = (
            (b >> 32 & _WORD) ^ c1 ^ k0,
            b & _WORD,
            (a >> 32 & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


# What follows is a handful of torch calls on few numbers, which a GPU would start one by one.
