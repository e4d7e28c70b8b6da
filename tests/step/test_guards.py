# SPDX-License-Identifier: Apache-2.0
"""What a step refuses, warns of and counts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ksae
from ksae.coders import SparseCoder

N, D, F, K = 9, 6, 10, 3
Change = Callable[[SparseCoder], None]


def model(dtype: torch.dtype = torch.float32) -> SparseCoder:
    torch.manual_seed(0)
    return ksae.TopKSAE(D, F, K, dtype=dtype)


def transpose(m: SparseCoder) -> None:
    m.W_dec.data = m.W_dec.data.T.contiguous().T


def tie(m: SparseCoder) -> None:
    m.W_dec = m.W_enc


def share(m: SparseCoder) -> None:
    m.W_dec.data = m.W_enc.data


def overlap(m: SparseCoder) -> None:
    both = torch.zeros(F + 3)
    m.b_enc.data, m.b_dec.data = both[:F], both[F - 3 :]


def stride(m: SparseCoder) -> None:
    m.b_enc.data = torch.zeros(2 * F)[::2]


MEMORY: list[tuple[Change, str]] = [
    (transpose, "W_dec must be contiguous, got strides [1, 10] for shape [10, 6]"),
    (share, "W_dec must have memory of its own, got memory that it shares with W_enc"),
    (overlap, "b_dec must have memory of its own, got memory that it shares with b_enc"),
    (stride, "b_enc must be contiguous, got strides [2] for shape [10]"),
]


def double(m: SparseCoder) -> None:
    m.double()


def cast_one(m: SparseCoder) -> None:
    m.W_dec.data = m.W_dec.data.half()


LATER: list[tuple[Change, str]] = [
    (double, "W_enc must be torch.float32 [10, 6] on cpu as when the step was made, got"),
    (cast_one, "W_dec must be torch.float32 [10, 6] on cpu as when the step was made, got"),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [*MEMORY, (tie, "W_dec must be a parameter of its own, got that of W_enc")],
)
def test_parameters_without_memory_of_their_own_are_refused(
    change: Change, message: str, fused: bool
) -> None:
    sae = model()
    change(sae)
    with pytest.raises(ValueError, match=re.escape(f"TrainStep: {message}")):
        ksae.TrainStep(sae, fused=fused)


@pytest.mark.parametrize(("change", "message"), [*MEMORY, *LATER])
def test_what_changes_between_steps_is_refused_before_anything_is_written(
    change: Change, message: str
) -> None:
    sae = model()
    step = ksae.TrainStep(sae, 1e-2)
    step(torch.randn(N, D))
    change(sae)
    before = {n: t.clone() for n, t in {**sae.state_dict(), **step.state_dict()}.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(f"TrainStep: {message}")):
            step(torch.randn(N, D))
    after = {**sae.state_dict(), **step.state_dict()}
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_masters_are_not_adopted_from_a_model_that_was_cast() -> None:
    sae = model(torch.bfloat16)
    step = ksae.TrainStep(sae, 1e-2)
    masters = {n: t.clone() for n, t in step.masters.items()}
    sae.float()
    with pytest.raises(ValueError, match=r"W_enc must be torch.bfloat16 \[10, 6\] on cpu"):
        step(torch.randn(N, D))
    assert all(torch.equal(step.masters[n], t) for n, t in masters.items())


def test_a_computed_parameter_is_refused() -> None:
    sae = model()
    nn.utils.parametrizations.orthogonal(sae, "W_enc")
    with pytest.raises(ValueError, match="W_enc must be a parameter of its own, got one that is"):
        ksae.TrainStep(sae)


BATCHES: list[tuple[Tensor, str]] = [
    (torch.full((N, D), torch.nan), "x has an entry that is not finite"),
    (torch.ones(1, D), "the target has no variance"),
    (torch.full((N, D), 0.5), "the target has no variance"),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("x", "why"), BATCHES, ids=["nan", "one row", "constant"])
def test_a_step_that_is_not_taken_says_why_once(x: Tensor, why: str, fused: bool) -> None:
    step = ksae.TrainStep(model(), fused=fused)
    step(torch.randn(N, D))
    with pytest.warns(UserWarning, match=re.escape(why)):
        metrics = step(x)
    assert not metrics["loss"].isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x)
        step(torch.randn(N, D))


@pytest.mark.parametrize("fused", [True, False])
def test_counters_count_positive_values_not_selected_ones(fused: bool) -> None:
    sae = model()
    with torch.no_grad():
        sae.b_enc.fill_(-100)  # k latents are selected in each row, all at zero
    step = ksae.TrainStep(sae, 0.0, fused=fused)
    metrics = step(torch.randn(N, D))
    assert metrics["l0"] == 0 and (sae.tokens_since_fired == N).all()
    with torch.no_grad():
        sae.b_enc[4] = 100  # one latent fires, beside k - 1 at zero
    metrics = step(torch.randn(N, D))
    want = torch.full((F,), 2 * N)
    want[4] = 0
    assert metrics["l0"] == 1 and torch.equal(sae.tokens_since_fired, want)
