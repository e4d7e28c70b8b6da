# SPDX-License-Identifier: Apache-2.0
"""Sums that the losses are made of, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import accumulator

LOSSES = ("fvu", "mse")


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """sum (recon - target)^2 over all elements, 0-d."""
    acc = accumulator(target.dtype)
    return (recon.to(acc) - target.to(acc)).square().sum()


def total_variance(y: Tensor) -> Tensor:
    """sum (y - mean over the batch of y)^2, 0-d: the denominator of the FVU, a constant. y [N, d].

    Centred before squaring: activations have dimensions whose mean is far larger than their spread.
    """
    acc = accumulator(y.dtype)
    y = y.detach()
    pieces = torch.split(y, 512)  # a training step has no room for a second [N, d]
    mean = torch.stack([rows.sum(0, dtype=acc) for rows in pieces]).sum(0) / len(y)  # [d]
    norms = torch.cat([torch.linalg.vector_norm(rows - mean, dim=1) for rows in pieces])  # [N]
    return norms.double().square().sum().to(acc)
