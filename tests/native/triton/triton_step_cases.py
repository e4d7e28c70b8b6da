# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on the Triton kernels in Triton's interpreter; test_triton_ops.py runs this
file together with triton_ops_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bf16_copies import assert_kept, write
from cases import Implementation, assert_close, assert_same, randn
from implementations import INTERPRETED, Fused

import ksae
from ksae import functional, reference
from ksae.backends import serving as gpu
from ksae.coders.activation import topk as activation
from ksae.kernels import screen
from ksae.step import counters
from ksae.step import fused as step

pytestmark = pytest.mark.implementations(INTERPRETED)


@pytest.mark.parametrize("way", ["product", "fused"])
def test_a_training_step_is_that_of_the_reference(
    impl: Implementation,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second half of the latents is dead: AuxK selects among them."""

    def run(served: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        sae = ksae.TopKSAE(d_in=6, d_sae=20, k=3, dead_after=50, auxk_alpha=1.0).to(dtype)
        sae.tokens_since_fired[10:] = 100
        monkeypatch.setattr(step, "ops", served)
        monkeypatch.setattr(counters, "ops", served)
        monkeypatch.setattr(activation, "ops", served)
        train = ksae.TrainStep(sae, lr=1e-3)
        losses = [train(randn(7, 6, seed=seed).to(dtype))["auxk_loss"] for seed in (1, 2)]
        assert losses[0] > 0
        return [p.detach() for p in sae.parameters()]

    got = run(Fused() if way == "fused" else impl, torch.float32)
    for g, p, e in zip(
        got, run(reference, torch.float32), run(reference, torch.float64), strict=True
    ):
        assert_close("parameter", g, p, e, floor=1e-5)


def skip(train: ksae.TrainStep) -> None:
    """A step that is not finite."""
    W_bf16 = [t.clone() for t in train.state.W_bf16]
    assert train(torch.full((2, 6), torch.nan))["loss"].isnan()
    for now, before in zip(train.state.W_bf16, W_bf16, strict=True):
        assert_same("after a step that is not taken", now, before)


@pytest.mark.parametrize(
    ("dead", "between", "made"),
    [(False, write, 2), (True, skip, 1)],
    ids=["all living, write", "half dead, skip"],
)
def test_steps_with_a_kept_shadow_are_those_that_make_their_own(
    dead: bool,
    between: Callable[[ksae.TrainStep], None],
    made: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 0
    make = screen.bf16_copy

    def counted(*args: Any) -> screen.Bf16Copy:
        nonlocal count
        count += 1
        return make(*args)

    monkeypatch.setattr(screen, "bf16_copy", counted)
    for module in (step, counters, activation, functional):
        monkeypatch.setattr(module, "ops", Fused())

    def run(kept: bool) -> list[torch.Tensor]:
        nonlocal count
        count = 0
        monkeypatch.setattr(gpu, "screens", lambda W, k, aux: kept)
        monkeypatch.setattr(gpu, "bf16_copy", lambda W: screen.bf16_copy(W))
        torch.manual_seed(0)
        sae = ksae.TopKSAE(d_in=6, d_sae=16, k=3, dead_after=50, auxk_alpha=1.0, k_aux=4)
        sae.tokens_since_fired[8:] = 100 * dead
        train = ksae.TrainStep(sae, lr=1e-2)
        train(randn(2, 6, seed=1))
        between(train)
        train(randn(2, 6, seed=2))
        if kept:
            assert_kept(train)
            assert count == made
        else:
            assert train.state.W_bf16 == () and count >= 2
        return [*sae.parameters(), *train.state_dict().values()]

    for got, want in zip(run(True), run(False), strict=True):
        assert_same("kept", got, want)
