# SPDX-License-Identifier: Apache-2.0
"""Certified screening: the float32 encode at the speed of a bf16 product."""

from __future__ import annotations

from torch import Tensor


def screened_topk_encode(
    x: Tensor,  # [N, d] float32
    W_enc: Tensor,  # [F, d] float32
    b_enc: Tensor,  # [F] float32
    k: int,
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of float32 weights -> values [N, k], indices [N, k] int64."""
    raise NotImplementedError
