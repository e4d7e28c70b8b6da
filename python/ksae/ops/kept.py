# SPDX-License-Identifier: Apache-2.0
"""What may be kept beside the weights from one step to the next, so that an op need not make it."""

from __future__ import annotations

from torch import Tensor

from ..backends import serving


def keeps_bf16_copy(W_enc: Tensor, k: int, aux: bool = False) -> bool:
    """Whether `topk_encode` reads W_bf16 and norms for weights like W_enc [F, d], so that a copy
    is worth keeping.

    k: the selection of the call, by which its way is chosen; aux: of topk_encode_aux.
    """
    return serving.screens(W_enc, k, aux)


def bf16_copy(W_enc: Tensor) -> tuple[Tensor, Tensor]:
    """The arguments W_bf16 [F, d] and norms of `topk_encode`, of float32 weights W_enc [F, d]."""
    return serving.bf16_copy(W_enc)
