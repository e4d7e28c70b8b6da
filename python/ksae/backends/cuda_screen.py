# SPDX-License-Identifier: Apache-2.0
"""Bridge from torch tensors to the CUDA kernels of a screened selection."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .bridge import pointer


class Screened:
    """`Screen` of product.py; capacity: latents of a row that are scored, 0: as many as is wise."""

    def __init__(
        self,
        module: ModuleType,
        allocate: Callable[[int], int],
        stream: int,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        x_norms: Tensor,
        w_norms: Tensor,
        k: int,
        mask: Tensor | None = None,
        capacity: int = 0,
    ) -> None:
        N, F = len(x), len(W_enc)
        groups = module.screened_groups(F, k)
        self.module, self.x, self.capacity = module, x, capacity
        self.queue = (allocate, stream)
        self.sizes = (N, x.shape[1], F, k)
        self.rows = x.new_empty(N + 1, dtype=torch.int32)  # those without proof, and their number
        self.out = (x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64))
        bounds = x.new_empty(N, dtype=torch.int32)
        given = (x, W_enc, b_enc, x_norms, w_norms, mask, x.new_empty(3, groups), bounds)
        self.given = (*given, self.rows, self.rows[N:], *self.out)
        self._run("begin")

    def _run(self, step: str, scores: Tensor | None = None, first: int = 0) -> None:
        rows = 0 if scores is None else len(scores)
        self.module.screened(
            step, *self.sizes, first, rows, self.capacity, pointer(scores),
            [pointer(t) for t in self.given], *self.queue,
        )  # fmt: skip

    def select(self, scores: Tensor, first: int) -> None:
        self._run("select", scores, first)

    def result(self) -> tuple[Tensor, Tensor]:
        self._run("redo")
        return self.out

    def redone(self) -> Tensor:
        return self.rows[: int(self.rows[-1])]
