# SPDX-License-Identifier: Apache-2.0
"""Certified screening: the bf16 screen plus float32 rescoring is the float32 path, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bf16_dots import bf16_dots, skip_without  # noqa: F401
from cases import on_threads

from ksae.backends import cpu as native

skip_without()
pytestmark = pytest.mark.usefixtures("bf16_dots")


def encode(x, W, b, k, b_dec=None, mask=None, **options):
    return native.topk_encode_counted(x, W, b, k, b_dec, mask, **options)


def assert_same(x, W, b, k, b_dec=None, mask=None, **options):
    """Screened equals unscreened; returns (rows screened, survivors, rows redone)."""
    values, indices, counts = encode(x, W, b, k, b_dec, mask, screen=True, **options)
    full_values, full_indices, _ = encode(x, W, b, k, b_dec, mask, screen=False)
    assert torch.equal(indices, full_indices)
    assert torch.equal(values.view(torch.int32), full_values.view(torch.int32))
    return counts


def problem(N=150, d=96, F=3000, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(F, d, generator=g) / d**0.5
    b = 0.1 * torch.randn(F, generator=g)
    return torch.randn(N, d, generator=g), W, b, 0.1 * torch.randn(d, generator=g)


@pytest.mark.parametrize(
    "N,d,F,k",
    [
        (150, 96, 3000, 32),
        (1, 1, 1, 1),
        (14, 33, 65, 7),
        (100, 17, 500, 64),
        (29, 64, 257, 257),
        (70, 701, 70, 5),  # long rows: the list of survivors lies over them
    ],
)
def test_is_the_float32_path(N, d, F, k):
    x, W, b, b_dec = problem(N, d, F)
    rows, survivors, _ = assert_same(x, W, b, k, b_dec)
    assert rows == N
    assert survivors >= 0


def test_survivors_are_few_on_random_data():
    x, W, b, b_dec = problem(512, 256, 8192)
    rows, survivors, redone = assert_same(x, W, b, 32, b_dec)
    assert rows == 512
    assert redone == 0
    assert 32 * rows <= survivors <= 3 * 32 * rows


def test_loose_bound_redoes_every_row():
    x, W, b, b_dec = problem()
    rows, _, redone = assert_same(x, W, b, 32, b_dec, slack=1e4)
    assert redone == rows == len(x)


def test_moderately_loose_bound_keeps_more():
    x, W, b, b_dec = problem()
    tight = assert_same(x, W, b, 8, b_dec)
    loose = assert_same(x, W, b, 8, b_dec, slack=4.0)
    assert loose[1] > tight[1]


def test_without_the_bound_winners_are_lost():
    """The bound is what makes it exact: with slack 0 the bf16 ranking shows."""
    x, W, b, b_dec = problem(2000, 64, 8192)
    _, indices, _ = encode(x, W, b, 32, b_dec, screen=True, slack=0.0)
    _, full, _ = encode(x, W, b, 32, b_dec, screen=False)
    assert not torch.equal(indices, full)


def test_proven_bound_holds_in_float64():
    """|s - s^| <= m with the chain of the kernel emulated: bf16 inputs, float32 accumulators."""
    x, W, _, _ = problem(40, 768, 200)
    d = x.shape[1]
    x16, W16 = x.bfloat16().double(), W.bfloat16().double()
    exact = x.double() @ W.double().T
    screened = torch.zeros(len(x), len(W))
    for j in range(d):  # one rounding a product is at least as many as the instruction makes
        screened += (x16[:, j, None] * W16[None, :, j]).float()
    norm = lambda t: t.double().norm(dim=1)
    g = (d + 16) * 2.0**-23
    bound = norm(x)[:, None] * (1 + g) * norm(W - W.bfloat16().float())[None]
    bound = (
        bound
        + (norm(x - x.bfloat16().float()) + g * (norm(x16) + norm(x)))[:, None] * norm(W16)[None]
    )
    assert ((screened.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-19, 1e-8, 1e8, 1e18, 1e30, 3e38])
@pytest.mark.parametrize("which", ["x", "W", "both"])
def test_huge_and_tiny_norms(scale, which):
    x, W, b, _ = problem(60, 40, 700)
    if which in ("x", "both"):
        x = x * scale
    if which in ("W", "both"):
        W = W * scale
    assert_same(x, W, b * 0, 16)
    assert_same(x, W, b, 16)


def test_rows_and_latents_of_mixed_norms():
    x, W, b, b_dec = problem(200, 64, 2000)
    g = torch.Generator().manual_seed(1)
    x = x * 10 ** (12 * torch.rand(200, 1, generator=g) - 6)
    W = W * 10 ** (6 * torch.rand(2000, 1, generator=g) - 3)
    assert_same(x, W, b, 32, b_dec)


def test_outlier_dimensions():
    x, W, b, b_dec = problem(200, 96, 3000)
    x[:, 5] += 300.0  # a massive activation that every latent reads alike: it moves all scores
    x[:, 41] -= 100.0  # together, while its rounding error dwarfs what tells them apart
    W[:, 5] = W[:, 41] = 0.1
    _, _, redone = assert_same(x, W, b, 32, b_dec)
    assert redone > 0  # the bound asks for it, and the result is still exact


def test_near_ties_and_ties():
    x, W, b, _ = problem(100, 64, 1024)
    W = W[torch.arange(1024) % 64]  # every score sixteen times: ties at place k
    assert_same(x, W, b * 0, 24)
    W = W + 1e-7 * torch.randn(1024, 64, generator=torch.Generator().manual_seed(2))
    assert_same(x, W, b * 0, 24)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(value):
    for target in ("x", "W", "b"):
        x, W, b, _ = problem(50, 32, 600)
        t = {"x": x, "W": W, "b": b}[target]
        t.view(-1)[7] = value
        assert_same(x, W, b, 16)


def test_zero_rows_and_zero_weights():
    x, W, b, _ = problem(50, 32, 900)
    x[::2] = 0
    W[100:700] = 0
    assert_same(x, W, b, 16)
    assert_same(x, W, b * 0, 16)


@pytest.mark.parametrize("share", [0.0, 0.005, 0.1, 1.0])
def test_mask(share):
    x, W, b, b_dec = problem(70, 48, 1500)
    mask = torch.rand(1500, generator=torch.Generator().manual_seed(3)) < share
    assert_same(x, W, b, 32, b_dec, mask)


def test_ascending_scores_fill_the_buffer_again_and_again():
    """Frequency-ordered dictionaries, the wrong way round: every latent beats the ones before."""
    x = torch.ones(20, 16)
    W = torch.linspace(0, 1, 5000)[:, None].expand(5000, 16).contiguous()
    assert_same(x, W, torch.zeros(5000), 32)


@pytest.mark.parametrize("N,d,F", [(3001, 40, 700), (4001, 701, 90)])
def test_many_chunks_and_threads(N, d, F):
    x, W, b, b_dec = problem(N, d, F)
    run = lambda: encode(x, W, b, 16, b_dec, screen=True)[:2]
    results = on_threads(run, (1, 2, 3, 5))
    for values, indices in results[1:]:
        assert torch.equal(values, results[0][0])
        assert torch.equal(indices, results[0][1])


NEARLY = 0.99 * 2.0**-8  # of numbers just above 1, what rounding to bf16 loses at most is 2^-8


def opposite(d):
    """Two vectors [d] of numbers just above 1 whose roundings all go the other way, half by half:
    up and down against (1, -1). Times (1, -1) they are nearly 0, their copies are far apart."""
    down, up = torch.full((d // 2,), 1 + NEARLY), torch.full((d // 2,), 1 + 2.0**-7 - NEARLY)
    return torch.cat([down, up]), torch.cat([up, down])


@pytest.mark.parametrize("rounded", ["x", "W"])
def test_the_winner_by_nearly_the_whole_bound(rounded):
    """All that rounding loses goes against the winner and for the other; with a twentieth of the
    bound less the winner is lost, whichever of the two is rounded."""
    d, F, winner, other = 64, 100, 70, 20
    sign = torch.cat([torch.ones(d // 2), -torch.ones(d // 2)])
    below, above = opposite(d)
    W, b = torch.zeros(F, d), torch.full((F,), -1000.0)
    if rounded == "x":
        x, W[winner], W[other] = below[None], sign, -sign
    else:
        x, W[winner], W[other] = sign[None], below, above
    b[other], b[winner] = 0, 0.02 * d * 2.0**-7
    x = x.repeat(15, 1)
    rows, survivors, redone = assert_same(x, W, b, 1)
    assert rows == 15 and redone == 0 and survivors == 30  # these two, and only by the bound
    assert (encode(x, W, b, 1, screen=True)[1] == winner).all()
    assert (encode(x, W, b, 1, screen=True, slack=0.95)[1] == other).all()


def test_a_large_bias_rounds_two_scores_past_each_other():
    """What rounding loses of the two sums is small, but it takes each of them over the middle of
    two numbers next to the bias: the winner's score is rounded up, that of its copies down."""
    d, F, winner, other = 64, 100, 70, 20
    below, _ = opposite(d)
    x = torch.cat([below, torch.ones(1)]).repeat(15, 1)
    sign = 1.25 * 2.0**-9 * torch.cat([torch.ones(d // 2), -torch.ones(d // 2)])
    W, b = torch.zeros(F, d + 1), torch.full((F,), -1000.0)
    b[[winner, other]] = 2.0**20  # its neighbour is 2^-3 above, the middle 2^-4
    W[winner] = torch.cat([sign, torch.tensor([2.0**-4 + 2.0**-11])])
    W[other] = torch.cat([-sign, torch.tensor([2.0**-4 - 2.0**-11])])
    _, survivors, redone = assert_same(x, W, b, 1)
    values, indices, _ = encode(x, W, b, 1, screen=True)
    assert (indices == winner).all() and (values == 2.0**20 + 2.0**-3).all()
    assert redone == 0 and survivors == 30
    assert (encode(x, W, b, 1, screen=True, slack=0.0)[1] == other).all()
