# SPDX-License-Identifier: Apache-2.0
"""The sparse code: which latents of each token are active, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..reference import rows_of


@dataclass(frozen=True)
class Code:
    """Values and latents of the active entries: k a row, or row by row at offsets.

    Args:
        values: [N, k], or [E] with offsets.
        indices: int64, of the shape of values: latents in [0, F); sorted by value in each row, or
            with offsets by latent.
        offsets: [N+1] int64; row n has the entries offsets[n] to offsets[n+1] - 1. None: k a row.
        pre: [E], what an activation made the values of in training, if it is more than the values.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None = None
    pre: Tensor | None = None

    def __post_init__(self) -> None:
        shape, of_indices = self.values.shape, self.indices.shape
        if shape != of_indices:
            want, got = list(shape), list(of_indices)
            raise ValueError(f"Code: indices must be of shape {want} as values, got {got}")
        if self.offsets is not None and len(shape) != 1:
            raise ValueError(f"Code: values must be of shape [E] with offsets, got {list(shape)}")

    @property
    def k(self) -> int:
        """Entries a row.

        Raises:
            ValueError: rows have offsets.
        """
        if self.offsets is not None:
            raise ValueError("Code: k must be the same in each row, got a code with row offsets")
        return self.values.shape[-1]

    def first(self, k: int) -> Code:
        """The first k entries of each row, its largest; a view. With offsets all entries: rows have
        as many as they have."""
        if self.offsets is not None or k == self.k:
            return self
        return Code(self.values[..., :k], self.indices[..., :k])

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Values and indices as the ops take them: [N, k], or [E, 1] with offsets."""
        if self.offsets is None:
            return self.values, self.indices
        return self.values[:, None], self.indices[:, None]

    def rows(self) -> Tensor:
        """The row of each entry: int64, of the shape of values."""
        if self.offsets is not None:
            return rows_of(self.offsets, len(self.values)).long()
        N, k = self.values.shape
        return torch.arange(N, device=self.values.device)[:, None].expand(N, k)

    def contiguous(self) -> Code:
        """The same, packed in memory."""
        if self.values.is_contiguous() and self.indices.is_contiguous():
            return self
        return Code(self.values.contiguous(), self.indices.contiguous(), self.offsets, self.pre)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Values and indices [N, k], k the largest number of entries of a row; the others of
        smaller rows are 0."""
        if self.offsets is None:
            return self.values, self.indices
        lengths, rows = self.offsets.diff(), self.rows()
        k = int(lengths.max()) if len(lengths) else 0
        at = (rows, torch.arange(len(rows), device=rows.device) - self.offsets[rows])
        values, indices = (t.new_zeros(len(lengths), k) for t in (self.values, self.indices))
        return values.index_put(at, self.values), indices.index_put(at, self.indices)

    def dense(self, F: int) -> Tensor:
        """With its zeros [N, F]; an entry of value 0 may have the latent of another."""
        if self.offsets is None:
            dense = self.values.new_zeros(*self.values.shape[:-1], F)
            return dense.scatter_add(-1, self.indices, self.values)
        dense = self.values.new_zeros(len(self.offsets) - 1, F)
        return dense.index_put((self.rows(), self.indices), self.values)


def by_row(row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entries [E] in the order of their rows, in [0, rows), and where each row begins [rows+1]."""
    order = row.argsort(stable=True)
    bounds = torch.arange(rows + 1, device=row.device, dtype=row.dtype)
    return order, torch.searchsorted(row[order], bounds)


def has_numbers(t: Tensor) -> bool:
    """Whether a number of t may be read: not where a graph is recorded or captured, which has no
    branch on data, and not of tensors without data (fake and meta ones)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if t.is_meta or isinstance(t, FakeTensor):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def recomputes() -> bool:
    """Whether this is a forward pass within a backward pass, as activation checkpointing runs one:
    what is counted was counted the first time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
