# SPDX-License-Identifier: Apache-2.0
"""The interpreted screened encode against the float32 reference.

The numbers are integers of more bits than bf16 has, times powers of two: a float32 sum of their
products is exact in any order, and what their bf16 copies lose is not small.
Prints a JSON object: the name of each case that is asked for, and "equal" or what differs.
"""

import json
import sys
from unittest import mock

import torch
import triton_interpreter  # noqa: F401  first: sets the mode
from cases import assert_close, assert_same, integers, randn

from ksae import reference
from ksae.kernels import bound, screen

INF = torch.inf


def powers(*shape: int, top: int, seed: int) -> torch.Tensor:
    return 2.0 ** integers(*shape, seed=seed, top=top)


def case_of(case: str) -> None:
    N, d, F, k = {
        "no row": (0, 7, 33, 4),
        "one row": (1, 1, 33, 1),
        "k is F": (2, 17, 33, 33),
        "overflow of one row": (3, 20, 160, 6),
        "wide": (2, 300, 40, 3),
        "many, near ties": (1, 20, 1100, 900),
        "rows and parts": (3, 20, 300, 6),
        "more rows than programs": (5, 20, 160, 6),
    }.get(case, (2, 20, 160, 6))
    top = 63 if case == "wide" else 511
    x, W = integers(N, d, top=top), integers(F, d, top=top, seed=1)
    b, b_dec, mask = integers(F, top=511, seed=2), None, None
    way = {} if case == "random" else {"capacity": 64}
    programs = 3
    again = full = None  # rows that are expected to pass the gate twice; to be scored in full
    match case:
        case "random" | "wide":
            again = full = 0
        case "overflow":
            way["tau"], again, full = torch.full((N,), -INF), N, 0
        case "overflow of one row":
            way["tau"] = torch.tensor([1e6, -INF, 1e6])
        case "shortfall":  # nothing is certain then: all pass the second gate
            way["tau"], full = torch.full((N,), INF), N
        case "shortfall, room for all":
            way, again, full = {"tau": torch.full((N,), INF), "capacity": 256}, N, 0
        case "guess too high":  # enough latents may reach it, too few are certain to
            s = (x @ W.T + b).sort(dim=1, descending=True).values
            way["tau"], again, full = s[:, k - 1].contiguous(), N, 0
        case "near ties, room for all":
            W = integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3)
            way, again, full = {"capacity": 256}, 0, 0
        case "near ties, room for many":  # more than are sorted
            W = integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3)
            way, again, full = {"capacity": 2048}, 0, 0
        case "near ties, overflow" | "rows and parts" | "more rows than programs":
            W, full = integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3), N
            programs = {"rows and parts": 8, "near ties, overflow": 20}.get(case, 3)
        case "near ties, masked":
            W, full = integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3), N
            mask = torch.arange(F) % 2 == 0
        case "many, near ties":  # room for less than two programs' best
            W, full = integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3), N
            way = {"capacity": 1024}
        case "all equal":
            W, b, full, programs = integers(1, d, top=511, seed=1).expand(F, d), b * 0, N, 5
        case "ties":
            W = W[torch.arange(F) % 8]
            b = b[torch.arange(F) % 8]
        case "outlier dimension":  # moves all scores together; its rounding dwarfs their spread
            x[:, 5], W = 2.0**20 + 4095, integers(F, d, top=63, seed=1)
            W[:, 5], full = 7, N
        case "tiny":
            x, W, b = x * 2.0**-70, W * 2.0**-40, b * 2.0**-110
        case "denormal":
            x, W, b = x * 2.0**-90, W * 2.0**-59, b * 2.0**-149
        case "huge weights":
            W, b = W * 2.0**40, b * 2.0**40
        case "huge rows":
            x, full = x * 2.0**60, N
        case "mixed norms":
            x, W = x * powers(N, 1, top=20, seed=4), W * powers(F, 1, top=10, seed=5)
            b = b * 0
        case "zeros":
            x[1], W[::3] = 0, 0
        case "NaN in a row":
            x[1, 3] = torch.nan
        case "infinite row":
            x[1, 3] = INF
        case "NaN latent":
            W[150, 3] = torch.nan
        case "infinite latents":
            W[150, 3], W[10, 2] = INF, -INF
        case "bias not finite":
            b[3], b[77], b[150] = INF, -INF, torch.nan
        case "few above -inf":  # parts with fewer than k, rows with fewer than k
            b[torch.arange(F) % 40 != 7], full = -INF, N
        case "all NaN":
            x[:, 0], full = torch.nan, N
        case "all negative":
            b -= 1e6
        case "masked":
            mask = torch.arange(F) % 50 == 0
        case "half masked, overflow":
            mask, way["tau"] = torch.arange(F) % 2 == 0, torch.full((N,), -INF)
        case "centred":
            b_dec = integers(d, seed=3)
        case "kept bf16 copy":
            way["of_W"] = screen.bf16_copy(W, W.bfloat16())
    given = way["tau"].clone() if "tau" in way else None
    with mock.patch.object(screen, "PROGRAMS", programs):
        *got, fell = screen.screened_and_redone(x, W, b, k, b_dec, mask, **way)
    expected = reference.topk_encode(x, W, b, k, b_dec, mask)
    assert_same("indices", got[1], expected[1])
    assert_same("values", got[0], expected[0])
    for what, rows, at in (("passed the gate twice", again, 1), ("were scored in full", full, 2)):
        if rows is not None:
            assert int((fell == at).sum()) == rows, f"{int((fell == at).sum())} rows {what}"
    if "tau" in way:
        assert torch.equal(way["tau"], given), "the caller's guess was written"


def without_the_bound() -> None:
    """With no slack the ranking of bf16 shows: the bound is what makes the result exact."""
    x, b = integers(2, 20, top=511), torch.zeros(100)
    W = integers(1, 20, top=511, seed=1) + integers(100, 20, top=1, seed=3)
    got = screen.screened_and_redone(x, W, b, 9, slack=0.0)
    expected = reference.topk_encode(x, W, b, 9)
    assert not got[2].any(), "no row was believed"
    assert not torch.equal(got[1], expected[1]), "nothing was lost"


def paths_agree() -> None:
    """Normal numbers: scored as one of few, in full or in parts, a latent has the same bits."""
    x, W, b = randn(3, 50), randn(200, 50, seed=1), randn(200, seed=2)
    few = screen.screened_and_redone(x, W, b, 6, capacity=64)
    twice = screen.screened_and_redone(x, W, b, 6, capacity=64, tau=torch.full((3,), -INF))
    assert not few[2].any() and (twice[2] == 1).all()
    assert torch.equal(few[0], twice[0]) and torch.equal(few[1], twice[1])
    for programs in (2, 3, 7, 60):  # a part a row, and as many as leave some of them empty
        with mock.patch.object(screen, "PROGRAMS", programs):
            full = screen.screened_and_redone(x, W, b, 6, capacity=64, tau=torch.full((3,), INF))
        assert (full[2] == 2).all()
        assert torch.equal(few[0], full[0]) and torch.equal(few[1], full[1])
    exact = reference.topk_encode(x.double(), W.double(), b.double(), 6)
    assert_same("indices", few[1], exact[1])
    assert_close("values", few[0], reference.topk_encode(x, W, b, 6)[0], exact[0])


def bound_holds() -> None:
    """|s - s^| <= m, with float32 sums of bf16 products that are cut off, not rounded."""
    x, W = randn(20, 768), randn(40, 768, seed=1) / 28
    x[:5, 3] = 300.0
    x16, W16 = x.bfloat16(), W.bfloat16()
    sums = torch.zeros(20, 40)
    for j in range(768):  # each product cut off as well: more than any instruction loses
        exact = sums.double() + x16.double()[:, j, None] * W16.double()[None, :, j]
        nearest = exact.float()
        above = nearest.double().abs() > exact.abs()
        sums = torch.where(above, torch.nextafter(nearest, torch.zeros(())), nearest)
    full, lost, rounded = bound.norms(x, x16).double()
    _, w_lost, w_rounded = bound.norms(W, W16).double()
    g = (768 + 16) * 2.0**-22
    m = w_lost * (full * (1 + g))[:, None] + w_rounded * (lost + g * (rounded + full))[:, None]
    error = (sums.double() - x.double() @ W.double().T).abs()
    assert (error <= m).all()
    assert (full >= x.double().norm(dim=1)).all() and (lost >= (x - x16).double().norm(dim=1)).all()
    assert (m <= 0.02 * full[:, None] * W.double().norm(dim=1)).all(), "the bound is useless"


def outcome(name: str) -> str:
    try:
        match name:
            case "without the bound":
                without_the_bound()
            case "paths agree":
                paths_agree()
            case "bound holds":
                bound_holds()
            case _:
                case_of(name)
    except Exception as error:  # the report goes on with the next case
        return f"{type(error).__name__}: {error}"
    return "equal"


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    print(json.dumps({name: outcome(name) for name in sys.argv[1:]}))
