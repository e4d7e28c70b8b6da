# SPDX-License-Identifier: Apache-2.0
"""What a coder counts over the tokens of a batch, of which other processes may hold a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .activation import Activation
from .code import Code, has_numbers, recomputes
from .terms import total_variance


class Counts(nn.Module):
    """A part of `SparseCoder`."""

    activation: Activation
    tokens_since_fired: Tensor  # [F] int64
    _before: dict[str, Tensor] | None = None  # the buffers before the last forward pass
    ranks: Any = None  # of `ksae.shard`, where the tensors hold the latents of one rank only
    peers: Any = None  # of `ksae.count_over_ranks`: processes that hold other tokens of a batch

    def found(self, name: str) -> Tensor:
        """A buffer as this forward pass finds it: where a backward pass recomputes one, as that one
        found it."""
        before = self._before if recomputes() else None
        return self.get_buffer(name) if before is None else before[name]

    def of_batch(self, part: Tensor) -> Tensor:
        """The sum over the processes that hold other tokens of the batch, of any shape."""
        total: Tensor = part if self.peers is None else self.peers.total(part)
        return total

    def variance(self, y: Tensor) -> Tensor:
        """What a loss divides the squares of targets y [N, d_out] by, [], a constant."""
        if self.peers is None:
            return total_variance(y)
        variance: Tensor = self.peers.variance(y.detach())
        return variance

    def observed(self, values: Tensor) -> Tensor:
        """Values whose smallest positive one is that of the whole batch, from those here [E]."""
        others = self.ranks or self.peers
        every: Tensor = values if others is None else others.observed(values)
        return every

    def entries_a_token(self, code: Code) -> float:
        """Mean number in the whole batch; code: of the tokens here, with row offsets."""
        assert code.offsets is not None
        E, N = len(code.values), len(code.offsets) - 1
        others = self.ranks or self.peers
        mean: float = E / max(N, 1) if others is None else others.mean_entries(E, N)
        return mean

    def _count(self, code: Code, N: int) -> None:
        """Of integers: a block without gradients would keep an exported graph from being saved."""
        hits = torch.zeros_like(self.tokens_since_fired)
        hits.index_add_(0, code.indices.reshape(-1), (code.values != 0).reshape(-1).to(hits.dtype))
        if self.peers is None:
            since = self.tokens_since_fired + N
        else:
            hits = self.of_batch((hits > 0).short())
            since = self.tokens_since_fired + self.of_batch(torch.tensor(N, device=hits.device))
        if has_numbers(since):  # for a recomputation of this pass
            self._before = {n: b.clone() for n, b in self.named_buffers(recurse=False)}
        self.tokens_since_fired.copy_(torch.where(hits > 0, 0, since))
