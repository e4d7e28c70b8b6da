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
    hidden_winners,
    integers,
    randn,
)
from implementations import EMULATED, GPU, INTERPRETED, OnCuda, to
from torch import Tensor

from ksae import reference
from ksae.backends import cuda
from ksae.backends import product as products

pytestmark = pytest.mark.implementations(EMULATED, GPU, INTERPRETED)
INF, NAN = torch.inf, torch.nan


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


def near(F: int, d: int) -> Tensor:
    """Latents that bf16 cannot tell apart."""
    return integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3)


ALL = -1  # rows that are expected to be scored in full
CASES: dict[str, int | None] = {
    "random": 0,
    "one row": 0,
    "k is F": 0,
    "wide": 0,
    "long rows": 0,
    "near ties, room for all": 0,
    "near ties, overflow": ALL,
    "near ties, masked": ALL,
    "near ties, more parts than latents": ALL,
    "near ties, more rows than programs": ALL,
    "overflow of one row": 1,
    "many": None,
    "many, near ties": ALL,
    "all equal": ALL,
    "ties": None,
    "outlier dimension": ALL,
    "tiny": None,
    "denormal": None,
    "huge weights": None,
    "huge rows": ALL,
    "mixed norms": None,
    "zeros": None,
    "NaN in a row": 1,
    "infinite row": 1,
    "NaN latent": None,
    "infinite latents": None,
    "bias not finite": None,
    "few above -inf": ALL,
    "few above -inf, room for all": 0,
    "all NaN": ALL,
    "all negative": None,
    "masked": None,
    "masked, nothing left": 0,
    "hidden by its copy": 0,
    "hidden by the row's copy": 0,
}


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
    N, d, F, k = {
        "one row": (1, 1, 33, 1),
        "k is F": (2, 17, 33, 33),
        "wide": (2, 300, 40, 3),
        "long rows": (2, 12, 2300, 5),
        "overflow of one row": (3, 20, 160, 6),
        "many": (1, 20, 700, 300),
        "many, near ties": (1, 20, 1100, 600),
        "near ties, more parts than latents": (1, 20, 80, 3),
        "near ties, more rows than programs": (9, 20, 160, 6),
    }.get(case, (3, 20, 160, 6))
    top = 63 if case == "wide" else 511
    x, W = integers(N, d, top=top), integers(F, d, top=top, seed=1)
    b, mask = integers(F, top=511, seed=2), None
    if case.startswith(("near ties", "many, near")):
        W = near(F, d)
    match case:
        case "near ties, masked" | "masked":
            mask = torch.arange(F) % (2 if "near" in case else 50) == 0
        case "hidden by its copy" | "hidden by the row's copy":
            x, W = hidden_winners()[2 * ("row" in case) :][:2]
            b = torch.zeros(1100)
        case "masked, nothing left":
            mask = torch.zeros(F, dtype=torch.bool)
        case "overflow of one row":
            x[1, 5], W = 2.0**20 + 4095, integers(F, d, top=63, seed=1)
            W[:, 5] = 7
        case "all equal":
            W, b = integers(1, d, top=511, seed=1).expand(F, d).contiguous(), b * 0
        case "ties":
            W, b = W[torch.arange(F) % 8], b[torch.arange(F) % 8]
        case "outlier dimension":  # moves all scores together; its rounding dwarfs their spread
            x[:, 5], W = 2.0**20 + 4095, integers(F, d, top=63, seed=1)
            W[:, 5] = 7
        case "tiny":
            x, W, b = x * 2.0**-70, W * 2.0**-40, b * 2.0**-110
        case "denormal":
            x, W, b = x * 2.0**-90, W * 2.0**-59, b * 2.0**-149
        case "huge weights":
            W, b = W * 2.0**40, b * 2.0**40
        case "huge rows":
            x = x * 2.0**60
        case "mixed norms":
            x, W = x * 2.0 ** integers(N, 1, top=20, seed=4), W * 2.0 ** integers(F, 1, seed=5)
            b = b * 0
        case "zeros":
            x[1], W[::3] = 0, 0
        case "NaN in a row":
            x[1, 3] = NAN
        case "infinite row":
            x[1, 3] = INF
        case "NaN latent":
            W[150, 3] = NAN
        case "infinite latents":
            W[150, 3], W[10, 2] = INF, -INF
        case "bias not finite":
            b[3], b[77], b[150] = INF, -INF, NAN
        case "few above -inf" | "few above -inf, room for all":  # parts and rows with fewer than k
            b[torch.arange(F) % 40 != 7] = -INF
        case "all NaN":
            x[:, 0] = NAN
        case "all negative":
            b -= 1e6
    return x, W, b, k, mask


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
