# SPDX-License-Identifier: Apache-2.0
"""The sparse encoder of BatchTopK: the largest pre-activations of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import accumulator
from .topk import _largest

__all__ = ["batch_topk_encode"]


def batch_topk_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    k: int,
    b_dec: Tensor | None = None,  # [d]
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU of the N*k largest pre-activations of all rows -> values [N*k] T, indices [N*k] int64,
    row_offsets [N+1] int64.

    No limit a row. Equal ones: the earlier row, then the smaller latent; NaN first. Entries of a
    row are in the order of latents.
    """
    (N, _), F, acc = x.shape, W_enc.shape[0], accumulator(x.dtype)
    xc = x if b_dec is None else x - b_dec  # rounded to T
    u = xc.to(acc) @ W_enc.to(acc).T + b_enc.to(acc)  # [N, F]
    flat = u.reshape(1, N * F)
    chosen = _largest(flat, N * k)[0].sort().values  # places n * F + i
    v = flat[0, chosen]
    row_offsets = torch.zeros(N + 1, dtype=torch.int64, device=x.device)
    row_offsets[1:] = torch.bincount(chosen // F, minlength=N).cumsum(0)
    return torch.where(v <= 0, 0, v).to(x.dtype), chosen % F, row_offsets
