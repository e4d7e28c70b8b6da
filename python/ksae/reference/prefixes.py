# SPDX-License-Identifier: Apache-2.0
"""Residuals of the reconstructions by the first latents alone (Matryoshka, arXiv 2503.17547).

Prefix m is of the latents below widths[m]; widths ascend and end at F. Group m is of the latents
that prefix m has and prefix m - 1 has not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import accumulator
from .encode import _scaled
from .group import rows_of

__all__ = ["prefix_residual", "prefix_residual_slice"]


def prefix_of(indices: Tensor, widths: Tensor) -> Tensor:
    """The group of each latent, of the shape of indices, int64."""
    return torch.bucketize(indices.long(), widths, right=True)


def _row_of(group: Tensor, N: int, row_offsets: Tensor | None) -> Tensor:
    """The row of each entry in a table [P * N, ...] in which each group has N rows: [E, k]."""
    if row_offsets is not None:
        return group * N + rows_of(row_offsets, len(group))[:, None]
    return group * N + torch.arange(N, device=group.device)[:, None]


def _errors(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    widths: Tensor,
    start: int,
    stop: int,
    row_of: Tensor,
) -> Tensor:
    """Columns [start, stop) of reconstruction - target of each prefix: [P, N, stop - start]."""
    acc, P, N = accumulator(values.dtype), len(widths), len(target)
    sums = torch.zeros(P * N, stop - start, dtype=acc, device=W_dec.device)
    for v, i, row in zip(values.unbind(1), indices.unbind(1), row_of.unbind(1), strict=True):
        sums.index_add_(0, row, _scaled(v.to(acc), W_dec[i, start:stop].to(acc)))
    recon = sums.view(P, N, stop - start).cumsum(0)
    if b_dec is not None:
        recon = recon + b_dec[start:stop]
    return recon - target[:, start:stop]


def _from_each_on(errors: Tensor, shares: Tensor) -> Tensor:
    """Row m of [P, ...]: sum over h >= m of shares[h] * errors[h]."""
    return (shares[:, None, None] * errors).flip(0).cumsum(0).flip(0)


def prefix_residual(
    values: Tensor,  # [E, k]
    indices: Tensor,  # [E, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    widths: Tensor,  # [P] int64
    shares: Tensor,  # [P] float32: of each prefix's square in the loss
    columns: int,
    row_offsets: Tensor | None = None,  # [N+1]
) -> tuple[Tensor, Tensor, Tensor]:
    """For loss = sum over prefixes of shares |e|^2 / 2, where e is reconstruction minus target.

    Returns the first columns of dloss/drecon of each group's entries, which is the sum of shares *
    e over the prefixes that have them [P, N, columns] float32; the row sums of squares of e [P, N]
    float64; the gradient of the values [E, k] float32: the product of an entry's row of W_dec with
    the residual of its group, 0 where the value is 0. The gradient of b_dec is that of group 0.
    """
    N, d = target.shape
    row_of = _row_of(prefix_of(indices, widths), N, row_offsets)
    errors = _errors(values, indices, W_dec, b_dec, target, widths, 0, d, row_of)
    residual = _from_each_on(errors, shares)
    rows = residual.view(-1, d)
    grads = torch.empty(indices.shape, dtype=rows.dtype, device=rows.device)
    for j, (i, row) in enumerate(zip(indices.unbind(1), row_of.unbind(1), strict=True)):
        grads[:, j] = (rows[row] * W_dec[i].to(rows.dtype)).sum(1)
    grads = torch.where(values == 0, 0, grads)
    return residual[:, :, :columns].contiguous(), errors.double().square().sum(2), grads


def prefix_residual_slice(
    values: Tensor,  # [E, k]
    indices: Tensor,  # [E, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    widths: Tensor,  # [P] int64
    shares: Tensor,  # [P] float32
    start: int,
    stop: int,
    row_offsets: Tensor | None = None,  # [N+1]
) -> Tensor:
    """Columns [start, stop) of the residual of `prefix_residual`: [P, N, stop - start] float32."""
    row_of = _row_of(prefix_of(indices, widths), len(target), row_offsets)
    errors = _errors(values, indices, W_dec, b_dec, target, widths, start, stop, row_of)
    return _from_each_on(errors, shares)
