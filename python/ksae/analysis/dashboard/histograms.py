# SPDX-License-Identifier: Apache-2.0
"""Histograms of each latent's activations, whose range grows with the largest one seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS = 64
UNSET = np.iinfo(np.int32).min


class Histograms:
    """BINS bins of equal width over [0, 2^e) for each latent, 2^e the smallest power of two above
    its largest activation. Counts are exact and do not depend on how the stream is split: a range
    that doubles joins bins in pairs."""

    def __init__(self, F: int) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros((F, BINS), np.int64)
        self.exponent: npt.NDArray[np.int32] = np.full(F, UNSET, np.int32)

    def add(self, latent: npt.NDArray[np.int64], value: npt.NDArray[np.float32]) -> None:
        """Count activations [E] above 0 of latents [E], sorted by latent."""
        if len(latent) == 0:
            return
        starts = np.flatnonzero(np.concatenate([[True], latent[1:] != latent[:-1]]))
        rows = latent[starts]
        exponent = np.frexp(np.maximum.reduceat(value, starts))[1].astype(np.int32)
        grow = np.where(self.exponent[rows] == UNSET, 0, exponent - self.exponent[rows])
        while (wider := rows[grow > 0]).size:
            pairs = self.counts[wider].reshape(-1, BINS // 2, 2).sum(2)
            self.counts[wider, : BINS // 2], self.counts[wider, BINS // 2 :] = pairs, 0
            grow -= 1
        self.exponent[rows] = np.maximum(self.exponent[rows], exponent)
        scaled = np.ldexp(value.astype(np.float64), 6 - self.exponent[latent])  # 2^6 = BINS
        bins = np.minimum(scaled.astype(np.int64), BINS - 1)
        np.add.at(self.counts, (latent, bins), 1)

    def of(self, latent: int) -> tuple[float, list[int]]:
        """Width of a bin, and the counts up to the last bin that has any; (0, []) if none fired."""
        counts = self.counts[latent]
        used = np.flatnonzero(counts)
        if len(used) == 0:
            return 0.0, []
        width = float(np.ldexp(1.0, int(self.exponent[latent]) - 6))
        return width, counts[: used[-1] + 1].tolist()
