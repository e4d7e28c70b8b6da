# SPDX-License-Identifier: Apache-2.0
"""What the phases of the fused step compute beside the ops."""

from __future__ import annotations

import torch
from cases import randn

from ksae.ops import product
from ksae.step.phases import in_parts, weighted_rows


def test_three_bfloat16_numbers_are_a_float32_number() -> None:
    g = randn(500) * 2.0 ** torch.arange(-60, 65).repeat(4)
    parts = in_parts(g, torch.bfloat16)
    assert parts.dtype == torch.bfloat16 and torch.equal(parts.double().sum(0).float(), g)


def test_a_weighted_sum_of_rows_in_parts() -> None:
    W, g = randn(300, 7, seed=1).bfloat16(), randn(300)
    exact = W.double().T @ g.double()
    for got in (weighted_rows(W, g), product(in_parts(g, torch.bfloat16), W).sum(0)):
        assert (got.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
