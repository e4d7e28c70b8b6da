# SPDX-License-Identifier: Apache-2.0
"""Metrics against direct float64 formulas, and the properties that tell the flavours apart."""

from __future__ import annotations

import math

import pytest
import torch

from ksae.analysis.metrics import DEFINITIONS, Accumulator

N, d, F, k = 203, 12, 40, 5


def batch(seed: int = 0, offset: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, d, generator=g, dtype=torch.float64) + offset
    recon = 0.8 * x + 0.3 * torch.randn(N, d, generator=g, dtype=torch.float64)
    values = torch.randn(N, k, generator=g).relu()  # about half of the slots carry zero
    indices = torch.rand(N, F, generator=g).topk(k).indices
    return x, recon, values, indices


def run(x, recon, values, indices, size: int = N) -> dict[str, float]:
    accumulator = Accumulator(x.shape[1], F)
    for part in zip(*(t.split(size) for t in (x, recon, values, indices)), strict=True):
        accumulator.update(*part)
    return accumulator.results()


def test_every_metric_is_its_formula():
    x, recon, values, indices = batch()
    e = x - recon
    dense = torch.zeros(N, F).scatter(1, indices, values)
    norm, centred = x.norm(dim=1), x - x.mean(0)
    expected = {
        "fvu": e.square().sum() / centred.square().sum(),
        "nmse": (e.norm(dim=1) / norm).square().mean(),
        "explained_variance": 1 - e.square().sum() / centred.square().sum(),
        "explained_variance_centred": 1 - e.var(0).sum() / x.var(0).sum(),
        "explained_variance_legacy": (1 - e.square().sum(1) / centred.square().sum(1)).mean(),
        "mse": e.square().mean(),
        "squared_error": e.square().sum(1).mean(),
        "l0": (dense > 0).sum(1).double().mean(),
        "dead": (dense <= 0).all(0).double().mean(),
        "shrinkage": recon.square().sum() / (x * recon).sum(),
        "norm_ratio": (recon.norm(dim=1) / norm).mean(),
        "cosine": torch.cosine_similarity(x, recon).mean(),
    }
    got = run(x, recon, values, indices)
    assert set(got) == set(expected) == set(DEFINITIONS)
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), rel=1e-11), name


def test_frequency_counts_positive_slots_only():
    values = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]])
    indices = torch.tensor([[0, 1], [0, 2], [3, 1]])
    accumulator = Accumulator(4, 5)
    accumulator.update(torch.randn(3, 4), torch.zeros(3, 4), values, indices)
    assert torch.equal(accumulator.fired, torch.tensor([2, 0, 1, 0, 0]))
    assert accumulator.frequency().tolist() == [2 / 3, 0, 1 / 3, 0, 0]
    results = accumulator.results()
    assert results["l0"] == 1.0
    assert results["dead"] == 3 / 5


@pytest.mark.parametrize("c", [1e-3, 7.0, 1e4])
def test_scale_free_metrics_do_not_change_with_the_scale_of_x(c: float):
    x, recon, values, indices = batch()
    before, after = run(x, recon, values, indices), run(c * x, c * recon, values, indices)
    for name in DEFINITIONS:
        factor = c * c if name in ("mse", "squared_error") else 1.0
        assert after[name] == pytest.approx(factor * before[name], rel=1e-9), name
    # the formula that is left out on purpose fails this
    new = [
        1 - m["squared_error"] / (p - (p / d) ** 2)
        for m, p in ((before, sq(x)), (after, sq(c * x)))
    ]
    assert abs(new[0] - new[1]) > 1e-2


def sq(x: torch.Tensor) -> float:
    return float(x.square().sum(1).mean())


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_changes_only_the_legacy_flavour(size: int):
    whole, parts = run(*batch()), run(*batch(), size)
    for name in set(DEFINITIONS) - {"explained_variance_legacy"}:
        assert parts[name] == pytest.approx(whole[name], rel=1e-11), name
    assert parts["explained_variance_legacy"] != pytest.approx(
        whole["explained_variance_legacy"], rel=1e-6
    )


def test_fvu_sees_a_constant_error_of_the_bias_and_the_centred_flavour_does_not():
    x, recon, values, indices = batch()
    good, shifted = run(x, recon, values, indices), run(x, recon - 0.5, values, indices)
    name = "explained_variance_centred"
    assert shifted[name] == pytest.approx(good[name], rel=1e-9)
    assert shifted["fvu"] > good["fvu"] + 0.01


def test_float32_input_is_accumulated_in_float64():
    x, recon, values, indices = batch(offset=300.0)  # mean^2 / variance is 1e5
    x, recon = x.float(), recon.float()
    e = x.double() - recon.double()
    expected = e.square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert run(x, recon, values, indices, 10)["fvu"] == pytest.approx(float(expected), rel=1e-9)


def test_perfect_constant_and_zero_rows():
    x, _, values, indices = batch()
    perfect = run(x, x, values, indices)
    assert perfect["fvu"] == perfect["mse"] == 0
    assert perfect["cosine"] == pytest.approx(1)
    zeros = run(torch.zeros(N, d), torch.zeros(N, d), values, indices)
    assert zeros["mse"] == 0
    assert math.isnan(zeros["fvu"]) and math.isnan(zeros["nmse"])  # no variance, no ratio
    x[0] = 0  # one row without a ratio
    assert run(x, 0.5 * x, values, indices)["norm_ratio"] == pytest.approx(0.5)


def test_bad_input():
    x, recon, values, indices = batch()
    accumulator = Accumulator(d, F)
    with pytest.raises(ValueError, match="at least one token"):
        accumulator.results()
    with pytest.raises(ValueError, match=r"x must be of shape \[N, 12\], got \[203, 11\]"):
        accumulator.update(x[:, 1:], recon, values, indices)
    with pytest.raises(ValueError, match="recon must have the shape of x"):
        accumulator.update(x, recon[1:], values, indices)
    with pytest.raises(ValueError, match="values and indices"):
        accumulator.update(x, recon, values[1:], indices[1:])
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[3, 2] = bad
        with pytest.raises(ValueError, match="x must be finite"):
            accumulator.update(y, recon, values, indices)
    assert accumulator.tokens == 0
