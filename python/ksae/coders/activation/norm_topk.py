# SPDX-License-Identifier: Apache-2.0
"""NormTopK: TopK by what each latent adds to the reconstruction, its value times its norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ... import ops
from ...ops import accumulator
from .base import Activation
from .chosen import pre_activations
from .topk import TopK

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclass(frozen=True)
class NormTopK(TopK):
    """relu(u) at the k latents of each token with the largest u |W_dec[i]| (as SAELens'
    rescale_acts_by_decoder_norm and Llamascopium). With unit decoder rows it is TopK.

    A latent whose decoder row is zero, as all are in a new transcoder, is scored by u. The norms
    are constants: nothing flows through the score.

    Args:
        k: active latents a token, in [1, F].

    Numerics: scores are pre-activations of W_enc and b_enc times the norms, rounded to their type.

    Raises:
        TypeError: k is no integer. What is out of range is refused by the coder.
    """

    reads_copy: ClassVar[bool] = False
    select_aux = Activation.select_aux

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            W, b, acc = coder.W_enc, coder.b_enc, accumulator(coder.W_enc.dtype)
            norms = coder.W_dec.to(acc).norm(dim=1)
            norms = torch.where(norms > 0, norms, 1)
            scaled = (W * norms[:, None]).to(W.dtype), (b * norms).to(b.dtype)
            b_dec = coder.b_dec if coder.centred else None
            _, indices = ops.topk_encode(rows, *scaled, k, b_dec)
        return pre_activations(coder, rows, indices).relu(), indices
