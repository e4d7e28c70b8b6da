# SPDX-License-Identifier: Apache-2.0
"""The native routes of grad_topk_encode: pruned, dual, screened and exact give the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import on_threads, randn
from torch import Tensor

from ksae import _cpu
from ksae.backends import cpu as native

ISAS = tuple(_cpu.isas())


@pytest.fixture(params=ISAS)
def isa(request):
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def problem(N=150, d=96, F=3000, d_out=None, seed=0):
    """x, grad, W_enc, b_enc, W_dec with unit rows."""
    width = d if d_out is None else d_out
    W_dec = randn(F, width, seed=seed + 1)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec.clone() if width == d else randn(F, d, seed=seed + 2) / d**0.5
    grad = randn(N, width, seed=seed + 3) / width**0.5  # |grad| about 1
    return [randn(N, d, seed=seed), grad, W_enc, 0.1 * randn(F, seed=seed + 4), W_dec]


def assert_same(args: list[Tensor], k: int, beta: float, mode: str = "additive", b_dec=None):
    """Every route gives the bits of the exact one; the counts of each, by (route, screened)."""
    counts, want = {}, None
    routes = ["dual"] if mode == "multiplicative" else ["dual", "pruned", "auto"]
    for route, screen in itertools.product(routes, [False, True]):
        values, indices, count = native.grad_topk_encode_counted(
            *args, k, beta, mode, b_dec, route=route, screen=screen
        )
        if want is None:
            want = (values, indices)
            assert count[0] == 0  # dual, not screened: no bound is used
        assert torch.equal(indices, want[1]), (route, screen)
        assert torch.equal(values.view(torch.int32), want[0].view(torch.int32)), (route, screen)
        counts[route, screen] = count
    return counts


@pytest.mark.parametrize("mode", ["additive", "signed", "multiplicative"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 4.0])
@pytest.mark.parametrize(
    "N,d,F,k,d_out",
    [
        (150, 96, 3000, 32, None),
        (1, 1, 1, 1, None),
        (14, 33, 65, 7, 20),
        (100, 17, 500, 64, 40),
        (29, 64, 257, 257, None),
        (70, 701, 70, 5, None),  # long rows: the list of survivors lies over them
    ],
)
def test_routes_agree(isa, N, d, F, k, d_out, beta, mode):
    counts = assert_same(problem(N, d, F, d_out), k, beta, mode, 0.1 * randn(d, seed=9))
    if mode != "multiplicative":
        assert counts["pruned", False][0] == N
        assert counts["pruned", False][3] >= k * (N - counts["pruned", False][2])


def test_pruning_computes_few_products(isa):
    counts = assert_same(problem(300, 128, 8192), 32, 0.5)
    rows, survivors, redone, candidates = counts["pruned", False]
    assert (rows, redone) == (300, 0)
    assert 32 * 300 <= survivors <= 40 * 300  # u is exact: little more than the winners
    assert survivors < candidates < 300 * 8192 // 10


def test_auto_prunes_small_weights_only(isa):
    args = problem(100, 128, 8192)
    assert assert_same(args, 32, 0.2)["auto", False][3] > 0
    assert assert_same(args, 32, 50.0)["auto", False][3] == 0


def test_without_the_bound_winners_are_lost(isa):
    """The bound is what makes pruning exact: with slack 0 only u decides what is looked at."""
    args = problem(300, 64, 4096)
    options = {"route": "pruned", "screen": False}
    _, indices, _ = native.grad_topk_encode_counted(*args, 32, 2.0, slack=0.0, **options)
    _, full, _ = native.grad_topk_encode_counted(*args, 32, 2.0, **options)
    assert not torch.equal(indices, full)


def test_overflowing_rows_are_redone(isa):
    """Rows whose bound lets more through than the sample of norms foretold."""
    args = problem(600, 40, 2000)
    args[1][1::9] *= 1e4  # the sample is every ninth row from the first on
    counts = assert_same(args, 16, 0.2)
    assert counts["pruned", False][2] == len(args[1][1::9])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-19, 1e8, 1e18, 1e30, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2, 4], ids=["x", "grad", "W_enc", "W_dec"])
def test_huge_and_tiny_norms(isa, scale, which):
    args = problem(40, 40, 700)
    args[which] = args[which] * scale
    assert_same(args, 16, 0.5)
    assert_same(args, 16, 0.5, "signed")
    assert_same(args, 16, 0.5, "multiplicative")


@pytest.mark.parametrize("mode", ["additive", "signed", "multiplicative"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(isa, value, mode):
    for which in range(5):
        args = problem(50, 32, 600)
        args[which].view(-1)[7] = value
        assert_same(args, 16, 0.5, mode)


def test_ties_and_zero_rows(isa):
    args = problem(60, 32, 1024)
    for which in (2, 4):
        args[which] = args[which][torch.arange(1024) % 64].contiguous()  # ties at place k
    args[3].zero_()
    args[0][::7] = 0
    args[1][::5] = 0
    assert_same(args, 24, 0.5)
    args[2].zero_()
    args[3].fill_(1.0)  # all pre-activations equal: only the gradient tells
    assert_same(args, 24, 0.5)
    args[1].zero_()
    assert_same(args, 24, 0.5)


def test_latents_of_mixed_norms(isa):
    args = problem(100, 64, 2000)
    spread = 10 ** (3 * torch.rand(2000, 1, generator=torch.Generator().manual_seed(5)) - 2)
    args[4] = args[4] * spread
    assert_same(args, 32, 0.5)


def test_ascending_scores(isa):
    args = problem(20, 16, 5000)
    args[0].fill_(1.0)
    args[2] = torch.linspace(0, 1, 5000)[:, None].expand(5000, 16).contiguous()
    assert_same(args, 32, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_threads_and_batch_leave_no_trace(isa, dtype):
    args = [t.to(dtype) for t in problem(1501, 40, 700)]
    run = lambda: native.grad_topk_encode_counted(*args, 16, 0.5)[:2]
    results = on_threads(run, (1, 2, 3, 5))
    part = [args[0][700:731], args[1][700:731], *args[2:]]
    alone = native.grad_topk_encode_counted(*part, 16, 0.5)
    for values, indices in results:
        assert torch.equal(values, results[0][0]) and torch.equal(indices, results[0][1])
        assert torch.equal(values[700:731], alone[0]) and torch.equal(indices[700:731], alone[1])
