# SPDX-License-Identifier: Apache-2.0
"""What a step of a coder spread over ranks costs a rank, by formula; tests count the bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of a step: R ranks with n tokens each, an SAE of width d and F latents, k active a token.

    itemsize: bytes of an element of the weights, 4 or 2.
    """

    R: int
    n: int
    d: int
    F: int
    k: int
    itemsize: int = 4


def bytes_sent(s: Sizes) -> dict[str, int]:
    """By a rank to the others, by the name of the exchange: a step without AuxK."""
    tokens = (s.R - 1) * s.n
    width = min(s.k, -(-s.F // s.R))  # candidates a token
    return {
        "rows": tokens * s.d * s.itemsize,
        "candidates": tokens * width * 8,
        "last keys": tokens * 8,
        "partial sums": tokens * s.d * 4,
        "residuals": tokens * s.d * 4,
        "sums": (s.R - 1) * (2 * s.d * 4 + 12),  # of b_dec, of centring, two counts
        "variance": (s.R - 1) * (s.d + 1) * 8,
        "squares": (s.R - 1) * 8,
        "agreement": (s.R - 1) * 8,
    }


def flops(s: Sizes) -> int:
    """Of the encoder product, of which every rank has its latents for the tokens of all."""
    return 2 * s.R * s.n * s.d * -(-s.F // s.R)


def state_bytes(s: Sizes) -> int:
    """Held by a rank: weights, moments and, of 16-bit weights, masters; counters."""
    element = s.itemsize + 8 + (4 if s.itemsize < 4 else 0)
    rows = -(-s.F // s.R)
    return rows * (2 * s.d + 1) * element + s.d * element + rows * 8


def update_bytes(s: Sizes) -> int:
    """Moved by the optimizer: weights, moments and masters of a rank, read and written once."""
    return 2 * state_bytes(s)


def working_bytes(s: Sizes) -> int:
    """Temporaries of a rank at the widest moment: tokens and residuals of all ranks, the partial
    sums as they are sent and received, the codes."""
    N = s.R * s.n
    rows = N * s.d * (s.itemsize + 4) + 2 * N * s.d * 4
    return rows + N * min(s.k, -(-s.F // s.R)) * (s.itemsize + 8 + 8 + 4 + 4)
