# SPDX-License-Identifier: Apache-2.0
"""The selection of BatchTopK over ranks: one threshold for the tokens and latents of all."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranks import Ranks

DIGIT = 11  # bits of a key that one exchange of counts settles
SCORE_BITS = 31  # of a positive float32


def winners(ranks: Ranks, values: Tensor, places: Tensor, count: int) -> Tensor:
    """Which of this rank's entries are among the `count` largest of all ranks: [E] bool.

    Args:
        values: [E] float32, of at least the `count` best of this rank. Those that are not positive
            nor NaN are not chosen: they are 0 in a code.
        places: [E] int64, different on all ranks: on equal values the smaller one is chosen.

    Waits for the device.
    """
    bits = values.view(torch.int32).long()
    keys = torch.where(values > 0, bits, -1)
    keys = torch.where(values.isnan(), 2**SCORE_BITS - 1, keys)
    last, left = kth_largest(ranks, keys, count, SCORE_BITS)
    level = keys == last
    (ties,) = ranks.totals([level.sum()])
    if int(ties) <= left:
        return keys >= max(last, 0)
    first = torch.where(level, 2**62 - 1 - places, -1)
    least, _ = kth_largest(ranks, first, left, 62)
    return (keys > last) | (first >= max(least, 0))


def kth_largest(ranks: Ranks, keys: Tensor, k: int, bits: int) -> tuple[int, int]:
    """The k-th largest of the keys [E] of all ranks that are >= 0, and how many as large as it are
    among the k largest; 0 and k where there are fewer. Keys are below 2^bits.

    From the top, counts of each value of a digit say in which the k-th lies.
    """
    keys = keys[keys >= 0]
    found, size = 0, 1 << DIGIT
    for shift in range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        counts = torch.bincount((keys >> shift) & (size - 1), minlength=size)
        (counts,) = ranks.totals([counts])
        above = counts.flip(0).cumsum(0)  # of the largest, the two largest, ... values
        if int(above[-1]) < k:
            return 0, k  # seen at the first digit
        at = int((above < k).sum())
        k -= int(above[at - 1]) if at else 0
        digit = size - 1 - at
        found = (found << DIGIT) | digit
        keys = keys[(keys >> shift) & (size - 1) == digit]
    return found, k
