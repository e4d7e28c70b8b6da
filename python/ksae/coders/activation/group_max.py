# SPDX-License-Identifier: Apache-2.0
"""GroupMax: the largest pre-activation of each of k groups of latents (as sparsify's groupmax)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ... import ops
from .base import Activation
from .topk import TopK

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclass(frozen=True)
class GroupMax(TopK):
    """relu(u) at the largest pre-activation u of each of the k groups of F / k latents that follow
    each other. Of equal ones the smaller index wins.

    Args:
        k: groups, in [1, F], a divisor of F.

    Raises:
        TypeError: k is no integer. What is out of range is refused by the coder.
    """

    other_k: ClassVar[bool] = False
    reads_copy: ClassVar[bool] = False
    select_aux = Activation.select_aux

    def check(self, owner: str, F: int) -> None:
        super().check(owner, F)
        if F % self.k:
            raise ValueError(f"{owner}: k must divide {F}, the number of latents, got {self.k}")

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        b_dec = coder.b_dec if coder.centred else None
        size = coder.d_sae // k
        groups = zip(*(torch.split(t, size) for t in (coder.W_enc, coder.b_enc)), strict=True)
        best = [ops.topk_encode(rows, W, b, 1, b_dec) for W, b in groups]
        values = torch.cat([v for v, _ in best], 1)
        indices = torch.cat([i + g * size for g, (_, i) in enumerate(best)], 1)
        order = values.detach().argsort(dim=1, descending=True, stable=True)
        return values.gather(1, order), indices.gather(1, order)
