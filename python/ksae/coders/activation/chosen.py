# SPDX-License-Identifier: Apache-2.0
"""The pre-activations of latents that were chosen by something else than their value alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import ops
from ...ops import accumulator

if TYPE_CHECKING:
    from ..coder import SparseCoder


def pre_activations(coder: SparseCoder, rows: Tensor, indices: Tensor) -> Tensor:
    """u [N, k] of rows [N, d_in] at indices [N, k], accumulated and rounded once; differentiable in
    rows, W_enc, b_enc and b_dec."""
    kind = rows.dtype
    centred = rows - coder.b_dec if coder.centred else rows
    bias = coder.b_enc[indices]
    if torch.is_grad_enabled():
        products: Tensor = ops.sparse_decode_backward_values(centred, indices, coder.W_enc)
        return products + bias
    wide = centred.to(accumulator(kind))
    products = ops.sparse_decode_backward_values(wide, indices, coder.W_enc)
    return (products + bias).to(kind)
