# SPDX-License-Identifier: Apache-2.0
"""The sparse code: which latents of each token are active, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Code:
    """Values and latents of the active entries: k a row, or row by row at offsets.

    Args:
        values: [N, k], or [E] with offsets.
        indices: int64, of the shape of values: latents in [0, F), sorted by value in each row.
        offsets: [N+1] int64; row n has the entries offsets[n] to offsets[n+1] - 1. None: k a row.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None = None

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
        """The first k entries of each row, its largest; a view."""
        return self if k == self.k else Code(self.values[..., :k], self.indices[..., :k])

    def contiguous(self) -> Code:
        """The same, packed in memory."""
        if self.values.is_contiguous() and self.indices.is_contiguous():
            return self
        return Code(self.values.contiguous(), self.indices.contiguous(), self.offsets)

    def dense(self, F: int) -> Tensor:
        """With its zeros [N, F]."""
        if self.offsets is None:
            dense = self.values.new_zeros(*self.values.shape[:-1], F)
            return dense.scatter(-1, self.indices, self.values)
        lengths = self.offsets.diff()
        rows = self.indices.new_tensor(range(len(lengths))).repeat_interleave(lengths)
        dense = self.values.new_zeros(len(lengths), F)
        return dense.index_put((rows, self.indices), self.values)


def has_numbers(t: Tensor) -> bool:
    """Whether a number of t may be read: not where a graph is recorded or captured, which has no
    branch on data, and not of tensors without data (fake and meta ones)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if t.is_meta or isinstance(t, FakeTensor):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())
