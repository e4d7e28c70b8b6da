# SPDX-License-Identifier: Apache-2.0
"""The order of selection as integers: one key for each candidate, no two the same."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = -(2**63)  # below every key


def keys_of(scores: Tensor, latents: Tensor) -> Tensor:
    """Keys of scores float32 and latents in [0, 2^32), of the same shape -> int64.

    A larger key is chosen first: NaN, then the larger score, -0 being +0; then the smaller latent.
    """
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers the other way round
    ordered = torch.where(scores.isnan(), 0x7FFFFFFF, ordered)
    return (ordered.long() << 32) | (0xFFFFFFFF - latents)
