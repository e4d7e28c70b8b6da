# SPDX-License-Identifier: Apache-2.0
"""Selection of the k largest of each row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["topk"]


def _largest(score: Tensor, k: int) -> Tensor:
    """Positions [N, k] int64 of the k first columns of `score` [N, F] in the order of selection."""
    key = torch.where(
        score.isnan(), torch.nan, score + 0.0
    )  # one NaN, one zero; sort puts NaN first
    return key.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row. x [N, F] -> values [N, k] T, indices [N, k] int64."""
    indices = _largest(x, k)
    return x.gather(1, indices), indices
