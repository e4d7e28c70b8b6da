# SPDX-License-Identifier: Apache-2.0
"""k and the penalty of a step that follow a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import randn

import ksae
from ksae.step.schedule import annealed_k, penalty_share

D, F, N = 8, 32, 64
WITH_K: dict[str, Any] = {
    "topk": ksae.TopK(3),
    "batch": ksae.BatchTopK(3),
    "abs": ksae.AbsTopK(3),
    "norm": ksae.NormTopK(3),
    "grad": ksae.GradTopK(3, beta=0.5),
}


def test_annealed_k() -> None:
    ks = [annealed_k(t, k=4, start=16, steps=100) for t in range(150)]
    assert ks[0] == 16 and ks[100:] == [4] * 50 and sorted(ks, reverse=True) == ks
    assert set(ks) == set(range(4, 17))
    assert [annealed_k(t, k=4, start=2, steps=2) for t in range(4)] == [2, 3, 4, 4]


def test_penalty_share() -> None:
    assert [penalty_share(t, warmup=4) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert penalty_share(0, warmup=0) == 1


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", WITH_K)
def test_a_step_of_another_k(kind: str, fused: bool) -> None:
    """It is that of a model with that k, whose own k stays."""
    torch.manual_seed(0)
    activation, grads = WITH_K[kind], {"grad": randn(N, D, seed=1)} if kind == "grad" else {}
    model = ksae.SAE(D, F, activation, dead_after=10)
    other = ksae.SAE(D, F, activation.scheduled(7, 1.0), dead_after=10)
    other.load_state_dict(model.state_dict())
    step, wide = (ksae.TrainStep(m, 1e-2, fused=fused) for m in (model, other))
    step.k = 7
    for seed in range(3):
        x = randn(N, D, seed=seed)
        got, want = step(x, **grads), wide(x, **grads)
        assert all(torch.equal(got[name], t) for name, t in want.items())
    assert model.activation == activation and model.k == 3
    for name, t in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    step.k = None
    assert step(randn(N, D), **grads)["l0"] <= 3


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", [ksae.ReLU, ksae.Gated, ksae.JumpReLU])
def test_a_share_of_the_penalty(kind: Any, fused: bool) -> None:
    losses, activation = {}, kind(0.1)
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        model = ksae.SAE(D, F, activation)
        model.mean_active.zero_()
        step = ksae.TrainStep(model, fused=fused)
        step.penalty = share
        losses[share] = float(step(randn(N, D, seed=1))["loss"])
        assert model.activation == activation
    assert (
        losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2) and losses[0.0] < losses[1.0]
    )


def test_after_an_error_the_model_has_its_own_k() -> None:
    model = ksae.TopKSAE(D, F, 3)
    step = ksae.TrainStep(model)
    step.k = 5
    with pytest.raises(ValueError, match="x must be of shape"):
        step(randn(N, D + 1))
    assert model.k == 3


def test_messages() -> None:
    step = ksae.TrainStep(ksae.TopKSAE(D, F, 3))
    with pytest.raises(ValueError, match=r"TrainStep: k must be in \[1, 32\]"):
        step.k = 33
    with pytest.raises(TypeError, match=r"TrainStep: k must be an integer, got 2\.5"):
        step.k = 2.5  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"TrainStep: penalty must be 1 with TopK, got 0\.5"):
        step.penalty = 0.5
    with pytest.raises(ValueError, match="TrainStep: penalty must be a finite number >= 0, got -1"):
        step.penalty = -1
    step = ksae.TrainStep(ksae.SAE(D, F, ksae.ReLU()))
    with pytest.raises(ValueError, match="TrainStep: k must be None with ReLU, which has none"):
        step.k = 3
    step = ksae.TrainStep(ksae.SAE(D, F, ksae.GroupMax(4)))
    with pytest.raises(ValueError, match="TrainStep: k must divide 32, the number of latents"):
        step.k = 5
