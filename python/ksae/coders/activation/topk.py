# SPDX-License-Identifier: Apache-2.0
"""TopK: the k largest pre-activations of each token (arXiv 2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ... import functional, ops
from ..config import integer
from .base import Activation

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclass(frozen=True)
class TopK(Activation):
    """relu(u) at the k largest pre-activations u of each token.

    Args:
        k: active latents a token, in [1, F].

    Raises:
        TypeError: k is no integer. What is out of range is refused by the coder.
    """

    k: int

    reads_copy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "k", integer(name, "k", self.k))

    def check(self, owner: str, F: int) -> None:
        if not 1 <= self.k <= F:
            raise ValueError(f"{owner}: k must be in [1, {F}], the number of latents, got {self.k}")

    def scheduled(self, k: int | None, penalty: float) -> TopK:
        return self if k is None else replace(self, k=k)

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        b_dec = coder.b_dec if coder.centred else None
        if not W_bf16:
            return functional.topk_encode(rows, coder.W_enc, coder.b_enc, k, b_dec)
        values, indices = ops.topk_encode(rows, coder.W_enc, coder.b_enc, k, b_dec, None, *W_bf16)
        return values, indices

    def select_aux(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        b_dec = coder.b_dec if coder.centred else None
        dead_and_score = (coder.dead, b_dec, *self.score(coder, grad))
        chosen: tuple[Tensor, Tensor, Tensor, Tensor] = ops.topk_encode_aux(
            rows, coder.W_enc, coder.b_enc, k, k_aux, *dead_and_score, *W_bf16
        )
        return chosen

    def score(self, coder: SparseCoder, grad: Tensor | None) -> tuple[Any, ...]:
        """The arguments of topk_encode_aux from grad to mode."""
        return None, None, 0.0, "additive"
