# SPDX-License-Identifier: Apache-2.0
"""What a coder starts from: the geometric median, biases and the scale of the encoder."""

from __future__ import annotations

import pytest
import torch
from cases import randn

import ksae
from ksae.coders.initialize import geometric_median, initialize_from

D, OUT, F, K = 12, 10, 40, 4


def test_geometric_median() -> None:
    x = torch.cat(
        [randn(200, 3), randn(20, 3, seed=1) + 1000]
    )  # outliers move the mean, not the median
    median = geometric_median(x, tol=1e-7)
    pull = (x - median) / (x - median).norm(dim=1, keepdim=True)
    assert pull.mean(0).norm() < 1e-3 and median.norm() < 1
    assert geometric_median(x.bfloat16()).dtype == torch.float32


def test_geometric_median_at_a_point() -> None:
    """Where the guess coincides with rows, 1/distance has no value; the start does here."""
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    torch.testing.assert_close(geometric_median(cross), torch.zeros(2))
    torch.testing.assert_close(geometric_median(torch.ones(4, 3)), torch.ones(3))
    torch.testing.assert_close(
        geometric_median(torch.tensor([[2.0, 5.0]])), torch.tensor([2.0, 5.0])
    )
    # the mean of these is the row (1, 0), which is not the median: the iteration has to leave it
    away = torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 0], [4, 0]])
    assert torch.equal(away.mean(0), away[0])
    assert geometric_median(away, max_iter=1000, tol=1e-9).norm() < 1e-2


def test_initialize_from() -> None:
    x, y = randn(50, D) + 3, randn(50, OUT) - 2
    model = ksae.TopKSAE(D, F, K)
    initialize_from(model, x.reshape(5, 10, D))
    torch.testing.assert_close(model.b_dec.detach(), geometric_median(x))
    torch.testing.assert_close(model.W_enc.detach(), 0.1 * model.W_dec.detach())
    for again in (model, ksae.TopKSAE(D, F, K)):  # one that is not as it was made is left
        with torch.no_grad():
            again.W_enc[0, 0] += 1
        before = again.W_enc.detach().clone()
        initialize_from(again, x)
        assert torch.equal(again.W_enc, before)
    tied = ksae.TopKSAE(D, F, K)
    initialize_from(tied, x, encoder_scale=1.0)
    assert torch.equal(tied.W_enc, tied.W_dec)
    jump = ksae.SAE(D, F, ksae.JumpReLU())
    initialize_from(jump, x)
    assert torch.equal(jump.W_enc, jump.W_dec)
    with pytest.raises(ValueError, match="encoder_scale must be a finite number above 0, got 0"):
        initialize_from(model, x, encoder_scale=0)
    other = ksae.Transcoder(D, OUT, F, K)
    initialize_from(other, x, y)
    torch.testing.assert_close(other.b_dec.detach(), y.mean(0))
    torch.testing.assert_close(
        (x @ other.W_enc.T + other.b_enc).mean(0), torch.zeros(F), atol=1e-5, rtol=0
    )
    x[3, 4] = torch.nan
    with pytest.raises(ValueError, match="geometric_median: x must be finite"):
        initialize_from(model, x)
    with pytest.raises(ValueError, match="initialize_from: x must be a finite sample"):
        initialize_from(other, x, y)
    with pytest.raises(
        ValueError, match="initialize_from: y must be given for a transcoder, got None"
    ):
        initialize_from(other, x)
