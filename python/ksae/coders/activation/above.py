# SPDX-License-Identifier: Apache-2.0
"""Activations without a k: their training codes have all entries above a threshold.

How many those are is known only afterwards, and early in training it may be half of all latents. A
code of a large share of the latents is slower than dense products, so while more than one in SHARE
was active in the last batch, encoder and decoder are dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ... import functional
from ...ops import accumulator
from .base import Activation

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder

SHARE = 16


class Above(Activation):
    """An activation whose training code has the entries above `lowest`, with their pre-activations.

    The coder's buffer mean_active [] float64, the mean number of entries a token of the last
    training batch, is saved with it; before there was one it is infinite.
    """

    k: ClassVar[int] = 0  # type: ignore[misc]
    ragged: ClassVar[bool] = True
    penalized: ClassVar[bool] = True

    def lowest(self, coder: SparseCoder) -> Tensor | float:
        """The bar of a training code: [F] without a gradient, or one for all."""
        return 0.0

    def buffers(self, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"mean_active": torch.tensor(torch.inf, dtype=torch.float64, device=device)}

    def is_dense(self, coder: SparseCoder) -> bool:
        return SHARE * float(coder.found("mean_active")) > coder.d_sae

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        bar = self.lowest(coder)
        encode = _dense if self.is_dense(coder) else functional.threshold_encode
        b_dec = coder.b_dec if coder.centred else None
        pre, indices, offsets = encode(rows, coder.W_enc, coder.b_enc, bar, b_dec)
        wide = pre.to(accumulator(pre.dtype))
        values = self.values_of(self.own(coder), wide, indices).to(pre.dtype)
        return values, indices, offsets, pre

    @torch.no_grad()
    def observe(self, coder: SparseCoder, code: Code) -> None:
        coder.get_buffer("mean_active").fill_(coder.entries_a_token(code))


def _dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor | float, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`threshold_encode` with dense products in its gradients too."""
    acc = accumulator(x.dtype)
    centred = x if b_dec is None else x - b_dec
    u = nnf.linear(centred.to(acc), W_enc.to(acc), b_enc.to(acc))  # [N, F]
    chosen = u > theta
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(chosen.sum(1), 0, out=offsets[1:])
    return u[chosen].to(x.dtype), chosen.nonzero()[:, 1], offsets
