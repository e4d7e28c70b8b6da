# SPDX-License-Identifier: Apache-2.0
"""What a step of a coder spread over ranks costs a rank, by formula; tests count the bytes."""

from __future__ import annotations

from dataclasses import dataclass

SMALL = 1 << 14  # elements: a sum of fewer is made in one exchange instead of two
COUNTS = 3 * 2048 * 8  # of the digits of a threshold over all tokens


@dataclass(frozen=True)
class Sizes:
    """Of a step: R ranks with n tokens each, an SAE of width d and F latents, k active a token.

    itemsize: bytes of an element of the weights, 4 or 2. replicas: of the coder, each on R /
    replicas ranks. prefixes: Matryoshka's, at least 1. batch: BatchTopK selects. touched: latents
    of a rank with an entry in the batch; None: all.
    """

    R: int
    n: int
    d: int
    F: int
    k: int
    itemsize: int = 4
    replicas: int = 1
    prefixes: int = 1
    batch: bool = False
    touched: int | None = None

    @property
    def shards(self) -> int:
        """Ranks that share the latents."""
        return self.R // self.replicas

    @property
    def latents(self) -> int:
        """Of a rank, at most."""
        return -(-self.F // self.shards)


def bytes_sent(s: Sizes) -> dict[str, int]:
    """By a rank to the others, by the name of the exchange: a step without AuxK, that of a rank
    with the most latents."""
    S, D = s.shards, s.replicas
    tokens, table = (S - 1) * s.n, (S - 1) * s.n * s.prefixes
    width = min(s.k, s.latents)  # candidates a token
    sent = {
        "rows": tokens * s.d * s.itemsize,
        "candidates": 0 if s.batch else tokens * width * 8,
        "last keys": 0 if s.batch else tokens * 8,
        "partial sums": table * s.d * 4,
        "residuals": table * s.d * 4,
        "gradients": _gradients(s) if D > 1 else 0,
        # of b_dec, squares, a count; of dead latents, of centring
        "sums": (s.R - 1) * (s.d + 1 + s.prefixes + (s.prefixes > 1)) * 8
        + (S - 1) * (8 + 4 * s.d)
        + (s.R - 1) * (COUNTS + 8) * s.batch,
        "least values": (s.R - 1) * s.itemsize * s.batch,
        "variance": (s.R - 1) * (s.d + 2) * 8,
        "agreement": (s.R - 1) * 8,
    }
    return {name: size for name, size in sent.items() if size}


def _gradients(s: Sizes) -> int:
    """Sums over replicas: of the touched rows of both matrices, of two numbers a latent, of which
    latents fired and have entries."""
    touched = s.latents if s.touched is None else s.touched
    matrices = 2 * _summed(touched * s.d, 4, s.replicas)
    return matrices + _summed(2 * s.latents, 4, s.replicas) + _summed(2 * s.latents, 2, s.replicas)


def _summed(elements: int, itemsize: int, ranks: int) -> int:
    """Of a sum over ranks: of few elements all are sent to all, of more a part to each, and its sum
    to all."""
    if elements <= SMALL:
        return (ranks - 1) * elements * itemsize
    return 2 * (ranks - 1) * -(-elements // ranks) * itemsize


def flops(s: Sizes) -> int:
    """Of the encoder product: a rank has its latents for the tokens of its replica."""
    return 2 * s.shards * s.n * s.d * s.latents


def state_bytes(s: Sizes) -> int:
    """Held by a rank: weights, moments and, of 16-bit weights, masters; counters."""
    element = s.itemsize + 8 + (4 if s.itemsize < 4 else 0)
    rows = s.latents
    return rows * (2 * s.d + 1) * element + s.d * element + rows * 8


def update_bytes(s: Sizes) -> int:
    """Moved by the optimizer: weights, moments and masters of a rank, read and written once."""
    return 2 * state_bytes(s)


def working_bytes(s: Sizes) -> int:
    """Temporaries of a rank at the widest moment: tokens and residuals of the ranks that share its
    latents, the partial sums as they are received, the codes. Partial sums are sent from where the
    residuals come to lie."""
    N = s.shards * s.n
    rows = N * s.d * (s.itemsize + 2 * 4 * s.prefixes)
    gradients = 2 * s.latents * s.d * 4 if s.replicas > 1 else 0
    return rows + gradients + N * min(s.k, s.latents) * (s.itemsize + 8 + 8 + 4 + 4)
