# SPDX-License-Identifier: Apache-2.0
"""Codes with row offsets: each implementation against the float64 reference, against the kernels of
k entries a row, and against itself on another number of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    Implementation,
    clone_all,
    code,
    integers,
    norm_arguments,
    on_threads,
    randn,
    row_arguments,
    to_float64,
)
from implementations import CPU, EMULATED, INTERPRETED, INTERPRETING, ON_HOST
from torch import Tensor

from ksae import reference
from ksae.reference import rows_of

pytestmark = pytest.mark.implementations(*ON_HOST, EMULATED, INTERPRETED)
F = 97
CODES = {
    "mixed": [0, F, 3, 0, 0, 1, 70, 64, 0],
    "many rows": [(7 * n) % 11 for n in range(75)],
    "one row has all": [0, 0, 90, 0],
    "no entries": [0, 0, 0],
    "no rows": [],
    "one row": [5],
    "one empty row": [0],
}
if INTERPRETING:  # Triton's interpreter takes a millisecond an entry
    CODES = {
        "mixed": [0, 9, 3, 0, 0, 1, 0],
        "one row has all": [0, 0, 23, 0],
        "no entries": [0, 0, 0],
        "no rows": [],
    }
kernels = pytest.mark.implementations(CPU)  # the reference adds in another order
lengths = pytest.mark.parametrize("lengths", CODES.values(), ids=CODES)
widths = pytest.mark.parametrize("d", [1, 23, 131, 132])


def alike(run: Callable[[], Any]) -> Any:
    """What `run` gives on two threads, after a check that it gives the same bits on one."""
    results = on_threads(run, (1, 2))
    equal(*results)
    return results[1]


def equal(got: Any, want: Any) -> None:
    for g, w in zip(tensors(got), tensors(want), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape and torch.equal(g, w)


def tensors(of: Any) -> tuple[Tensor, ...]:
    return of if isinstance(of, tuple) else (of,)


def near(got: Any, exact: Any) -> None:
    """`exact` is float64; what a rounding to the type of `got` loses, and some float32 sums."""
    for g, w in zip(tensors(got), tensors(exact), strict=True):
        assert g.shape == w.shape and w.dtype == torch.float64
        step = torch.finfo(g.dtype if g.dtype != torch.float64 else torch.float32).eps
        scale = float(w.abs().max()) if w.numel() else 0.0
        torch.testing.assert_close(g.double(), w, rtol=step, atol=2e-6 * scale + step * 1e-3)


def ragged_code(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values and latents [E, 1] and row offsets. Some values are 0; latents of a row are distinct
    and in no order."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(F, generator=generator)[:n] for n in lengths]
    latents = torch.cat([*rows, torch.empty(0, dtype=torch.int64)])
    values = randn(latents.numel(), dtype=dtype, seed=2)
    values[3::4] = 0
    offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return values[:, None], latents[:, None], offsets


@pytest.mark.interpreted(
    where=lambda dtype, d: (dtype, d) in ((torch.float32, 131), (torch.bfloat16, 23))
)
@lengths
@widths
def test_decode_and_its_products(
    impl: Implementation, dtype: torch.dtype, lengths: list[int], d: int
) -> None:
    values, latents, offsets = ragged_code(lengths, dtype)
    W, b = randn(F, d, dtype=dtype, seed=3), randn(d, dtype=dtype, seed=4)
    W[F - 1] = torch.inf  # counts nothing where the value is 0
    values[latents == F - 1] = 0
    target = randn(len(lengths), d, dtype=dtype, seed=5)
    finite = W.double().nan_to_num(posinf=0)
    exact = (values.double(), latents, finite, b.double())
    for i in (latents, latents.int()):
        got = alike(lambda i=i: impl.sparse_decode(values, i, W, b, offsets))
        near(got, reference.sparse_decode(*exact, offsets))
        part = alike(lambda i=i: impl.sparse_decode(values, i, W, None, offsets, True))
        assert part.dtype == torch.float32
        near(part, reference.sparse_decode(*exact[:3], None, offsets))
        for y in (target, target.float()):
            code = (values, i, W, b, y)
            got = alike(lambda code=code: impl.sparse_residual(*code, d, None, offsets))
            near(got, reference.sparse_residual(*exact, y.double(), d, None, offsets))
            half = (d // 2 + 3) // 4 * 4
            for start, stop in ((0, half), (half, d)):
                if start <= stop <= d:
                    part = impl.sparse_residual_slice(*code, start, stop, offsets)
                    near(part, got[0][:, start:stop].double())
        products = alike(
            lambda i=i: impl.sparse_decode_backward_weight(target, values, i, F, offsets)
        )
        near(
            products,
            reference.sparse_decode_backward_weight(target.double(), exact[0], latents, F, offsets),
        )
        got = alike(
            lambda i=i: impl.sparse_decode_backward_values(target, i, finite.to(dtype), offsets)
        )
        near(
            got,
            reference.sparse_decode_backward_values(target.double(), latents, finite, offsets),
        )


def test_column_sums_and_the_first_columns(impl: Implementation, dtype: torch.dtype) -> None:
    values, latents, offsets = ragged_code(CODES["mixed"], dtype)
    W, target = randn(F, 20, dtype=dtype, seed=3), randn(len(offsets) - 1, 20, seed=5)
    sums = torch.full((20,), torch.nan)
    whole = impl.sparse_residual(values, latents, W, None, target, 20, sums, offsets)
    torch.testing.assert_close(sums, whole[0].sum(0), rtol=1e-5, atol=1e-5)
    part = impl.sparse_residual(values, latents, W, None, target, 8, None, offsets)
    near(part, tuple(t.double() for t in (whole[0][:, :8], *whole[1:])))


def test_two_halves_are_the_residual(impl: Implementation, dtype: torch.dtype) -> None:
    """Decode of partial sums, then the products of a residual that was completed elsewhere."""
    values, latents, offsets = ragged_code(CODES["mixed"], dtype)
    W, target = randn(F, 131, dtype=dtype, seed=3), randn(len(offsets) - 1, 131, seed=5)
    whole = impl.sparse_residual(values, latents, W, None, target, 131, None, offsets)
    halves = impl.sparse_decode(values, latents, W, None, offsets, True) - target
    products = impl.sparse_decode_backward_values(halves, latents, W, offsets)
    assert products.dtype == torch.float32
    got = (halves, torch.where(values == 0, 0, products))
    if impl.name.startswith("cpu"):
        equal(got, (whole[0], whole[2]))
    for g, w in zip(got, (whole[0], whole[2]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)


@kernels
@pytest.mark.parametrize("k", [1, 9, 70])
def test_k_entries_a_row_have_the_bits_of_the_kernels_of_k(
    impl: Implementation, dtype: torch.dtype, k: int
) -> None:
    N, d = 37, 131
    values, indices = code(N, F, k, dtype)
    offsets = k * torch.arange(N + 1)
    v, i = values.reshape(-1, 1), indices.reshape(-1, 1)
    W, b = randn(F, d, dtype=dtype, seed=3), randn(d, dtype=dtype, seed=4)
    y = randn(N, d, dtype=dtype, seed=5)
    equal(impl.sparse_decode(v, i, W, b, offsets), impl.sparse_decode(values, indices, W, b))
    residual, square, grads = impl.sparse_residual(values, indices, W, b, y, d)
    equal(
        impl.sparse_residual(v, i, W, b, y, d, None, offsets),
        (residual, square, grads.reshape(-1, 1)),
    )
    equal(
        impl.sparse_decode_backward_values(y, i, W, offsets),
        impl.sparse_decode_backward_values(y, indices, W).reshape(-1, 1),
    )
    equal(
        impl.sparse_decode_backward_weight(y, v, i, F, offsets),
        impl.sparse_decode_backward_weight(y, values, indices, F),
    )
    equal(impl.group_by_latent(v, i, F), impl.group_by_latent(values, indices, F))


@kernels
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_row_pass_of_k_entries_a_row_has_the_bits_of_k(
    impl: Implementation, dtype: torch.dtype, side: str
) -> None:
    a = row_arguments(dtype, side)
    row_of = [rows_of(c.shape[1] * torch.arange(len(c) + 1), c.numel()) for c in a["coefficients"]]
    norms = norm_arguments(a)
    equal(impl.row_grad_sq(*norms, row_of), impl.row_grad_sq(*norms))
    want, got = clone_all(a), clone_all(a)
    impl.row_update(*want.values())
    impl.row_update(*got.values(), None, None, None, row_of)
    for name in ("W", "m", "v"):
        equal(got[name], want[name])


@pytest.mark.interpreted(
    where=lambda dtype, side: (
        (dtype, side) in ((torch.float32, "encoder"), (torch.bfloat16, "decoder"))
    )
)
@lengths
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_passes_over_latents(
    impl: Implementation, dtype: torch.dtype, lengths: list[int], side: str
) -> None:
    """A code with row offsets beside one of k a row, against float64."""
    a = row_arguments(dtype, side, N=len(lengths), F=F, ks=(5, 9))
    values, latents, offsets = ragged_code(lengths, dtype)
    grouped = impl.group_by_latent(values, latents, F)
    equal(grouped, reference.group_by_latent(values, latents, F))
    grads = torch.where(values == 0, 0, randn(values.numel(), 1, seed=6))
    sums = ([a["coefficients"][0].to(dtype), values], [randn(len(lengths), 5, seed=8), grads])
    lists = ([a["offsets"][0], grouped[0]], [a["order"][0], grouped[1]], a["scales"])
    got = alike(lambda: impl.latent_sums(*sums, *lists))
    for g, w in zip(got, reference.latent_sums(*sums, *lists), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    a["offsets"][1], a["order"][1] = grouped
    a["coefficients"][1] = grads if side == "encoder" else values
    used = sum(o.diff() for o in a["offsets"]) > 0  # the sums of a latent without entries are zero
    for name in ("grad_dot_w", "grad_b_enc"):
        if a[name] is not None:
            a[name] = torch.where(used, a[name], 0)
    N = len(lengths)
    row_of = [rows_of(5 * torch.arange(N + 1), 5 * N), rows_of(offsets, values.numel())]
    exact, norms = to_float64(a), norm_arguments(a)
    sq = alike(lambda: impl.row_grad_sq(*norms, row_of))
    want = reference.row_grad_sq(*norm_arguments(exact), row_of)
    torch.testing.assert_close(sq, want, rtol=1e-4, atol=1e-6)

    def update() -> tuple[Tensor, ...]:
        b = clone_all(a)
        impl.row_update(*b.values(), None, None, None, row_of)
        return tuple(b[name] for name in ("W", "m", "v"))

    got = alike(update)
    reference.row_update(*exact.values(), None, None, None, row_of)
    for g, name in zip(got, ("W", "m", "v"), strict=True):
        step = torch.finfo(g.dtype).eps
        torch.testing.assert_close(g.double(), exact[name], rtol=max(2 * step, 1e-4), atol=1e-5)


# --------------------------------------------------------------------------------- threshold_encode


def above(x: Tensor, W: Tensor, b: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What threshold_encode chooses, in float64."""
    u = x.double() @ W.double().T + b.double()
    row, latent = (u > theta.double()).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(x)) if len(x) else row
    return u[row, latent], latent, torch.cat([torch.zeros(1).long(), counts.cumsum(0)])


@pytest.mark.interpreted(where=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("N", [0, 1, 37])
@pytest.mark.parametrize(("d", "F"), [(1, 1), (23, 97), (131, 160)])
@pytest.mark.parametrize("theta", ["each", 4.5, 1e9, 1e-3])
def test_threshold_encode(
    impl: Implementation, dtype: torch.dtype, N: int, d: int, F: int, theta: float | str
) -> None:
    """In integers, whose sums are exact in float32."""
    x, W, b, b_dec = (
        integers(*s, seed=i).to(dtype) for i, s in enumerate([(N, d), (F, d), (F,), (d,)])
    )
    each = integers(F, seed=7).abs() + 0.5
    at = each if isinstance(theta, str) else torch.full((F,), theta)
    got = alike(lambda: impl.threshold_encode(x, W, b, at, b_dec))
    want = above(x - b_dec, W, b, at)
    equal(got, (want[0].to(dtype), *want[1:]))
    want = above(x, W, b, at.to(dtype))
    equal(impl.threshold_encode(x, W, b, at.to(dtype)), (want[0].to(dtype), *want[1:]))


def test_threshold_encode_takes_whole_rows_and_leaves_nan(impl: Implementation) -> None:
    x, W, b, one = torch.ones(3, 5), torch.ones(F, 5), torch.zeros(F), torch.ones(F)
    x[1] = torch.nan
    values, latents, offsets = impl.threshold_encode(x, W, b, one)
    assert offsets.tolist() == [0, F, F, 2 * F]
    assert torch.equal(latents, torch.arange(F).repeat(2)) and bool((values == 5).all())
    one[3], one[4], one[5] = torch.nan, torch.inf, -torch.inf
    _, latents, offsets = impl.threshold_encode(-x, W, b, one)  # below 0 only where the bar is
    assert offsets.tolist() == [0, 1, 1, 2] and latents.tolist() == [5, 5]


def test_threshold_encode_compares_before_it_rounds(impl: Implementation) -> None:
    x, W = torch.ones(1, 2).bfloat16(), torch.tensor([[1.0, 2.0**-12]] * 2).bfloat16()
    theta = torch.tensor([1.0, 1 + 2.0**-11])
    values, latents, _ = impl.threshold_encode(x, W, torch.zeros(2).bfloat16(), theta)
    assert values.tolist() == [1.0] and latents.tolist() == [0]


def test_threshold_encode_of_random_numbers(impl: Implementation, dtype: torch.dtype) -> None:
    """What is chosen otherwise than in float64 lies within the rounding of its threshold."""
    N, d = 50, 131
    x, W, b = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    theta = torch.full((F,), 6.0)
    values, latents, offsets = alike(lambda: impl.threshold_encode(x, W, b, theta))
    u = x.double() @ W.double().T + b.double()
    chosen = torch.zeros(N, F, dtype=torch.bool)
    rows = rows_of(offsets, values.numel()).long()
    chosen[rows, latents] = True
    assert bool(((u - 6.0).abs() < 1e-4)[chosen != (u > 6.0)].all())
    near(values, u[rows, latents])
