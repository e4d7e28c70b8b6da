# SPDX-License-Identifier: Apache-2.0
"""Learning rate as a pure function of the step, so that a resumed run needs no state for it."""

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
