# SPDX-License-Identifier: Apache-2.0
"""JumpReLU's thresholds in the fused step: the penalty and the gradient of log_threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..coders.activation import JumpReLU
from ..coders.code import Code, by_row
from ..coders.coder import SparseCoder


def penalty_and_gradient(
    model: SparseCoder,
    code: Code,
    residual: Tensor,
    grads: Tensor,
    row_of: Tensor,
    scale: Tensor,
    active: Tensor,
    N: int,
) -> tuple[Tensor, Tensor]:
    """The penalty [], and the gradient of log_threshold [F] of loss and penalty.

    Args:
        code: of a training batch, entries below their threshold with value 0.
        residual: [rows, d_out]; row_of: the row of each entry, [E].
        grads: of the values that are not 0, before `scale`, [E].
        active, N: how many values of the whole batch are not 0, [], and its tokens.
    """
    activation = model.activation
    assert isinstance(activation, JumpReLU)
    theta = activation.thresholds(model)  # [F]
    at = theta[code.indices]
    penalty, slope = activation.weigh(active.to(theta.dtype) / max(N, 1))
    near = activation.in_band(code.values, at)
    below = (code.values == 0).nonzero()[:, 0]
    full = grads.clone()
    full[below] = _products(residual, row_of[below], code.indices[below], model.W_dec)
    each = -(at * scale * full + slope / max(N, 1)) / activation.bandwidth
    gradient = torch.zeros_like(theta).index_add_(0, code.indices, torch.where(near, each, 0))
    return penalty, gradient * theta


def _products(residual: Tensor, rows: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """<residual[row], W_dec[index]> of entries in any order: [E]."""
    order, offsets = by_row(rows, len(residual))
    products = ops.sparse_decode_backward_values(residual, indices[order, None], W_dec, offsets)
    out = torch.empty_like(products[:, 0])
    out[order] = products[:, 0]
    return out
