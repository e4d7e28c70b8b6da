# SPDX-License-Identifier: Apache-2.0
"""The sparse decoder, its gradients, and the residual."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import accumulator
from .encode import _scaled


def _decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Unrounded sum over j of values[:, j] * W_dec[indices[:, j]]: [N, d], accumulated."""
    acc = accumulator(values.dtype)
    out = torch.zeros(values.shape[0], W_dec.shape[1], dtype=acc, device=W_dec.device)
    for v, i in zip(values.unbind(1), indices.unbind(1), strict=True):
        out += _scaled(v.to(acc), W_dec[i].to(acc))
    return out


def sparse_decode(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k] int64 or int32
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None = None,  # [d]
) -> Tensor:
    """Weighted sum of decoder rows, plus the bias -> [N, d] T."""
    out = _decode(values, indices, W_dec)
    if b_dec is not None:
        out += b_dec
    return out.to(values.dtype)


def sparse_decode_backward_values(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """<grad[n], W_dec[indices[n, j]]> of grad [N, d], indices [N, k], W_dec [F, d] -> [N, k] T."""
    acc = accumulator(grad.dtype)
    g = grad.to(acc)
    out = torch.empty(indices.shape, dtype=grad.dtype, device=grad.device)
    for j, i in enumerate(indices.unbind(1)):
        out[:, j] = (g * W_dec[i].to(acc)).sum(1)
    return out


def sparse_decode_backward_weight(
    grad: Tensor,  # [N, d]
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    F: int,
) -> tuple[Tensor, Tensor]:
    """Sum of value * grad[n], and of value, over the entries of a latent -> [F, d], [F] T."""
    acc = accumulator(grad.dtype)
    g, v = grad.to(acc), values.to(acc)
    grad_W = torch.zeros(F, grad.shape[1], dtype=acc, device=grad.device)
    value_sum = torch.zeros(F, dtype=acc, device=grad.device)
    for v_j, i in zip(v.unbind(1), indices.unbind(1), strict=True):
        grad_W.index_add_(0, i, _scaled(v_j, g))
        value_sum.index_add_(0, i, v_j)
    return grad_W.to(grad.dtype), value_sum.to(grad.dtype)


def sparse_residual(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    columns: int,
    column_sums: Tensor | None = None,  # [d] float32, written: sum of the residual over the tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual, reconstruction minus target, not rounded to T.

    Returns its first columns [N, columns] float32, its row sums of squares [N] float64, and its
    products with the chosen rows of W_dec [N, k] float32, which are the gradient of the values
    before scaling (0 where the value is 0).
    """
    acc = accumulator(values.dtype)
    residual = sparse_residual_slice(values, indices, W_dec, b_dec, target, 0, W_dec.shape[1])
    grads = sparse_decode_backward_values(residual, indices, W_dec.to(acc))
    grads = torch.where(values == 0, 0, grads)
    if column_sums is not None:
        column_sums.copy_(residual.sum(0))
    return residual[:, :columns].contiguous(), residual.double().square().sum(1), grads


def sparse_residual_slice(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    start: int,
    stop: int,
) -> Tensor:
    """Columns [start, stop) of the residual of `sparse_residual`: [N, stop - start] float32."""
    recon = _decode(values, indices, W_dec[:, start:stop])
    if b_dec is not None:
        recon = recon + b_dec[start:stop]
    return recon - target[:, start:stop]
