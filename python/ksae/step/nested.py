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
from ..reference.prefixes import prefix_of
from .unfused import Metrics


class Nested:
    """The prefixes of a model, as the ops take them, on its device.

    Entries of the latents that prefix m has and prefix m - 1 has not see the residuals of the
    prefixes from m on alone: rows m N to (m + 1) N - 1 of a table [P*N, columns].
    """

    def __init__(self, model: SparseCoder, acc: torch.dtype) -> None:
        term = terms_of(model, 0)[0]
        device = model.W_enc.device
        self.widths = torch.tensor(term.prefixes, device=device)
        self.shares = torch.tensor(term.shares, dtype=acc, device=device)

    def residual(
        self, code: Code, model: SparseCoder, target: Tensor, columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first columns of the table, squares [P, N] float64 and the values' gradients."""
        table, squares, grads = ops.prefix_residual(
            *code.matrices(), model.W_dec, model.b_dec, target, self.widths, self.shares,
            columns, code.offsets,
        )  # fmt: skip
        return table.flatten(0, 1), squares, grads

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
        """The sum of [P, N] over the prefixes, as the loss counts them: [N]."""
        return (self.shares.double()[:, None] * squares).sum(0)

    def row_of(self, terms: Sequence[Term], codes: Sequence[Code]) -> list[Tensor]:
        """The row of each entry in its term's residuals: [E] int32 each."""
        found = []
        for term, code in zip(terms, codes, strict=True):
            row = code.rows().reshape(-1)
            if term.prefixes:
                N = len(code.values) if code.offsets is None else len(code.offsets) - 1
                row = row + prefix_of(code.indices.reshape(-1), self.widths) * N
            found.append(row.int())
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
