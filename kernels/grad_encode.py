# SPDX-License-Identifier: Apache-2.0
"""Gradient-aware encode: two products in one tile, scored and gated in the epilogue."""

from __future__ import annotations

from torch import Tensor


def grad_topk_encode(
    x: Tensor,  # [N, d_in]
    grad: Tensor,  # [N, d_out]
    W_enc: Tensor,  # [F, d_in]
    b_enc: Tensor,  # [F]
    W_dec: Tensor,  # [F, d_out]
    k: int,
    beta: float,
    mode: str = "additive",
    b_dec: Tensor | None = None,  # [d_in]
) -> tuple[Tensor, Tensor]:
    """The k largest scores a row -> values [N, k] T, indices [N, k] int64."""
    raise NotImplementedError
