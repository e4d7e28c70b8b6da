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


def _sums(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, columns]
    group: Tensor,  # [N, k]
    P: int,
) -> Tensor:
    """Of the entries of each group: [P, N, columns], accumulated."""
    acc, N = accumulator(values.dtype), values.shape[0]
    out = torch.zeros(P * N, W_dec.shape[1], dtype=acc, device=W_dec.device)
    token = torch.arange(N, device=indices.device)
    for v, i, g in zip(values.unbind(1), indices.unbind(1), group.unbind(1), strict=True):
        out.index_add_(0, g * N + token, _scaled(v.to(acc), W_dec[i].to(acc)))
    return out.view(P, N, W_dec.shape[1])


def _errors(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    widths: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    """Columns [start, stop) of reconstruction - target of each prefix: [P, N, stop - start]."""
    group = torch.bucketize(indices.long(), widths, right=True)
    recon = _sums(values, indices, W_dec[:, start:stop], group, len(widths)).cumsum(0)
    if b_dec is not None:
        recon = recon + b_dec[start:stop]
    return recon - target[:, start:stop]


def _from_each_on(errors: Tensor, shares: Tensor) -> Tensor:
    """Row m of [P, ...]: sum over h >= m of shares[h] * errors[h]."""
    return (shares[:, None, None] * errors).flip(0).cumsum(0).flip(0)


def prefix_residual(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    widths: Tensor,  # [P] int64
    shares: Tensor,  # [P] float32: of each prefix's square in the loss
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """For loss = sum over prefixes of shares |e|^2 / 2, where e is reconstruction minus target.

    Returns the first columns of dloss/drecon of each group's entries, which is the sum of shares *
    e over the prefixes that have them [P, N, columns] float32; the row sums of squares of e [P, N]
    float64; the gradient of the values [N, k] float32: the product of an entry's row of W_dec with
    the residual of its group, 0 where the value is 0. The gradient of b_dec is that of group 0.
    """
    N, d = target.shape
    errors = _errors(values, indices, W_dec, b_dec, target, widths, 0, d)
    residual = _from_each_on(errors, shares)
    group = torch.bucketize(indices.long(), widths, right=True)
    token = torch.arange(N, device=indices.device)
    grads = torch.empty(indices.shape, dtype=residual.dtype, device=residual.device)
    for j, (i, g) in enumerate(zip(indices.unbind(1), group.unbind(1), strict=True)):
        grads[:, j] = (residual[g, token] * W_dec[i].to(residual.dtype)).sum(1)
    grads = torch.where(values == 0, 0, grads)
    return residual[:, :, :columns].contiguous(), errors.double().square().sum(2), grads


def prefix_residual_slice(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    widths: Tensor,  # [P] int64
    shares: Tensor,  # [P] float32
    start: int,
    stop: int,
) -> Tensor:
    """Columns [start, stop) of the residual of `prefix_residual`: [P, N, stop - start] float32."""
    errors = _errors(values, indices, W_dec, b_dec, target, widths, start, stop)
    return _from_each_on(errors, shares)
