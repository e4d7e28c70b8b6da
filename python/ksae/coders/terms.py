# SPDX-License-Identifier: Apache-2.0
"""Sums that the losses are made of, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..ops import accumulator

LOSSES = ("fvu", "mse")


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """sum (recon - target)^2 over all elements, 0-d."""
    acc = accumulator(target.dtype)
    return (recon.to(acc) - target.to(acc)).square().sum()


def total_variance(y: Tensor) -> Tensor:  # [N, d] -> []
    """sum (y - mean over the batch of y)^2, 0-d: the denominator of the FVU, a constant."""
    variance: Tensor = ops.total_variance(y.detach())
    return variance
