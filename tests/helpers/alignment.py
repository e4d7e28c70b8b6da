# SPDX-License-Identifier: Apache-2.0
"""Rows that begin anywhere in memory, for CUDA kernels on a GPU and in emulation."""

from __future__ import annotations

from typing import Any

import torch
from cases import assert_same, code, randn
from torch import Tensor


def begin_anywhere(served: Any, T: torch.dtype, offset: int, device: str) -> None:
    """Where rows are not aligned to the widest loads, a GPU refuses these, and narrower ones give
    the same bits. Rows of lengths that are a multiple of 8, of 4 and odd."""

    def placed(t: Tensor, offset: int) -> Tensor:
        flat = torch.empty(t.numel() + offset, dtype=t.dtype, device=device)
        return flat[offset:].view(t.shape).copy_(t)

    for d, F in ((96, 640), (100, 644), (97, 641)):
        N, k = 5, 12
        x, W, b, z = (
            randn(*s, dtype=T, seed=n) for n, s in enumerate([(N, d), (F, d), (d,), (N, F)])
        )
        values, indices = code(N, F, k, T)
        for op, args in (
            ("topk", (z, k)),
            ("sparse_decode", (values, indices, W, b)),
            ("sparse_residual", (values, indices, W, b, x, d)),
            ("sparse_residual_slice", (values, indices, W, b, x, 4, d - 5)),
            ("sparse_decode_backward_values", (x, indices, W)),
            ("sparse_decode_backward_weight", (x, values, indices, F)),
        ):
            results = []
            for o in (offset, 0):
                there = (placed(a, o) if isinstance(a, Tensor) else a for a in args)
                result = getattr(served, op)(*there)
                results.append([result] if isinstance(result, Tensor) else result)
            for got, want in zip(*results, strict=True):
                assert_same(op, got, want)
