# SPDX-License-Identifier: Apache-2.0
"""Screened encodes of float32, whose bf16 product comes from a library: the float32 result, bit for
bit, whatever the bound lets pass.

The numbers are integers of more bits than bf16 has, times powers of two: a float32 sum of their
products is exact in any order, and what their bf16 copies lose is not small.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    Implementation,
    assert_close,
    assert_norms,
    assert_same,
    integers,
    randn,
)
from implementations import EMULATED, GPU, INTERPRETED, OnCuda, to
from screened_cases import ALL, CASES, inputs, near
from torch import Tensor

from ksae import reference
from ksae.backends import cuda
from ksae.backends import product as products

pytestmark = pytest.mark.implementations(EMULATED, GPU, INTERPRETED)
NAN, INF = torch.nan, torch.inf


def kernels_of(impl: Implementation) -> Any:
    return cuda.kernels if impl.name == "cuda" else impl.kernels


def device_of(impl: Implementation) -> str:
    return "cuda" if isinstance(impl, OnCuda) else "cpu"


def screened(
    impl: Implementation,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    mask: Tensor | None = None,
    *,
    capacity: int = 0,
    chunk: int = 2,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor, int]:
    """Values, indices and how many rows were scored in full."""
    x, W, b, mask = to([x, W, b, mask], device_of(impl))
    kernels = kernels_of(impl)
    (rounded, x_norms), (W_bf16, norms) = kernels.bf16_copy(x), kernels.bf16_copy(W)
    screen = kernels._screen(x, W, b, slack * x_norms, norms, k, mask, capacity)
    for n in range(0, len(x), chunk):
        screen.select(products._scores(rounded[n : n + chunk], W_bf16), n)
    values, indices = screen.result()
    return values.cpu(), indices.cpu(), len(set(screen.redone().tolist()))


@pytest.mark.parametrize("case", CASES)
def test_is_the_float32_result(impl: Implementation, case: str) -> None:
    x, W, b, k, mask = inputs(case)
    room = 2 ** (k + 31).bit_length()
    capacity = 0 if case == "random" else 2048 if "room" in case else max(room, 64)
    *got, redone = screened(impl, x, W, b, k, mask, capacity=capacity)
    want = reference.topk_encode(x, W, b, k, None, mask)
    assert_same("indices", got[1], want[1])
    assert_same("values", got[0], want[0])
    rows = CASES[case]
    assert rows is None or redone == (len(x) if rows == ALL else rows)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_do_not_show(impl: Implementation, chunk: int) -> None:
    """Rows of the chunks before and after stay what they are; one of each has no proof."""
    x, W, b = integers(7, 20, top=511), integers(160, 20, top=511, seed=1), integers(160, seed=2)
    x[1::3, 2] = NAN
    *got, redone = screened(impl, x, W, b, 6, capacity=64, chunk=chunk)
    want = reference.topk_encode(x, W, b, 6)
    assert_same("indices", got[1], want[1])
    assert_same("values", got[0], want[0])
    assert redone == 2


def test_paths_agree(impl: Implementation) -> None:
    """Normal numbers: scored as one of few or in full, a latent has the same bits."""
    x, W, b = randn(3, 50), randn(200, 50, seed=1), randn(200, seed=2)
    *few, none = screened(impl, x, W, b, 6, capacity=128)
    *full, all_of_them = screened(impl, x, W, b, 6, capacity=64, slack=1e6)
    assert (none, all_of_them) == (0, 3)
    assert torch.equal(few[0], full[0]) and torch.equal(few[1], full[1])
    exact = reference.topk_encode(x.double(), W.double(), b.double(), 6)
    assert_same("indices", few[1], exact[1])
    assert_close("values", few[0], reference.topk_encode(x, W, b, 6)[0], exact[0])


def test_the_bound_is_what_makes_it_exact(impl: Implementation) -> None:
    """With a row's norms left out, the ranking of bf16 shows."""
    x, b, W = integers(2, 20, top=511), torch.zeros(100), near(100, 20)
    *got, redone = screened(impl, x, W, b, 9, slack=0.0)
    assert redone == 0 and not torch.equal(got[1], reference.topk_encode(x, W, b, 9)[1])


@pytest.mark.parametrize("d", [1, 5, 128, 1300])
def test_copies_and_norms(impl: Implementation, d: int) -> None:
    t = integers(9, d, top=511)
    t[0], t[1], t[2] = 0, t[1] * 2.0**-80, t[2] * 2.0**58
    t[3, 0], t[4, -1] = NAN, INF
    copy, norms = kernels_of(impl).bf16_copy(t.to(device_of(impl)))
    assert_same("copy", copy.cpu(), t.bfloat16())
    assert_norms(norms.cpu(), t, copy.cpu())


def test_as_the_table_calls_it(impl: Implementation) -> None:
    """Centred, by a kept copy, and the two selections of a step."""
    on = device_of(impl)
    x, W, b = (integers(*s, top=511, seed=i) for i, s in enumerate([(4, 9), (700, 9), (700,)]))
    kernels, b_dec, dead = kernels_of(impl), integers(9, seed=3), torch.arange(700) % 3 == 0
    kept = kernels.bf16_copy(W.to(on))
    for args in ((x, W, b, 7, b_dec, None, *kept), (x[:0], W, b, 7), (x, W, b, 7, None, dead)):
        want = reference.topk_encode(*args[:6])
        for g, w in zip(kernels.screened_topk_encode(*to(args, on)), want, strict=True):
            assert_same("topk_encode", g.cpu(), w)
    for k_aux in (9, 300):  # screened and not
        for score in ((), (x.flip(0), W.flip(0), 0.5, "signed")):
            args = (x, W, b, 7, k_aux, dead, b_dec, *score)
            want = reference.topk_encode_aux(*args)
            for g, w in zip(kernels.screened_topk_encode_aux(*to(args, on)), want, strict=True):
                assert_same("topk_encode_aux", g.cpu(), w)
