# SPDX-License-Identifier: Apache-2.0
"""The communicator of a coder that every rank has a copy of, for tokens of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..coders.code import Code
from ..coders.coder import SparseCoder
from .batch import winners
from .one_device import OneDevice, Pending, Selected
from .ranks import Ranks


class Replicas(OneDevice):
    """As `OneDevice`, over the ranks of a process group: what is summed over tokens is summed over
    ranks, in their order. Copies stay the same, for all take the same step.

    Args:
        everyone: the ranks.
        latents: F.
    """

    def __init__(self, everyone: Ranks, latents: int) -> None:
        self.everyone, self.latents = everyone, latents
        self.replicas = everyone.size
        self.leads = self.writes = everyone.rank == 0

    @property
    def bytes(self) -> Counter[str]:
        """What this rank has sent to others, by the name of the exchange."""
        return self.everyone.bytes

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        self.everyone.agree(what, facts)

    def refuse(self, what: str, error: Exception) -> None:
        self.everyone.refuse(what, error)

    def totals(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return self.everyone.totals(parts)

    def over_replicas(self, part: Tensor) -> Tensor:
        return self.everyone.all_reduce(part, "gradients")

    def start_variance(self, y: Tensor) -> Pending:
        return self.everyone.start_variance(y)

    def observed(self, values: Tensor) -> Tensor:
        """Of all, as `Ranks.observed`."""
        return self.everyone.observed(values)

    def mean_entries(self, E: int, N: int) -> float:
        """A token of all, of E on this rank's N."""
        return self.everyone.mean_entries(E, N)

    def select(
        self,
        model: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...],
    ) -> list[Selected]:
        """Of a batch's best entries all may be of this replica's tokens."""
        if model.activation.ragged:
            k = min(k * self.replicas, self.latents)
        return super().select(model, rows, k, k_aux, grad, W_bf16)

    def codes(
        self, values: Tensor, indices: Tensor, by: Tensor | None, ks: Sequence[int]
    ) -> list[Code]:
        code = Code(values, indices, by)
        if by is None or not any(ks):
            return super().codes(values, indices, by, ks)
        n = len(by) - 1
        places = (self.everyone.rank * n + code.rows()) * self.latents + indices
        count = self.replicas * n * ks[0]
        return [kept(code, winners(self.everyone, values, places, count))]


def kept(code: Code, wanted: Tensor) -> Code:
    """The entries of a code with row offsets that are wanted, [E] bool."""
    assert code.offsets is not None
    counts = torch.zeros_like(code.offsets)
    counts[1:] = torch.bincount(code.rows()[wanted], minlength=len(counts) - 1).cumsum(0)
    return Code(code.values[wanted], code.indices[wanted], counts)
