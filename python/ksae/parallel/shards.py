# SPDX-License-Identifier: Apache-2.0
"""The communicator of a coder whose latents are spread over ranks: rank r has r, r + R, ...

A step gives the numbers of one device, but for the order in which a reconstruction is added up.
Sent are tokens, candidates, partial reconstructions and residuals; weights and their gradients stay
where they are, except sums for the small parameters, which all ranks hold and update alike. Where
the coder has replicas too, the gradients of a rank's latents are summed over those that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..coders.activation import AbsTopK
from ..coders.auxk import AUXK
from ..coders.code import Code, by_row
from ..coders.coder import SparseCoder
from .batch import winners
from .keys import LEAST, keys_of
from .one_device import OneDevice, Pending, Selected
from .ranks import Ranks
from .replicas import kept


class Shards(Ranks):
    """As `OneDevice`, whose methods it replaces, over the ranks of a process group.

    Args:
        group: of R ranks.
        latents: F, of all ranks.
        everyone: the ranks of all replicas, in their order. None: there are no others.
        data: those that hold the latents of this rank, in the same order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        latents: int,
        everyone: Ranks | None = None,
        data: Ranks | None = None,
    ) -> None:
        super().__init__(group)
        self.latents, self.data = latents, data
        # What exchanges bring, from step to step: new pages would cost as much as the exchange.
        self._kept: dict[tuple[str, int], Tensor] = {}
        self.everyone: Ranks = self if everyone is None else everyone
        self.replicas = 1 if data is None else data.size
        self.leads = self.everyone.rank == 0
        self.writes = data is None or data.rank == 0
        for other in (everyone, data):
            if other is not None:
                other.bytes = self.bytes  # one count

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        if self.everyone is self:
            super().agree(what, facts)
        else:
            self.everyone.agree(what, facts)

    def refuse(self, what: str, error: Exception) -> None:
        if self.everyone is self:
            super().refuse(what, error)
        else:
            self.everyone.refuse(what, error)

    def totals(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return super().totals(parts) if self.everyone is self else self.everyone.totals(parts)

    def start_variance(self, y: Tensor) -> Pending:
        if self.everyone is self:
            return super().start_variance(y)
        return self.everyone.start_variance(y)

    def observed(self, values: Tensor) -> Tensor:
        return super().observed(values) if self.everyone is self else self.everyone.observed(values)

    def tokens(self, rows: Tensor) -> Tensor:
        into = self._keep("rows", rows, self.size * len(rows))
        return self.gather(rows, "rows", into)

    def _keep(self, name: str, like: Tensor, rows: int) -> Tensor:
        """Memory for rows [rows, ...], that of the last call where it fits."""
        key, shape = (name, rows), (rows, *like.shape[1:])  # a step may use one name for two sizes
        kept = self._kept.get(key)
        if kept is None or kept.shape != shape or kept.dtype != like.dtype:
            kept = self._kept[key] = like.new_empty(shape)
        return kept

    def mean_entries(self, E: int, N: int) -> float:
        """A token, of E of this rank's latents for N tokens."""
        (total,) = self.totals([torch.tensor(E, device=self.device)])
        return float(total) / max(N * self.replicas, 1)

    def over_latents(self, part: Tensor) -> Tensor:
        return self.all_reduce(part)

    def start_over_latents(self, part: Tensor) -> Pending:
        return self.start_all_reduce(part)

    def over_replicas(self, part: Tensor) -> Tensor:
        return part if self.data is None else self.data.all_reduce(part, "gradients")

    # --------------------------------------------------------------------------------- selection

    def select(
        self,
        model: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...],
    ) -> list[Selected]:
        """With scores, where they are not the values: of 16-bit weights, with a gradient, and of
        what is not rectified."""
        one: Any = self
        wide = rows.dtype == torch.float32
        by_scores = k_aux and (not wide or AUXK[model.auxk].signed)
        ragged = model.activation.ragged
        if ragged:  # all may be of this replica's tokens
            k = min(k * self.replicas, len(model.W_enc))
        if (ragged or (grad is None and wide)) and not by_scores:
            first, *aux = OneDevice.select(one, model, rows, k, k_aux, grad, W_bf16)
            return [_by_size(first) if isinstance(model.activation, AbsTopK) else first, *aux]
        encoder = (rows, model.W_enc, model.b_enc)
        b_dec = model.b_dec if model.centred else None
        if ragged or (grad is None and wide):
            chosen = OneDevice.select(one, model, rows, k, 0, grad, W_bf16)
            if isinstance(model.activation, AbsTopK):
                chosen = [_by_size(chosen[0])]
        else:
            by = model.activation.score(model, grad)  # type: ignore[attr-defined]
            chosen = [ops.scored_encode(*encoder, k, b_dec, None, *by)]
        if k_aux:
            chosen.append(ops.scored_encode(*encoder, k_aux, b_dec, model.dead))
        return chosen

    def codes(
        self, values: Tensor, indices: Tensor, by: Tensor | None, ks: Sequence[int]
    ) -> list[Code]:
        """Exact: of each rank's best k, of which there are enough, the token's rank finds the k-th.

        A candidate wins if its key is not below that of the k-th. With row offsets the threshold is
        one for all tokens. On the CPU rows have as many entries as they have winners here.
        """
        latents = indices * self.size + self.rank
        if values.dim() == 1:
            code = Code(values, indices, by)
            return [code if k == 0 else self._of_batch(code, latents, k) for k in ks]
        keys = keys_of(values if by is None else by, latents)  # [N, best]
        last = self._last_keys(keys, ks)  # [N, len(ks)]
        codes = []
        for i in range(len(ks)):
            won = keys >= last[:, i : i + 1]
            if keys.is_cuda:  # whose host does not know how many have won
                codes.append(Code(torch.where(won, values, 0), indices))
                continue
            won &= values != 0
            offsets = torch.zeros(len(won) + 1, dtype=torch.int64)
            offsets[1:] = won.sum(1).cumsum(0)
            at = won.view(-1).nonzero()[:, 0]
            codes.append(Code(values.view(-1)[at], indices.view(-1)[at], offsets))
        return codes

    def _of_batch(self, code: Code, latents: Tensor, k: int) -> Code:
        """Of a batch's best entries on this rank those among the best of all."""
        assert code.offsets is not None
        N = len(code.offsets) - 1
        replica = 0 if self.data is None else self.data.rank
        places = (replica * N + code.rows()) * self.latents + latents
        count = self.replicas * N * k
        return kept(code, winners(self.everyone, code.values, places, count))

    def _last_keys(self, keys: Tensor, ks: Sequence[int]) -> Tensor:
        """The smallest key of the best k over all ranks, for each k of ks: [N, len(ks)]."""
        most = max(ks)
        width = min(most, -(-self.latents // self.size))  # the same on all ranks
        padded = keys
        if keys.shape[1] != width:
            padded = keys.new_full((keys.shape[0], width), LEAST)
            padded[:, : keys.shape[1]] = keys[:, :width]
        candidates = self.scatter(padded, "candidates")  # [R, n, width]
        best = candidates.transpose(0, 1).flatten(1)  # [n, R * width]
        if len(ks) == 1:
            picked = best.topk(most, dim=1, sorted=False).values.amin(1, keepdim=True)
        else:
            picked = best.topk(most, dim=1).values[:, [k - 1 for k in ks]]
        return self.gather(picked, "last keys")

    # ---------------------------------------------------------------------------------- residuals

    def residual(
        self,
        code: Code,
        W_dec: Tensor,
        bias: Tensor | None,
        target: Tensor,
        columns: int,
        sums: Tensor | None,
        rounded: Tensor | None = None,  # of one device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Partial reconstructions go to the token's rank, which adds them in the order of ranks;
        its residual goes to all. The squares are one sum: [1]."""
        part = ops.sparse_decode(*code.matrices(), W_dec, None, code.offsets, True)  # [N, d]
        own = self._added(part)
        if bias is not None:
            own += bias
        own -= target
        square = torch.linalg.vector_norm(own, dtype=torch.float64).square()
        residual = self.gather(own, "residuals", into=part)  # [N, d]
        values, indices = code.matrices()
        grads = ops.sparse_decode_backward_values(residual, indices, W_dec, code.offsets)
        return residual, square[None], grads.masked_fill_(values == 0, 0)

    def prefix_residual(
        self,
        code: Code,
        model: SparseCoder,
        target: Tensor,
        widths: Tensor,
        shares: Tensor,
        columns: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Partial reconstructions of each group of latents, P n rows of a rank one after the other,
        are summed over ranks and then over groups; P residuals go to all."""
        P, n, d = len(widths), *target.shape
        values, indices = (t.reshape(-1) for t in (code.values, code.indices))
        row = rows_of_table(code, widths, n).reshape(-1)
        order, offsets = by_row(row, self.size * P * n)
        entries = (values[order, None], indices[order, None])
        part = ops.sparse_decode(*entries, model.W_dec, None, offsets, True)  # [R P n, d]
        own = self._added(part)
        errors = own.view(P, n, d).cumsum(0) + model.b_dec - target
        squares = errors.double().square().sum((1, 2))[:, None]  # [P, 1]
        own = (shares[:, None, None] * errors).flip(0).cumsum(0).flip(0)
        table = self.gather(own.view(P * n, d), "residuals", into=part)
        grads = torch.empty_like(values, dtype=table.dtype)
        products = ops.sparse_decode_backward_values(table, entries[1], model.W_dec, offsets)
        grads[order] = products[:, 0]
        return table, squares, grads.masked_fill_(values == 0, 0).view(code.matrices()[0].shape)

    def _added(self, part: Tensor) -> Tensor:
        """This rank's rows [n, d] of the sum over ranks of [N, d]; overwritten by the next call."""
        into = self._keep("partial sums", part, len(part))
        parts = self.scatter(part, "partial sums", into)  # [R, n, d]
        own = parts[0]
        for other in parts[1:]:
            own += other
        return own


def _by_size(chosen: Selected) -> Selected:
    """A selection by |u| of values u."""
    values, indices, _ = chosen
    return values, indices, values.abs()


def rows_of_table(code: Code, widths: Tensor, n: int) -> Tensor:
    """The row of each entry, int64 of the shape of values, in a table that has for each rank and
    each group of latents n rows; widths [P]: where the groups of this rank's latents end."""
    token = code.rows()
    group = torch.bucketize(code.indices, widths, right=True)
    return (token // n * len(widths) + group) * n + token % n
