# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding and bf16 copies in the latent pass on CUDA, executed by the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Implementation, assert_same, clone_all, row_arguments
from emulation.build import Emulator
from implementations import EMULATED, ON_CUDA
from torch import Tensor

from ksae import reference

pytestmark = pytest.mark.implementations(EMULATED)


def noisy(side: str, **options: Any) -> dict[str, Any]:
    """Arguments of row_update with bfloat16 moments and seed 2^40 + 3 in step 7."""
    a = row_arguments(torch.bfloat16, side, **options)
    a |= {"master": None, "m": a["m"].bfloat16(), "v": a["v"].bfloat16(), "W_bf16": None}
    return a | {"rng_state": torch.tensor([2**40 + 3, 7])}


def one_neighbour_off(got: Tensor, want: Tensor) -> float:
    """Share of numbers that differ; fails if one differs by more than a unit in its last place."""
    assert got.dtype == want.dtype == torch.bfloat16
    apart = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    assert int(apart.max()) <= 1
    return float((apart > 0).double().mean())


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.implementations(*ON_CUDA)
def test_rounding_is_the_references(
    impl: Implementation,
    side: str,
) -> None:
    """Whole, and in slices. Float32 sums in another order move few numbers across their bits."""
    a = noisy(side)
    want, sliced = clone_all(a), clone_all(a)
    reference.row_update(*want.values())
    impl.row_update(*a.values())
    for start, stop in ((0, 8), (8, 23)) if side == "decoder" else ():
        part = [r[:, start:stop].contiguous() for r in sliced["rows"]]
        last = {"rows": part, "start": start, "normalize": stop == 23}
        impl.row_update(*(sliced | last).values())
    for result in (a, sliced) if side == "decoder" else (a,):
        for name in ("W", "m", "v"):
            assert one_neighbour_off(result[name], want[name]) < 0.01, name


def test_rounding_by_the_same_bits_is_the_same(
    impl: Implementation,
    emulated: Emulator,
) -> None:
    """No entry, so nothing is summed: bits equal the reference's, whatever the threads do; another
    seed, step or matrix gives other bits."""
    outcomes = []
    for order, seed, step in ((0, 3, 7), (9, 3, 7), (0, 4, 7), (0, 3, 8), (0, 3 + 2**32, 7)):
        emulated.seed(order)
        a = noisy("encoder", N=0, ks=(3,)) | {"rng_state": torch.tensor([seed, step])}
        want = clone_all(a)
        reference.row_update(*want.values())
        impl.row_update(*a.values())
        for name in ("W", "m", "v"):
            assert_same(name, a[name], want[name])
        outcomes.append(torch.cat([a["W"], a["m"], a["v"]]))
    assert torch.equal(outcomes[0], outcomes[1])
    for n, other in enumerate(outcomes[2:]):
        assert float((other != outcomes[0]).double().mean()) > 0.1, n


def test_special_numbers_are_not_rounded_away(impl: Implementation) -> None:
    a = noisy("encoder", N=0, ks=(3,))
    a["m"][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    a["m"][1], a["v"][1], a["W"][1] = 0.0, 0.0, 1e-39
    want = clone_all(a)
    reference.row_update(*want.values())
    impl.row_update(*a.values())
    for name in ("W", "m", "v"):
        assert_same(name, a[name], want[name])
    assert a["m"][0, 0].isnan() and a["m"][0, 1] == torch.inf and (a["m"][1] == 0).all()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.implementations(*ON_CUDA)
def test_the_shadow_is_the_rounded_weight(
    impl: Implementation,
    side: str,
) -> None:
    a = row_arguments(torch.float32, side)
    plain, sliced = clone_all(a), clone_all(a)
    a["W_bf16"], sliced["W_bf16"] = a["W"].bfloat16(), torch.zeros_like(a["W"]).bfloat16()
    impl.row_update(*a.values())
    impl.row_update(*plain.values())
    assert_same("W", a["W"], plain["W"])
    assert_same("W_bf16", a["W_bf16"], a["W"].bfloat16())
    for start, stop in ((0, 8), (8, 23)) if side == "decoder" else ():
        part = [r[:, start:stop].contiguous() for r in sliced["rows"]]
        impl.row_update(*(sliced | {"rows": part, "start": start, "normalize": False}).values())
        assert_same("slices", sliced["W_bf16"][:, :stop], sliced["W"].bfloat16()[:, :stop])
