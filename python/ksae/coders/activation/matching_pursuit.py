# SPDX-License-Identifier: Apache-2.0
"""MatchingPursuit: latents one by one, each for what the others left (arXiv 2506.03093)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..pursuit import matching_pursuit, merged
from .base import Activation
from .topk import TopK

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclass(frozen=True)
class MatchingPursuit(TopK):
    """k steps of `ksae.pursuit.matching_pursuit` (MP-SAE): the latent with the largest product with
    what the reconstruction has left, again and again; a latent that is taken twice adds up.

    Encoder and decoder are the same rows, W_dec; W_enc and b_enc are not used. For autoencoders,
    with `TrainStep(fused=False)`: the gradient goes through all the steps.

    Args:
        k: steps, in [1, F], which is the largest number of active latents.
        tolerance: a token takes no more steps once its residual is no longer than this.
        stop_on_repeat: nor once it has taken a latent for the second time (as SAELens).

    Raises:
        TypeError: k is no integer. What is out of range is refused by the coder.
    """

    tolerance: float = 0.0
    stop_on_repeat: bool = False

    other_k: ClassVar[bool] = False
    reads_copy: ClassVar[bool] = False
    of_input: ClassVar[bool] = True
    select_aux = Activation.select_aux

    def check(self, owner: str, F: int) -> None:
        super().check(owner, F)
        if not 0 <= self.tolerance < float("inf"):
            got = self.tolerance
            raise ValueError(f"{owner}: tolerance must be a finite number >= 0, got {got}")

    @property
    def fused_refuses(self) -> str | None:
        return "steps that see each other"

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        W, how = coder.W_dec, (self.tolerance, self.stop_on_repeat)
        return merged(*matching_pursuit(rows, W, W, k, coder.b_dec, *how))

    def encoder(self, coder: SparseCoder) -> tuple[Tensor, Tensor]:
        return coder.W_dec, coder.W_dec.new_zeros(coder.d_sae)
