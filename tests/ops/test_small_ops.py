# SPDX-License-Identifier: Apache-2.0
"""The small ops of a training step against float64, by every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    Implementation,
    assert_rounded,
    clone_all,
    count_arguments,
    randn,
    scalars_arguments,
    terms_arguments,
    to_float64,
    vector_arguments,
    written,
)
from implementations import HOST, INTERPRETED, ON_CUDA
from torch import Tensor

from ksae import reference

# What the table of ops makes of the host's: no instruction set has its own.
pytestmark = pytest.mark.implementations("reference", HOST, *ON_CUDA, INTERPRETED)
SIZES = ((0, 5), (1, 7), (5, 1), (7, 17), (19, 512), (301, 130), (1030, 33))


def variance(y: Tensor) -> Tensor:
    """By its definition, in float64."""
    y = y.double()
    return (y - y.mean(0)).square().sum() if len(y) else y.sum()


@pytest.mark.parametrize("N,d", SIZES)
def test_total_variance(impl: Implementation, dtype: torch.dtype, N: int, d: int) -> None:
    y = randn(N, d, dtype=dtype) * 3
    got = impl.total_variance(y)
    assert got.dtype == torch.float32 and got.shape == ()
    assert_rounded("variance", got, variance(y))


@pytest.mark.parametrize("case", ["mean", "first row", "late row", "constant", "slice"])
def test_total_variance_of_large_numbers(
    impl: Implementation, dtype: torch.dtype, case: str
) -> None:
    """A mean or a row that is far larger than the spread; strides of a larger matrix."""
    y = randn(530, 45, dtype=dtype)
    match case:
        case "mean":
            y += 1000
        case "first row":
            y[0] = 3e4
        case "late row":
            y[-1] = -3e4
        case "constant":
            y = y[:1].repeat(530, 1)
            assert impl.total_variance(y) <= 1e-9 * float(y.double().square().sum())
            return
        case "slice":
            y = y[3:401, 5:36]
    assert_rounded("variance", impl.total_variance(y), variance(y))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 4])
def test_total_variance_of_what_is_not_finite(
    impl: Implementation, dtype: torch.dtype, bad: float, row: int
) -> None:
    y = randn(9, 6, dtype=dtype)
    y[row, 3] = bad
    assert not impl.total_variance(y).isfinite()


@pytest.mark.parametrize("N", [0, 1, 19, 3001])
@pytest.mark.parametrize("G", [1, 3])
def test_loss_terms(impl: Implementation, N: int, G: int) -> None:
    a = terms_arguments(torch.float32, N, G)
    check_terms(impl, a)


@pytest.mark.parametrize("below", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("term", [0, 1])
def test_loss_terms_without_a_denominator(impl: Implementation, below: float, term: int) -> None:
    """Of the first term it is a number that is not finite; a later term counts nothing."""
    a = terms_arguments(torch.float32)
    a["denominators"][term].fill_(below)
    errors, _, loss, scales = check_terms(impl, a)
    assert errors.isfinite().all()
    if term == 1 and not below > 0:
        assert loss.isfinite() and scales[1] == 0


def check_terms(impl: Implementation, a: dict[str, Any]) -> Any:
    got = impl.loss_terms(*a.values())
    errors = torch.stack([e.sum() for e in a["sq_errors"]])
    below, share = torch.stack(a["denominators"]).double(), torch.tensor(a["shares"]).double()
    counts = (below > 0) | (torch.arange(len(below)) == 0)
    terms, scales = (torch.where(counts, t / below, 0) for t in (errors, 2 * share))
    exact = (errors, terms, (share * terms).sum(), scales)
    for name, g, e in zip(("errors", "terms", "loss", "scales"), got, exact, strict=True):
        assert g.dtype == torch.float32
        assert_rounded(name, g, e)
    return got


@pytest.mark.parametrize("t", [0, 1, 3000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.5, 0.0)])
@pytest.mark.parametrize(
    ("norm", "always"), [(None, False), *((n, b) for n in (0.0, 0.3, 40.0) for b in (False, True))]
)
def test_adam_scalars(
    impl: Implementation, t: int, betas: tuple[float, float], norm: float | None, always: bool
) -> None:
    a = scalars_arguments(torch.float32, clip=norm is not None)
    a |= {"decoder_lr": 3.0, "always": always}
    a["t"].fill_(t)
    a["constants"][:2] = torch.tensor(betas, dtype=torch.float64)
    if norm is not None:
        a["norm"].fill_(norm)
    hyper, taken, scales, of_decoder = impl.adam_scalars(*a.values())
    exact = reference.adam_scalars(*to_float64(a).values())
    assert hyper.dtype == torch.float32 and taken.dtype == torch.bool and bool(taken)
    wanted = exact[0].float()
    if norm == 0 and always:  # float64 has smaller norms
        wanted[5] = 1.25 / torch.finfo(torch.float32).tiny
    torch.testing.assert_close(hyper, wanted, rtol=3e-7, atol=0)  # each of them
    assert torch.equal(of_decoder[1:], hyper[1:]) and of_decoder[0] == hyper[0] * 3
    if norm is not None and always:
        torch.testing.assert_close(hyper[5] * norm, torch.tensor(1.25 * (norm > 0)))
    assert torch.equal(scales, a["scales"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["loss", "norm"])
def test_adam_scalars_of_a_step_that_is_not_taken(
    impl: Implementation, bad: float, name: str
) -> None:
    a = scalars_arguments(torch.float32)
    a[name].fill_(bad)
    _, taken, scales, _ = impl.adam_scalars(*a.values())
    assert not taken and scales.isnan().all()


@pytest.mark.parametrize("shape", [(0,), (1,), (33,), (1000,), (17, 19)], ids=str)
@pytest.mark.parametrize("G,extras", [(1, False), (2, True)], ids=["one gradient", "two, weighted"])
def test_vector_update(
    impl: Implementation, dtype: torch.dtype, shape: tuple[int, ...], G: int, extras: bool
) -> None:
    a = vector_arguments(dtype, *shape, G=G, extras=extras)
    exact = to_float64(a)
    impl.vector_update(*a.values())
    reference.vector_update(*exact.values())
    for name, t in written(a).items():
        assert_rounded(name, t, written(exact)[name])
    if a["master"] is not None:
        assert torch.equal(a["p"], a["master"].to(dtype))


def test_vector_update_that_is_not_taken(impl: Implementation, dtype: torch.dtype) -> None:
    a = vector_arguments(dtype, 33)
    a["taken"].fill_(False)
    a["scales"].fill_(torch.nan)
    before = clone_all(a)
    impl.vector_update(*a.values())
    assert all(torch.equal(t, before[name]) for name, t in written(a).items())


@pytest.mark.parametrize("F", [1, 33, 4097, 70_001])
@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.interpreted(where=lambda F, taken: F < 5000)
def test_count_tokens(impl: Implementation, F: int, taken: bool) -> None:
    """Latents on both sides of each bound; runs of one block, of several, and a rest."""
    a = count_arguments(torch.float32, F)
    a["taken"].fill_(taken)
    a["since"][0] = a["dead_after"]
    before, fired = a["since"].clone(), a["offsets"].diff() > 0
    l0, dead, soon = impl.count_tokens(*a.values())
    after = torch.where(fired, 0, before + 64) if taken else before
    assert torch.equal(a["since"], after) and a["t"] == 6 + taken
    assert soon.dtype == torch.int64 and soon == (after > 300).sum()
    number = torch.float32
    assert l0.dtype == dead.dtype == number
    assert torch.equal(l0, torch.tensor(int(a["offsets"][-1]) / 64, dtype=number))
    assert torch.equal(dead, torch.tensor(float((before > 500).sum())) / F)
