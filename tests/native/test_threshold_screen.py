# SPDX-License-Identifier: Apache-2.0
"""threshold_encode behind the bf16 screen: the bits of the unscreened one, on any data."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bf16_dots import bf16_dots, skip_without  # noqa: F401
from cases import integers, on_threads, randn
from torch import Tensor

from ksae.backends import cpu as native

skip_without()
pytestmark = pytest.mark.usefixtures("bf16_dots")


def problem(kind: str, N: int, d: int, F: int) -> list[Tensor]:
    x, W, b, b_dec = (randn(*s, seed=i) for i, s in enumerate([(N, d), (F, d), (F,), (d,)]))
    theta = 2.0 * d**0.5 + randn(F, seed=5)
    match kind:
        case "at the threshold":  # sums are exact, and many are equal to it
            x, W, b, b_dec = (integers(*t.shape, seed=i) for i, t in enumerate([x, W, b, b_dec]))
            theta = theta.round()
        case "dense":
            theta = theta - 2.5 * d**0.5
        case "a dense row":
            x[N // 2] *= 100
        case "not finite":
            x[N // 3, 0], W[F // 2, 0] = torch.nan, torch.inf
            b[1], theta[2], theta[3], theta[4] = torch.nan, torch.nan, torch.inf, -torch.inf
        case "overflow":
            x[N // 2] *= 1e38
        case "negative":
            theta = -theta
        case "small beside the bias":
            b = 1e4 * b
            theta = b + 2.0 * d**0.5
    return [x, W, b, theta, b_dec]


KINDS = (
    "random",
    "at the threshold",
    "dense",
    "a dense row",
    "not finite",
    "overflow",
    "negative",
    "small beside the bias",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N, d, F", [(1, 1, 1), (3, 1, 1), (40, 33, 900), (150, 64, 1000)])
def test_is_the_unscreened_path(kind: str, N: int, d: int, F: int, dtype: torch.dtype) -> None:
    if F == 1 and kind in ("a dense row", "not finite"):
        F = 5
    inputs = [t if i == 3 else t.to(dtype) for i, t in enumerate(problem(kind, N, d, F))]
    before = torch.get_num_threads()
    want = native.threshold_encode_by(*inputs, screen=False)
    try:
        for threads, slack in ((1, 1.0), (2, 1.0), (2, 1e3)):
            torch.set_num_threads(threads)
            got = native.threshold_encode_by(*inputs, screen=True, slack=slack)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_no_bias_of_the_decoder() -> None:
    x, W, b, theta, _ = problem("random", 70, 32, 600)
    want = native.threshold_encode_by(x, W, b, theta, screen=False)
    got = native.threshold_encode_by(x, W, b, theta, screen=True)
    assert all(torch.equal(a, c) for a, c in zip(got, want, strict=True))
    assert 0 < len(want[0]) < 70 * 60


@pytest.mark.parametrize("every", [25, 3])
def test_rows_with_more_candidates_than_room(every: int) -> None:
    """With 25 they spill; with 3 there is no room for all of them."""
    x, W, b, theta, b_dec = problem("random", 150, 64, 3000)
    x[::every] *= 100
    want = native.threshold_encode_by(x, W, b, theta, b_dec, screen=False)
    most = want[2].diff()[::every]
    assert (most > 1000).all()  # more than a row has room for
    screened = partial(native.threshold_encode_by, x, W, b, theta, b_dec, screen=True)
    for got in on_threads(screened, (1, 2)):
        assert all(torch.equal(a, c) for a, c in zip(got, want, strict=True))
