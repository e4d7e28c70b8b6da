# SPDX-License-Identifier: Apache-2.0
"""Codes with row offsets: a variable number of active latents a row, in plain torch.

Such a code is values [E], latents [E] and row_offsets [N+1] int64: row n has entries
row_offsets[n] to row_offsets[n+1] - 1. A code of k entries a row is the case row_offsets =
k * arange(N+1). Entries of value 0 contribute nothing and pass no gradient.

What does not ask for an entry's row is the op of k entries a row, called with N = E and k = 1:
`group_by_latent(values[:, None], latents[:, None], F)` and `latent_sums` of its results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtypes import accumulator


def rows_of(row_offsets: Tensor) -> Tensor:
    """The row of each entry: [E] int32."""
    counts = row_offsets.diff()
    rows = torch.arange(counts.numel(), dtype=torch.int32, device=row_offsets.device)
    return torch.repeat_interleave(rows, counts)


def threshold_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    theta: Tensor | float,  # [F] or one for all: positive
    b_dec: Tensor | None = None,  # [d]
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations above their latent's threshold -> values [E] T, latents [E] int64, [N+1].

    u = (x - b_dec) @ W_enc.T + b_enc in the accumulator's type is compared before it is rounded to
    T; x - b_dec is rounded to T. Entries of a row are in the order of latents. NaN is not above.
    """
    acc = accumulator(x.dtype)
    xc = x if b_dec is None else x - b_dec
    u = xc.to(acc) @ W_enc.to(acc).T + b_enc.to(acc)  # [N, F]
    chosen = u > torch.as_tensor(theta, dtype=acc, device=x.device)
    row_offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    row_offsets[1:] = chosen.sum(1).cumsum(0)
    return u[chosen].to(x.dtype), chosen.nonzero()[:, 1], row_offsets


def _decode(values: Tensor, latents: Tensor, row_offsets: Tensor, W_dec: Tensor) -> Tensor:
    acc = accumulator(values.dtype)
    product = values.to(acc)[:, None] * W_dec[latents].to(acc)
    product = torch.where(values[:, None] == 0, 0, product)  # whatever the row of W_dec holds
    out = torch.zeros(row_offsets.numel() - 1, W_dec.shape[1], dtype=acc, device=values.device)
    return out.index_add_(0, rows_of(row_offsets), product)


def sparse_decode(
    values: Tensor,  # [E]
    latents: Tensor,  # [E]
    row_offsets: Tensor,  # [N+1]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None = None,  # [d]
    *,
    partial: bool = False,
) -> Tensor:
    """Weighted sum of decoder rows, plus the bias -> [N, d] T; `partial`: not rounded to T.

    Partial sums of shards of the latents are added, b_dec in one of them; less the target, the sum
    is the residual of all, of which `sparse_decode_backward_values` takes each shard's products.
    """
    out = _decode(values, latents, row_offsets, W_dec)
    if b_dec is not None:
        out = out + b_dec
    return out if partial else out.to(values.dtype)


def sparse_residual(
    values: Tensor,  # [E]
    latents: Tensor,  # [E]
    row_offsets: Tensor,  # [N+1]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual [N, d], its row sums of squares [N] float64, its products with rows of W_dec [E].

    The residual, reconstruction minus target, is not rounded to T; products are of the chosen rows,
    0 where the value is 0.
    """
    residual = sparse_decode(values, latents, row_offsets, W_dec, b_dec, partial=True) - target
    grads = sparse_decode_backward_values(residual, latents, row_offsets, W_dec)
    return residual, residual.double().square().sum(1), torch.where(values == 0, 0, grads)


def sparse_decode_backward_values(
    grad: Tensor,  # [N, d] T or the accumulator's type
    latents: Tensor,  # [E]
    row_offsets: Tensor,  # [N+1]
    W_dec: Tensor,  # [F, d]
) -> Tensor:
    """<grad[n], W_dec[latent]> of each entry of row n: [E] of grad's type."""
    acc = accumulator(W_dec.dtype)
    rows = grad.to(acc)[rows_of(row_offsets)]
    return (rows * W_dec[latents].to(acc)).sum(1).to(grad.dtype)


def sparse_decode_backward_weight(
    grad: Tensor,  # [N, d]
    values: Tensor,  # [E]
    latents: Tensor,  # [E]
    row_offsets: Tensor,  # [N+1]
    F: int,
) -> tuple[Tensor, Tensor]:
    """Sum of value * grad[n], and of value, over the entries of a latent -> [F, d], [F] T."""
    acc = accumulator(grad.dtype)
    product = values.to(acc)[:, None] * grad.to(acc)[rows_of(row_offsets)]
    product = torch.where(values[:, None] == 0, 0, product)
    grad_W = torch.zeros(F, grad.shape[1], dtype=acc, device=grad.device)
    value_sum = torch.zeros(F, dtype=acc, device=grad.device)
    grad_W.index_add_(0, latents, product)
    return grad_W.to(grad.dtype), value_sum.index_add_(0, latents, values.to(acc)).to(grad.dtype)


def by_entry(tables: Sequence[Tensor], row_offsets: Sequence[Tensor]) -> list[Tensor]:
    """A row of its table for each entry: [E, columns], from [N, columns].

    With these, `row_update` and `row_grad_sq` of codes with row offsets are those of E rows of one
    entry each: their meaning, though kernels read rows where they lie.
    """
    return [rows[rows_of(o)] for rows, o in zip(tables, row_offsets, strict=True)]
