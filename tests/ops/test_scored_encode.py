# SPDX-License-Identifier: Apache-2.0
"""What a selection was made by: scores beside the values, from every implementation."""

from __future__ import annotations

import pytest
import torch
from cases import Implementation, assert_same, randn
from implementations import ON_HOST

import ksae
from ksae import ops, reference

N, d, F, k = 37, 24, 700, 9


@pytest.mark.implementations(*ON_HOST)
@pytest.mark.parametrize("beta", [None, 0.0, 0.5])
def test_the_selection_with_its_scores(
    impl: Implementation, dtype: torch.dtype, beta: float | None
) -> None:
    """Integers: sums are exact. Ties, NaN, rows without a positive score and without a gradient."""
    x, W, b = (
        (randn(*s, seed=i) * 2).round().to(dtype) for i, s in enumerate([(N, d), (F, d), (F,)])
    )
    g = x.flip(0).clone()
    x[3], g[4], x[5] = float("nan"), 0, 0
    by = (None, None, 0.0) if beta is None else (g, W.flip(1), beta)
    got = impl.scored_encode(x, W, b, k, x[0], None, *by)
    want = reference.scored_encode(x, W, b, k, x[0], None, *by)
    for name, a, c in zip(("values", "indices", "scores"), got, want, strict=True):
        assert_same(name, a, c)
    assert got[2].dtype == torch.float32
    plain = (
        ksae.topk_encode(x, W, b, k, x[0])
        if beta is None
        else ksae.grad_topk_encode(x, g, W, b, W.flip(1), k, beta, b_dec=x[0])
    )
    assert_same("values", plain[0], got[0])
    assert_same("indices", plain[1], got[1])


@pytest.mark.implementations(*ON_HOST)
def test_masked_scores_are_the_least(impl: Implementation, dtype: torch.dtype) -> None:
    x, W, b = (
        randn(N, d, dtype=dtype),
        randn(F, d, dtype=dtype, seed=1),
        torch.zeros(F, dtype=dtype),
    )
    mask = torch.arange(F) < 5
    values, indices, scores = impl.scored_encode(x, W, b, k, None, mask)
    assert_same("indices", indices, reference.topk_encode(x, W, b, k, None, mask)[1])
    assert (scores[:, 5:] == -torch.inf).all() and scores[:, :5].isfinite().all()
    assert_same("values", values, torch.where(scores <= 0, 0, scores).to(dtype))


def test_a_mask_with_a_gradient_is_refused() -> None:
    x, W, b = randn(2, d), randn(F, d), torch.zeros(F)
    with pytest.raises(
        ValueError, match=r"scored_encode: mask must be None with grad, got a tensor"
    ):
        ops.scored_encode(x, W, b, k, None, b == 0, x, W)
