# SPDX-License-Identifier: Apache-2.0
"""The passes over latents, each implementation and dtype, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from cases import (
    Implementation,
    assert_rounded,
    assert_same,
    clone_all,
    norm_arguments,
    randn,
    row_arguments,
    sums_arguments,
    to_float64,
    written,
)
from implementations import EVERY, INTERPRETED

from ksae import ops, reference

interpreted_too = pytest.mark.implementations(*EVERY, INTERPRETED)
sides = pytest.mark.parametrize("side", ["encoder", "decoder"])


@interpreted_too
def test_latent_sums(impl: Implementation, dtype: torch.dtype) -> None:
    a = sums_arguments(dtype)
    got = impl.latent_sums(*a.values())
    exact = reference.latent_sums(*to_float64(a).values())
    for name, g, e in zip(("grad_b_enc", "grad_dot_w"), got, exact, strict=True):
        assert g.dtype == torch.float32
        assert_rounded(name, g, e)


@sides
@pytest.mark.parametrize("extras", [True, False], ids=["extras", "bare"])
@pytest.mark.parametrize("ks", [(5,), (5, 9, 1)], ids=["one group", "three groups"])
@interpreted_too
@pytest.mark.interpreted(
    where=lambda dtype, ks, extras, side: (
        (dtype, len(ks), extras, side)
        in {
            (torch.float32, 1, True, "encoder"),
            (torch.float32, 3, True, "decoder"),
            (torch.float32, 1, False, "decoder"),
            (torch.bfloat16, 3, True, "encoder"),
            (torch.bfloat16, 1, True, "decoder"),
            (torch.float16, 1, False, "encoder"),
            (torch.float16, 3, True, "decoder"),
        }
    )
)
def test_row_update(
    impl: Implementation, dtype: torch.dtype, ks: tuple[int, ...], extras: bool, side: str
) -> None:
    """extras: centring and the sum for b_dec (encoder), projection and unit rows (decoder)."""
    a = row_arguments(dtype, side, ks=ks)
    if not extras:
        bare = ("centre", "grad_dot_w", "grad_b_enc", "grad_b_dec")
        a |= dict.fromkeys(bare) | {"normalize": False}
    exact = to_float64(a)
    got = impl.row_grad_sq(*norm_arguments(a))
    assert got.dtype == torch.float64
    eps = torch.finfo(torch.float32).eps
    assert_rounded("grad_sq", got, reference.row_grad_sq(*norm_arguments(exact)), eps)

    impl.row_update(*a.values())
    reference.row_update(*exact.values())
    for name, t in written(a).items():
        if name in ("W", "master"):  # m / sqrt(v) of a small v magnifies what sums have lost
            floor = max(16 * eps, 2 * torch.finfo(t.dtype).eps)
            assert_rounded(name, t, written(exact)[name], floor)
        else:
            assert_rounded(name, t, written(exact)[name])
    if a["master"] is not None:
        assert_same("W", a["W"], a["master"].to(dtype))


@interpreted_too
@pytest.mark.parametrize("ks", [(5,), (5, 9)], ids=["one group", "two groups"])
@pytest.mark.interpreted(where=lambda dtype, ks: dtype == torch.bfloat16)
def test_row_update_by_residuals_in_the_dtype_of_the_weights(
    impl: Implementation, dtype: torch.dtype, ks: tuple[int, ...]
) -> None:
    """Values and rows are both stored; a latent without entries, long and unaligned rows."""
    for d in (23, 24):
        a = row_arguments(dtype, "decoder", ks=ks, d=d, rounded=True)
        assert a["rows"][0].dtype == a["coefficients"][0].dtype == dtype
        exact = to_float64(a)
        got = impl.row_grad_sq(*norm_arguments(a))
        eps = torch.finfo(torch.float32).eps
        assert_rounded("grad_sq", got, reference.row_grad_sq(*norm_arguments(exact)), eps)
        impl.row_update(*a.values())
        reference.row_update(*exact.values())
        for name, t in written(a).items():
            floor = max(16 * eps, 2 * torch.finfo(t.dtype).eps) if name in ("W", "master") else None
            assert_rounded(name, t, written(exact)[name], floor)


@interpreted_too
@pytest.mark.interpreted(where=lambda dtype: dtype != torch.float16)
def test_row_update_in_slices_is_the_whole(impl: Implementation, dtype: torch.dtype) -> None:
    """The first slice leaves what the second needs for its projection; unit rows come last."""
    whole = row_arguments(dtype, "decoder")
    sliced = clone_all(whole)
    exact = to_float64(whole)
    reference.row_update(*exact.values())
    for start, stop in ((0, 12), (12, 23)):
        part = [r[:, start:stop].contiguous() for r in sliced["rows"]]
        last = {"rows": part, "start": start, "normalize": stop == 23}
        impl.row_update(*(sliced | last).values())
    for name, t in written(sliced).items():
        assert_rounded(name, t, written(exact)[name])


@sides
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@interpreted_too
@pytest.mark.interpreted(
    where=lambda dtype, bad, side: (
        (dtype, str(bad), side)
        in {
            (torch.float32, "nan", "encoder"),
            (torch.bfloat16, "inf", "decoder"),
            (torch.float16, "-inf", "encoder"),
        }
    )
)
def test_a_scale_that_is_not_finite_writes_nothing(
    impl: Implementation, dtype: torch.dtype, bad: float, side: str
) -> None:
    a = row_arguments(dtype, side)
    a["scales"][1] = bad
    if side == "encoder":
        a["grad_b_dec"].fill_(3.0)
    before = clone_all(a)
    assert (impl.row_grad_sq(*norm_arguments(a)) == 0).all()
    impl.row_update(*a.values())
    for name, t in written(a).items():
        want = torch.zeros_like(t) if name == "grad_b_dec" else before[name]
        assert torch.equal(t, want), name
    sums = sums_arguments(dtype) | {"scales": a["scales"]}
    assert all((t == 0).all() for t in impl.latent_sums(*sums.values()))


@sides
@interpreted_too
@pytest.mark.interpreted(
    where=lambda dtype, side: (
        (dtype, side) in ((torch.float32, "encoder"), (torch.bfloat16, "decoder"))
    )
)
def test_latent_pass_without_tokens(impl: Implementation, dtype: torch.dtype, side: str) -> None:
    """N = 0: gradients are zero and Adam still moves by its moments."""
    a = row_arguments(dtype, side, N=0, ks=(3,))
    exact = to_float64(a)
    impl.row_update(*a.values())
    reference.row_update(*exact.values())
    for name, t in written(a).items():
        assert_rounded(name, t, written(exact)[name])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_grouping_by_several_threads(
    impl: Implementation, dtype: torch.dtype, count: int, threads: None
) -> None:
    """Two parts from 2^17 entries on, three from 3 * 2^16: each boundary is inside of a latent."""
    torch.set_num_threads(count)
    for N, k, F in ((4096, 32, 7), (6145, 32, 300), (131_073, 1, 2)):
        generator = torch.Generator().manual_seed(N)
        indices = torch.randint(0, F, (N, k), generator=generator)
        values = torch.ones(N, k, dtype=dtype)
        values.view(-1)[::5] = 0
        flat, kept = indices.view(-1), values.view(-1) != 0
        order = kept.nonzero()[:, 0][flat[kept].argsort(stable=True)]
        got = impl.group_by_latent(values, indices, F)
        assert_same("offsets", got[0][1:].long(), torch.bincount(flat[kept], minlength=F).cumsum(0))
        assert_same("order", got[1][: len(order)].long(), order)
        assert (got[1][len(order) :] == -1).all()


@pytest.mark.parametrize("F", [4, 33, 3001])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_latent_counts_in_the_gradient_of_b_dec(
    impl: Implementation, F: int, count: int, threads: None
) -> None:
    """Also the last one, whatever part of the latents it belongs to."""
    torch.set_num_threads(count)
    a = row_arguments(torch.float32, "encoder", N=1, d=23, F=F + 1, ks=(1,))
    values, indices = torch.ones(F, 1), torch.arange(F)[:, None]
    a["offsets"], a["order"] = map(list, zip(reference.group_by_latent(values, indices, F)))
    a |= {"coefficients": [values], "rows": [randn(F, 23)]}
    for name in ("W", "m", "v"):
        a[name] = a[name][:F].contiguous()
    a["grad_b_enc"] = torch.zeros(F)
    for latent in {0, F // 2, F - 1}:
        one = clone_all(a)
        one["grad_b_enc"][latent] = 4.0
        want = 4.0 * one["W"][latent]
        impl.row_update(*one.values())
        torch.testing.assert_close(one["grad_b_dec"], want)


def test_the_gradient_of_b_dec_takes_no_narrow_coefficients() -> None:
    """With rows of that dtype, which no kernel serves."""
    a = row_arguments(torch.bfloat16, "encoder")
    a["coefficients"] = [t.bfloat16() for t in a["coefficients"]]
    want = r"^row_update: coefficients\[0\] must be torch.float32 with grad_b_dec and rows of"
    with pytest.raises(TypeError, match=want):
        ops.row_update(*a.values())


@pytest.mark.parametrize("other", ["grad_dot_w", "normalize"])
def test_the_gradient_of_b_dec_is_of_the_encoder_alone(other: str) -> None:
    a = row_arguments(torch.float32, "encoder")
    a[other] = True if other == "normalize" else torch.zeros(33)
    with pytest.raises(
        ValueError, match=r"^row_update: grad_b_dec must be None with grad_dot_w or"
    ):
        ops.row_update(*a.values())
