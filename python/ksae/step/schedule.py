# SPDX-License-Identifier: Apache-2.0
"""Learning rate, k and penalty as pure functions of the step, so that a resumed run needs no state
for them."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, lr: float, steps: int, warmup: int = 0, decay: float = 0.0, shape: str = "linear"
) -> float:
    """Rate of step `step` (0-based) of `steps`: linear warm-up, constant, decay to 0 at the end.

    Args:
        lr: the rate between warm-up and decay.
        warmup: steps of warm-up; step t has (t + 1) / warmup of the rate.
        decay: share of the steps, at the end, over which the rate falls.
        shape: of the fall, "linear" or "cosine".

    Returns:
        The rate, above 0 at every step: the decay reaches 0 one step after the last.

    >>> [round(learning_rate(t, lr=1.0, steps=8, warmup=2, decay=0.375), 2) for t in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = min(1.0, (steps - step) / (round(decay * steps) + 1))
    if shape == "linear":
        fall = left
    elif shape == "cosine":
        fall = 0.5 * (1.0 - math.cos(math.pi * left))
    else:
        raise ValueError(f"learning_rate: shape must be 'linear' or 'cosine', got {shape!r}")
    return lr * rise * fall


def annealed_k(step: int, *, k: int, start: int, steps: int) -> int:
    """k of step `step` (0-based): from `start` at step 0 in a straight line to k at step `steps`
    and after it, rounded towards `start`.

    >>> [annealed_k(t, k=4, start=16, steps=5) for t in range(7)]
    [16, 14, 12, 9, 7, 4, 4]
    """
    if step >= steps:
        return k
    return start + math.trunc((k - start) * step / steps)


def penalty_share(step: int, *, warmup: int) -> float:
    """The share of a penalty that step `step` (0-based) has: linear warm-up, as of the rate."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
