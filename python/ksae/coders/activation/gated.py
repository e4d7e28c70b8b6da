# SPDX-License-Identifier: Apache-2.0
"""Gated: which latents are active and how strongly are two questions (arXiv 2404.16014)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ... import functional
from ...ops import accumulator
from ...reference import sparsity
from ..terms import squared_error
from .above import Above
from .base import Goal

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder

_VECTORS = ("b_enc", "r_mag", "b_mag")


@dataclass(frozen=True)
class Gated(Above):
    """1[q > 0] relu(exp(r_mag) p + b_mag) with q = relu(p + b_enc), p = (x - b_dec) W_enc.T: a gate
    that only opens, and a magnitude. b_enc is the gate's bias; r_mag and b_mag [F] are parameters.

    The step has no gradient: the gate learns from what is beside the reconstruction's loss, l1
    times the mean over tokens of sum q_i |W_dec[i]|, and the loss of a reconstruction by q with the
    decoder as it is (no gradient for W_dec, b_dec and W_skip).

    Args:
        l1: weight of the penalty, >= 0.
        decoder_norm: weigh gates by the norms of decoder rows (as SAELens); False: sum q_i (as
            dictionary_learning).

    While a training code holds more than one in 16 latents, training has dense products. Where
    parameters are of 16 bits, p is q, rounded to that type, less b_enc.

    Raises:
        ValueError: by the coder, l1 out of range.
    """

    l1: float = 1e-3
    decoder_norm: bool = True

    identity: ClassVar[bool] = False
    opens_more: ClassVar[bool] = True

    def check(self, owner: str, F: int) -> None:
        if not 0 <= self.l1 < math.inf:
            raise ValueError(f"{owner}: l1 must be a finite number >= 0, got {self.l1}")

    def parameters(self, F: int, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.zeros(F, dtype=acc, device=device) for name in ("r_mag", "b_mag")}

    def scheduled(self, k: int | None, penalty: float) -> Gated:
        return replace(self, l1=penalty * self.l1)

    def infer(self, coder: SparseCoder, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
        b_dec = coder.b_dec if coder.centred else None
        gate, indices, offsets = functional.threshold_encode(
            rows, coder.W_enc, coder.b_enc, 0.0, b_dec
        )
        wide = gate.to(accumulator(gate.dtype))
        return self.values_of(self.own(coder), wide, indices).to(gate.dtype), indices, offsets

    def own(self, coder: SparseCoder) -> dict[str, Tensor]:
        return {name: coder.get_parameter(name) for name in _VECTORS}

    @property
    def weighs_norms(self) -> bool:
        return self.decoder_norm

    def values_of(self, own: Mapping[str, Tensor], pre: Tensor, indices: Tensor) -> Tensor:
        of_entries = (own[n].to(pre.dtype).index_select(0, indices) for n in _VECTORS)
        return sparsity.gated(pre, *of_entries)

    def penalty_of(
        self, own: Mapping[str, Tensor], coder: SparseCoder, goal: Goal, code: Code
    ) -> Tensor:
        assert code.pre is not None
        W_dec, b_dec = coder.W_dec.detach(), coder.b_dec.detach()
        gates = code.pre.to(W_dec.dtype)
        if self.is_dense(coder):
            dense = torch.zeros(len(goal.rows), coder.d_sae, dtype=W_dec.dtype, device=W_dec.device)
            recon = torch.addmm(b_dec, dense.index_put((code.rows(), code.indices), gates), W_dec)
        else:
            recon = functional.sparse_decode(gates, code.indices, W_dec, b_dec, code.offsets)
        norms = own["norms"].index_select(0, code.indices) if self.decoder_norm else None
        wide = code.pre.to(accumulator(code.pre.dtype))
        opened = sparsity.power_penalty(wide, norms, code.rows(), len(goal.rows), 1.0, False)
        return squared_error(recon, goal.target) / goal.unit + self.l1 * opened
