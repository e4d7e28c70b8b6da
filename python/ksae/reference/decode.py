# SPDX-License-Identifier: Apache-2.0
"""The sparse decoder, its gradients, and the residual.

A code is values and indices [N, k], or [E, 1] with row_offsets [N+1] int64: token n has the entries
row_offsets[n] to row_offsets[n+1] - 1. Below, E is N where there are no row offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import accumulator
from .encode import _scaled
from .group import rows_of

__all__ = [
    "sparse_decode",
    "sparse_decode_backward_values",
    "sparse_decode_backward_weight",
    "sparse_residual",
    "sparse_residual_slice",
]


def _decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, row_offsets: Tensor | None = None
) -> Tensor:
    """Unrounded sum over a token's entries of value * W_dec[index]: [N, d], accumulated."""
    acc = accumulator(values.dtype)
    N = values.shape[0] if row_offsets is None else row_offsets.numel() - 1
    out = torch.zeros(N, W_dec.shape[1], dtype=acc, device=W_dec.device)
    if row_offsets is not None:
        v, i = values.squeeze(1), indices.squeeze(1)
        products = _scaled(v.to(acc), W_dec[i].to(acc))
        return out.index_add_(0, rows_of(row_offsets, len(v)), products)
    for v, i in zip(values.unbind(1), indices.unbind(1), strict=True):
        out += _scaled(v.to(acc), W_dec[i].to(acc))
    return out


def _by_entry(rows: Tensor, row_offsets: Tensor | None, E: int) -> Tensor:
    """The row of each entry [E, d] of rows [N, d]: with it an entry is a token of one entry."""
    return rows if row_offsets is None else rows[rows_of(row_offsets, E)]


def sparse_decode(
    values: Tensor,  # [E, k]
    indices: Tensor,  # [E, k] int64 or int32
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None = None,  # [d]
    row_offsets: Tensor | None = None,  # [N+1] int64, with k = 1
    partial: bool = False,
) -> Tensor:
    """Weighted sum of decoder rows, plus the bias -> [N, d] T; `partial`: not rounded to T.

    Partial sums of shards of the latents are added, b_dec in one of them; less the target, the sum
    is the residual of all, of which `sparse_decode_backward_values` takes each shard's products.
    """
    out = _decode(values, indices, W_dec, row_offsets)
    if b_dec is not None:
        out += b_dec
    return out if partial else out.to(values.dtype)


def sparse_decode_backward_values(
    grad: Tensor,  # [N, d] T or the accumulator's type
    indices: Tensor,  # [E, k]
    W_dec: Tensor,  # [F, d]
    row_offsets: Tensor | None = None,  # [N+1]
) -> Tensor:
    """<grad[n], W_dec[index]> of each entry of token n -> [E, k] of grad's type."""
    acc = accumulator(grad.dtype)
    g = _by_entry(grad.to(acc), row_offsets, len(indices))
    out = torch.empty(indices.shape, dtype=grad.dtype, device=grad.device)
    for j, i in enumerate(indices.unbind(1)):
        out[:, j] = (g * W_dec[i].to(acc)).sum(1)
    return out


def sparse_decode_backward_weight(
    grad: Tensor,  # [N, d]
    values: Tensor,  # [E, k]
    indices: Tensor,  # [E, k]
    F: int,
    row_offsets: Tensor | None = None,  # [N+1]
) -> tuple[Tensor, Tensor]:
    """Sum of value * grad[n], and of value, over the entries of a latent -> [F, d], [F] T."""
    acc = accumulator(grad.dtype)
    g, v = _by_entry(grad.to(acc), row_offsets, len(values)), values.to(acc)
    grad_W = torch.zeros(F, grad.shape[1], dtype=acc, device=grad.device)
    value_sum = torch.zeros(F, dtype=acc, device=grad.device)
    for v_j, i in zip(v.unbind(1), indices.unbind(1), strict=True):
        grad_W.index_add_(0, i, _scaled(v_j, g))
        value_sum.index_add_(0, i, v_j)
    return grad_W.to(grad.dtype), value_sum.to(grad.dtype)


def sparse_residual(
    values: Tensor,  # [E, k]
    indices: Tensor,  # [E, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    columns: int,
    column_sums: Tensor | None = None,  # [d] float32, written: sum of the residual over the tokens
    row_offsets: Tensor | None = None,  # [N+1]
    rounded: Tensor | None = None,  # [N, d] T, written: the residual, rounded
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual, reconstruction minus target, not rounded to T.

    Returns its first columns [N, columns] float32, its row sums of squares [N] float64, and its
    products with the chosen rows of W_dec [E, k] float32, which are the gradient of the values
    before scaling (0 where the value is 0).
    """
    acc = accumulator(values.dtype)
    of_all = (target, 0, W_dec.shape[1], row_offsets)
    residual = sparse_residual_slice(values, indices, W_dec, b_dec, *of_all)
    grads = sparse_decode_backward_values(residual, indices, W_dec.to(acc), row_offsets)
    grads = torch.where(values == 0, 0, grads)
    if column_sums is not None:
        column_sums.copy_(residual.sum(0))
    if rounded is not None:
        rounded.copy_(residual)
    return residual[:, :columns].contiguous(), residual.double().square().sum(1), grads


def sparse_residual_slice(
    values: Tensor,  # [E, k]
    indices: Tensor,  # [E, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    start: int,
    stop: int,
    row_offsets: Tensor | None = None,  # [N+1]
) -> Tensor:
    """Columns [start, stop) of the residual of `sparse_residual`: [N, stop - start] float32."""
    recon = _decode(values, indices, W_dec[:, start:stop], row_offsets)
    if b_dec is not None:
        recon = recon + b_dec[start:stop]
    return recon - target[:, start:stop]
