# SPDX-License-Identifier: Apache-2.0
"""Nearest latents by the direction of their rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ksae import functional

COSINES_AT_ONCE = 2**24


@torch.no_grad()
def nearest(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of each row [F, d] the n others with the largest cosine, largest first and on equal cosines
    the smaller index: [F, n] float32 cosines and [F, n] int64 indices; n at most F - 1. The F x F
    cosines are made in blocks of rows."""
    unit = nnf.normalize(rows.detach().float(), dim=1)
    n = min(n, len(unit) - 1)
    values, indices = [], []
    block = max(1, COSINES_AT_ONCE // len(unit))
    for begin in range(0, len(unit), block):
        cosines = unit[begin : begin + block] @ unit.T
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, own + begin] = -2  # below any cosine
        value, index = (
            functional.topk(cosines, n) if n > 0 else (cosines[:, :0], own[:, None][:, :0])
        )
        values.append(value.cpu())
        indices.append(index.cpu())
    return torch.cat(values), torch.cat(indices)
