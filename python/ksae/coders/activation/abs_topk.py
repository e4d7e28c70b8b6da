# SPDX-License-Identifier: Apache-2.0
"""AbsTopK: the k pre-activations of each token that are largest in size, of either sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import ops
from .base import Activation
from .topk import TopK

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclass(frozen=True)
class AbsTopK(TopK):
    """u, with its sign, at the k largest |u| of each token (as SAELens' abstopk). On equal |u| the
    smaller index wins.

    The k largest u and the k largest -u hold them all, so the encoder of TopK runs twice.

    Args:
        k: active latents a token, in [1, F].

    Raises:
        TypeError: k is no integer. What is out of range is refused by the coder.
    """

    select_aux = Activation.select_aux

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        W, b, c = coder.W_enc, coder.b_enc, coder.b_dec if coder.centred else None
        above, at = ops.topk_encode(rows, W, b, k, c, None, *W_bf16)
        below, at_below = ops.topk_encode(-rows, W, -b, k, None if c is None else -c, None, *W_bf16)
        values, indices = torch.cat([above, -below], 1), torch.cat([at, at_below], 1)  # [N, 2k]
        order = indices.argsort(dim=1, stable=True)
        size = values.detach().abs().gather(1, order)
        order = order.gather(1, size.argsort(dim=1, descending=True, stable=True)[:, :k])
        return values.gather(1, order), indices.gather(1, order)
