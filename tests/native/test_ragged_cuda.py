# SPDX-License-Identifier: Apache-2.0
"""Codes with row offsets in the CUDA kernels, executed by the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import integers, randn

from ksae.backends.cuda import Kernels
from ksae.reference import ragged as meaning

F, LENGTHS = 97, ([0, 97, 3, 0, 1, 40], [0, 0], [5])


@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "no entries", "one row"])
@pytest.mark.parametrize("d", [21, 132])
def test_decode_and_its_products(emulated: Any, lengths: list[int], d: int) -> None:
    """In integers, whose sums are exact in float32."""
    module, N = emulated.module, len(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    latents = torch.cat([torch.randperm(F)[:n] for n in lengths])
    E, values = latents.numel(), integers(latents.numel(), seed=1)
    W, b, target = integers(F, d, seed=2), integers(d, seed=3), integers(N, d, seed=4)
    memory: list[torch.Tensor] = []

    def allocate(size: int) -> int:
        memory.append(torch.empty(size + 64, dtype=torch.uint8))
        return (memory[-1].data_ptr() + 63) & ~63

    rows, of_code = (offsets.data_ptr(),), (values.data_ptr(), latents.data_ptr(), 8)
    out, residual, products = torch.empty(N, d), torch.empty(N, d), torch.empty(E)
    square, grads, row_of = (
        torch.empty(N, dtype=torch.float64),
        torch.empty(E),
        meaning.rows_of(offsets),
    )
    weights = (W.data_ptr(), b.data_ptr())
    module.sparse_decode(N, d, F, rows, 0, *of_code, *weights, out.data_ptr(), 0)
    assert torch.equal(out, meaning.sparse_decode(values, latents, offsets, W, b))
    module.sparse_residual(
        N, d, F, rows, 0, *of_code, *weights, target.data_ptr(), True, 0, d, residual.data_ptr(),
        square.data_ptr(), grads.data_ptr(), 0, allocate, 0,
    )  # fmt: skip
    want = meaning.sparse_residual(values, latents, offsets, W, b, target)
    for g, w in zip((residual, square, grads), want, strict=True):
        assert torch.equal(g, w)
    module.sparse_decode_backward_values(
        E, d, F, (row_of.data_ptr(),), 0, residual.data_ptr(), latents.data_ptr(), 8, W.data_ptr(),
        products.data_ptr(), 0,
    )  # fmt: skip
    assert torch.equal(torch.where(values == 0, 0, products), grads)  # the two halves
    if not E:
        return
    kernels = Kernels(module)
    order = kernels.group_by_latent(values[:, None], latents[:, None], F)
    grad_sq = torch.empty(F, dtype=torch.float64)
    scales, table = torch.ones(1), randn(N, d, seed=5).round()
    group = (order[0], order[1], values, table)
    module.row_grad_sq(
        F, d, 0, d, 0, False, [(*(t.data_ptr() for t in group), (row_of.data_ptr(),), E)],
        scales.data_ptr(), 0, 0, W.data_ptr(), grad_sq.data_ptr(), allocate, 0,
    )  # fmt: skip
    want_W, _ = meaning.sparse_decode_backward_weight(table, values, latents, offsets, F)
    assert torch.equal(grad_sq, want_W.double().square().sum(1))
