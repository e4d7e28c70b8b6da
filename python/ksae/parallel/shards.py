# SPDX-License-Identifier: Apache-2.0
"""The communicator of a coder whose latents are spread over ranks: rank r has r, r + R, ...

A step gives the numbers of one device, but for the order in which a reconstruction is added up.
Sent are tokens, candidates, partial reconstructions and residuals; weights and their gradients stay
where they are, except sums for the small parameters, which all ranks hold and update alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..coders.code import Code
from ..coders.coder import SparseCoder
from ..ops import accumulator
from .keys import LEAST, keys_of
from .one_device import OneDevice, Selected
from .ranks import Ranks


class Shards(Ranks):
    """As `OneDevice`, whose methods it replaces, over the ranks of a process group.

    Args:
        group: of R ranks.
        latents: F, of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, latents: int) -> None:
        super().__init__(group)
        self.latents = latents

    def variance(self, y: Tensor) -> Tensor:
        """From the variance and the mean of each rank's n rows, in float64."""
        mean = y.double().mean(0)  # [d]
        mine = torch.cat([ops.total_variance(y).double()[None], mean])
        every = self.gather(mine[None], "variance")
        within, means = every[:, 0], every[:, 1:]
        between = (means - means.mean(0)).square().sum() * y.shape[0]
        variance: Tensor = within.sum() + between
        return variance.to(accumulator(y.dtype))

    def select(
        self,
        model: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...],
    ) -> list[Selected]:
        """With scores, where they are not the values: of 16-bit weights, and with a gradient."""
        if grad is None and rows.dtype == torch.float32:
            return OneDevice.select(self, model, rows, k, k_aux, grad, W_bf16)  # type: ignore[arg-type]
        encoder = (rows, model.W_enc, model.b_enc)
        b_dec = model.b_dec if model.centred else None
        by = model.activation.score(model, grad)  # type: ignore[attr-defined]
        chosen: list[Selected] = [ops.scored_encode(*encoder, k, b_dec, None, *by)]
        if k_aux:
            chosen.append(ops.scored_encode(*encoder, k_aux, b_dec, model.dead))
        return chosen

    def codes(
        self, values: Tensor, indices: Tensor, scores: Tensor | None, ks: Sequence[int]
    ) -> list[Code]:
        """Exact: of each rank's best k, of which there are enough, the token's rank finds the k-th.

        A candidate wins if its key is not below that of the k-th.
        """
        latents = indices * self.size + self.rank
        keys = keys_of(values if scores is None else scores, latents)  # [N, best]
        last = self._last_keys(keys, ks)  # [N, len(ks)]
        codes = []
        for i in range(len(ks)):
            won = keys >= last[:, i : i + 1]
            width = keys.shape[1]
            if not keys.is_cuda:  # sorted: those that won are first
                width = max(int(won.sum(1).max()), 1) if len(won) else 1
            kept = torch.where(won, values, 0)[:, :width]
            codes.append(Code(kept, indices[:, :width]).contiguous())
        return codes

    def _last_keys(self, keys: Tensor, ks: Sequence[int]) -> Tensor:
        """The smallest key of the best k over all ranks, for each k of ks: [N, len(ks)]."""
        most = max(ks)
        width = min(most, -(-self.latents // self.size))  # the same on all ranks
        padded = keys.new_full((keys.shape[0], width), LEAST)
        padded[:, : keys.shape[1]] = keys[:, :width]
        candidates = self.scatter(padded, "candidates")  # [R, n, width]
        best = candidates.transpose(0, 1).flatten(1)  # [n, R * width]
        best = best.topk(most, dim=1).values
        picked = best[:, [k - 1 for k in ks]]
        return self.gather(picked, "last keys")

    def residual(
        self,
        code: Code,
        W_dec: Tensor,
        bias: Tensor | None,
        target: Tensor,
        columns: int,
        sums: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Partial reconstructions go to the token's rank, which adds them in the order of ranks;
        its residual goes to all. The squares are one sum a rank: [R]."""
        part = ops.sparse_decode(code.values, code.indices, W_dec, partial=True)
        parts = self.scatter(part, "partial sums")  # [R, n, d]
        own = parts[0]
        for other in parts[1:]:
            own += other
        if bias is not None:
            own += bias
        own -= target
        square = torch.linalg.vector_norm(own, dtype=torch.float64).square()
        residual = self.gather(own, "residuals")  # [N, d]
        grads = ops.sparse_decode_backward_values(residual, code.indices, W_dec)
        grads = torch.where(code.values == 0, 0, grads)
        return residual, self.gather(square[None], "squares"), grads
