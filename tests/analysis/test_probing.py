# SPDX-License-Identifier: Apache-2.0
"""Sparse probing: the regression by its own optimum, planted classes, bad input."""

from __future__ import annotations

import re

import pytest
import torch

import ksae
from ksae.analysis.probing import logistic_regression, mean_codes, sparse_probing


@pytest.mark.parametrize("separable", [False, True])
def test_the_regression_is_at_its_optimum(separable: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(80, 5, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 1, 0])
    y = (x[:, 0] + (0 if separable else 2) * torch.randn(80) > 0.3).double()
    w, b = logistic_regression(x, y)
    p = torch.sigmoid(x @ w + b)
    torch.testing.assert_close(x.T @ (p - y) + w, torch.zeros_like(w), atol=1e-5, rtol=0)
    assert abs(float((p - y).sum())) < 1e-5  # the constant is not penalised
    assert w[0] > 0.5 and w[4] == 0


def planted(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Class i has latent 3 i higher; latent 1 is the largest of all, and says nothing."""
    generator = torch.Generator().manual_seed(seed)
    classes = {}
    for i in range(3):
        x = torch.rand(n, 12, generator=generator)
        x[:, 3 * i] += 0.9
        x[:, 1] = 3 * torch.rand(n, generator=generator)
        classes["abc"[i]] = x
    return classes


def test_few_latents_tell_planted_classes_apart() -> None:
    train, test = planted(200, 0), planted(100, 1)
    got = sparse_probing(train, test, (1, None), seed=3)
    # latent 3 i alone: U(0.9, 1.9) against U(0, 1), which a threshold in [0.9, 1] splits
    assert got[1] > 0.93 and got[None] > 0.93
    assert got == sparse_probing(train, test, (1, None), seed=3)
    shuffled = {name: torch.cat(list(train.values()))[i::3] for i, name in enumerate(train)}
    assert abs(sparse_probing(shuffled, test, (1,))[1] - 0.5) < 0.2


def test_a_text_is_the_mean_of_its_tokens_codes() -> None:
    torch.manual_seed(0)
    sae = ksae.SAE(6, 10, ksae.BatchTopK(2)).train()
    before = sae.tokens_since_fired.clone()
    texts = [torch.randn(3, 6), torch.randn(1, 6)]
    got = mean_codes(sae, texts)
    assert got.shape == (2, 10) and sae.training
    assert torch.equal(sae.tokens_since_fired, before)
    sae.eval()
    want = torch.stack([sae.encode_dense(x).mean(0) for x in texts]).detach()
    torch.testing.assert_close(got, want)
    assert mean_codes(sae, []).shape == (0, 10)
    with pytest.raises(ValueError, match="text 1 must have a token"):
        mean_codes(sae, [texts[0], texts[0][:0]])


def test_bad_input() -> None:
    x = torch.rand(4, 3)
    for train, test, ks, message in (
        ({"a": x}, {"a": x}, (1,), "two classes or more"),
        ({"a": x, "b": x}, {"a": x, "c": x}, (1,), "the same in train and test"),
        ({"a": x, "b": x[:0]}, {"a": x, "b": x}, (1,), "class 'b' must be of shape [n, F]"),
        ({"a": x, "b": x}, {"a": x, "b": x}, (4,), "k must be in [1, 3], got 4"),
        ({"a": x, "b": x}, {"a": x, "b": x}, (0,), "k must be in [1, 3], got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sparse_probing(train, test, ks)
