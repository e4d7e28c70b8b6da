# SPDX-License-Identifier: Apache-2.0
"""Matryoshka prefixes in the fused step: the residuals of all of them in one pass over the code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..coders.code import Code
from ..coders.coder import SparseCoder
from ..coders.terms import Term, terms_of
from ..parallel.one_device import OneDevice
from ..parallel.shards import Shards, rows_of_table
from .unfused import Metrics


class Nested:
    """The prefixes of a model, as the ops take them, on its device.

    Entries of the latents that prefix m has and prefix m - 1 has not see the residuals of the
    prefixes from m on alone: rows m n to (m + 1) n - 1 of a table [P*n, columns], of which there is
    one for each rank.
    """

    def __init__(
        self, model: SparseCoder, acc: torch.dtype, communicator: OneDevice | Shards
    ) -> None:
        term = terms_of(model, 0)[0]
        device = model.W_enc.device
        self.communicator = communicator
        place = communicator.rank, communicator.size
        # where they end among this rank's latents
        widths = [len(range(place[0], width, place[1])) for width in term.prefixes]
        self.widths = torch.tensor(widths, device=device)
        self.shares = torch.tensor(term.shares, dtype=acc, device=device)

    def residual(
        self, code: Code, model: SparseCoder, target: Tensor, columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first columns of the table, squares [P, any] float64 and the values' gradients."""
        prefixes = (self.widths, self.shares)
        return self.communicator.prefix_residual(code, model, target, *prefixes, columns)

    def slice(
        self, code: Code, model: SparseCoder, target: Tensor, start: int, stop: int
    ) -> Tensor:
        """Columns [start, stop) of the table."""
        table: Tensor = ops.prefix_residual_slice(
            *code.matrices(), model.W_dec, model.b_dec, target, self.widths, self.shares,
            start, stop, code.offsets,
        )  # fmt: skip
        return table.flatten(0, 1)

    def weigh(self, squares: Tensor) -> Tensor:
        """The sum of [P, any] over the prefixes, as the loss counts them: [any]."""
        return (self.shares.double()[:, None] * squares).sum(0)

    def row_of(self, terms: Sequence[Term], codes: Sequence[Code], n: int) -> list[Tensor]:
        """The row of each entry in its term's residuals: [E] int32 each; n: a rank's tokens."""
        found = []
        for term, code in zip(terms, codes, strict=True):
            row = rows_of_table(code, self.widths, n) if term.prefixes else code.rows()
            found.append(row.reshape(-1).int())
        return found


def together(first: Code, second: Code) -> Code:
    """The entries of two codes of the same tokens, the first code's first in each row."""
    if first.offsets is None and second.offsets is None:
        values = torch.cat([first.values, second.values], 1)
        return Code(values, torch.cat([first.indices, second.indices], 1))
    order = torch.cat([first.rows().reshape(-1), second.rows().reshape(-1)]).argsort(stable=True)
    values = torch.cat([first.values.reshape(-1), second.values.reshape(-1)])[order]
    indices = torch.cat([first.indices.reshape(-1), second.indices.reshape(-1)])[order]
    return Code(values, indices, _offsets_of(first) + _offsets_of(second))


def _offsets_of(code: Code) -> Tensor:
    if code.offsets is not None:
        return code.offsets
    N, k = code.values.shape
    return k * torch.arange(N + 1, device=code.values.device)


def prefix_metrics(model: SparseCoder, errors: Tensor | None, variance: Tensor) -> Metrics:
    """The FVU of each prefix but the last, by name, from sums of squares [P]."""
    if errors is None:
        return {}
    fvus = (errors / variance).to(variance.dtype).unbind()
    return {f"fvu_{m}": fvu for m, fvu in zip(model.prefixes[:-1], fvus, strict=False)}
