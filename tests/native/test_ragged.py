# SPDX-License-Identifier: Apache-2.0
"""Codes with row offsets: the CPU kernels of each instruction set against the float64 reference,
against the kernels of k entries a row, and against themselves on another number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, clone_all, code, dtype_id, integers, norm_arguments, randn, row_arguments
from torch import Tensor

from ksae import reference
from ksae.backends import cpu as native
from ksae.reference import ragged as meaning

if not native.available():
    pytest.skip(f"native kernels: {native.reason()}", allow_module_level=True)

from ksae import _cpu
from ksae.backends import ragged

F = 97
CODES = {
    "mixed": [0, F, 3, 0, 0, 1, 70, 64, 0],
    "many rows": [(7 * n) % 11 for n in range(75)],
    "no entries": [0, 0, 0],
    "no rows": [],
    "one row": [5],
    "one empty row": [0],
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
lengths = pytest.mark.parametrize("lengths", CODES.values(), ids=CODES)
widths = pytest.mark.parametrize("d", [1, 23, 131])


@pytest.fixture(params=_cpu.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield
    _cpu.set_isa(before)


def on_threads(run: Callable[[], Any]) -> Any:
    """What `run` gives on two threads, after a check that it gives the same bits on one."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    equal(*results)
    return results[1]


def equal(got: Any, want: Any) -> None:
    for g, w in zip(tensors(got), tensors(want), strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w)


def tensors(of: Any) -> tuple[Tensor, ...]:
    return of if isinstance(of, tuple) else (of,)


def near(got: Tensor, want: Tensor) -> None:
    """`want` is float64; what a rounding to the type of `got` loses, and some float32 sums."""
    assert got.shape == want.shape
    step = torch.finfo(got.dtype).eps
    scale = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=step, atol=2e-6 * scale + step * 1e-3)


def ragged_code(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Some values are 0; latents of a row are distinct and in no order."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(F, generator=generator)[:n] for n in lengths]
    latents = torch.cat([*rows, torch.empty(0, dtype=torch.int64)])
    values = randn(latents.numel(), dtype=dtype, seed=2)
    values[3::4] = 0
    return values, latents, offsets_of(lengths)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


@dtypes
@lengths
@widths
def test_decode_and_its_products(dtype, lengths, d, poison):
    values, latents, offsets = ragged_code(lengths, dtype)
    W, b = randn(F, d, dtype=dtype, seed=3), randn(d, dtype=dtype, seed=4)
    target = randn(len(lengths), d, dtype=dtype, seed=5)
    exact = (values.double(), latents, offsets, W.double())
    for indices in (latents, latents.int()):
        args = (values, indices, offsets, W)
        got = on_threads(lambda args=args: ragged.sparse_decode(*args, b))
        near(got, meaning.sparse_decode(*exact, b.double()))
        part = on_threads(lambda args=args: ragged.sparse_decode(*args, partial=True))
        near(part, meaning.sparse_decode(*exact))
        for y in (target, target.float()):
            got = on_threads(lambda args=args, y=y: ragged.sparse_residual(*args, b, y))
            want = meaning.sparse_residual(*exact, b.double(), y.double())
            for g, w in zip(got, want, strict=True):
                near(g.float() if g.dtype == torch.float64 else g, w)
        got = on_threads(lambda args=args: ragged.sparse_decode_backward_values(target, *args[1:]))
        near(got, meaning.sparse_decode_backward_values(target.double(), *exact[1:]))
        got = on_threads(
            lambda args=args: ragged.sparse_decode_backward_weight(target, *args[:3], F)
        )
        want = meaning.sparse_decode_backward_weight(target.double(), *exact[:3], F)
        for g, w in zip(got, want, strict=True):
            near(g, w)


@dtypes
def test_two_halves_have_the_bits_of_the_residual(dtype):
    """Decode of partial sums, then the products of a residual that was completed elsewhere."""
    values, latents, offsets = ragged_code(CODES["mixed"], dtype)
    W, target = randn(F, 131, dtype=dtype, seed=3), randn(9, 131, seed=5)
    residual, _, grads = ragged.sparse_residual(values, latents, offsets, W, None, target)
    halves = ragged.sparse_decode(values, latents, offsets, W, partial=True) - target
    equal(halves, residual)
    products = ragged.sparse_decode_backward_values(halves, latents, offsets, W)
    equal(torch.where(values == 0, 0, products), grads)


@dtypes
@pytest.mark.parametrize("k", [1, 9, 70])
def test_k_entries_a_row_have_the_bits_of_the_kernels_of_k(dtype, k):
    N, d = 37, 131
    values, indices = code(N, F, k, dtype)
    offsets = k * torch.arange(N + 1)
    flat, latents = values.reshape(-1), indices.reshape(-1)
    W, b = randn(F, d, dtype=dtype, seed=3), randn(d, dtype=dtype, seed=4)
    target = randn(N, d, dtype=dtype, seed=5)
    equal(
        ragged.sparse_decode(flat, latents, offsets, W, b),
        native.sparse_decode(values, indices, W, b),
    )
    residual, square, grads = native.sparse_residual(values, indices, W, b, target, d)
    equal(
        ragged.sparse_residual(flat, latents, offsets, W, b, target),
        (residual, square, grads.reshape(-1)),
    )
    equal(
        ragged.sparse_decode_backward_values(target, latents, offsets, W),
        native.sparse_decode_backward_values(target, indices, W).reshape(-1),
    )
    equal(
        ragged.sparse_decode_backward_weight(target, flat, latents, offsets, F),
        native.sparse_decode_backward_weight(target, values, indices, F),
    )
    equal(
        native.group_by_latent(flat[:, None], latents[:, None], F),
        native.group_by_latent(values, indices, F),
    )


@dtypes
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_row_pass_of_k_entries_a_row_has_the_bits_of_k(dtype, side):
    a = row_arguments(dtype, side)
    row_of = [meaning.rows_of(c.shape[1] * torch.arange(len(c) + 1)) for c in a["coefficients"]]
    norms = norm_arguments(a)
    equal(ragged.row_grad_sq(*norms[:4], row_of, *norms[4:]), native.row_grad_sq(*norms))
    want = clone_all(a)
    native.row_update(*want.values())
    got = clone_all(a)
    ragged.row_update(*list(got.values())[:4], row_of, *list(got.values())[4:])
    for name in ("W", "m", "v"):
        equal(got[name], want[name])


@dtypes
@lengths
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_passes_over_latents(dtype, lengths, side):
    """A code with row offsets beside one of k a row; row_update of E rows of one entry is its
    meaning."""
    a = row_arguments(dtype, side, N=len(lengths), F=F, ks=(5, 9))
    values, latents, offsets = ragged_code(lengths, dtype)
    grouped = native.group_by_latent(values[:, None], latents[:, None], F)
    equal(grouped, reference.group_by_latent(values[:, None], latents[:, None], F))
    grads = torch.where(values == 0, 0, randn(values.numel(), seed=6))
    sums = ([values[:, None]], [grads[:, None]], [grouped[0]], [grouped[1]], a["scales"][:1])
    got = on_threads(lambda: native.latent_sums(*sums))
    for g, w in zip(got, reference.latent_sums(*sums), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    a["offsets"][1], a["order"][1] = grouped
    a["coefficients"][1] = grads if side == "encoder" else values
    used = sum(o.diff() for o in a["offsets"]) > 0  # the sums of a latent without entries are zero
    for name in ("grad_dot_w", "grad_b_enc"):
        if a[name] is not None:
            a[name] = torch.where(used, a[name], 0)
    ks = 5 * torch.arange(len(lengths) + 1)
    row_of = [meaning.rows_of(ks), meaning.rows_of(offsets)]
    exact = clone_all(a)
    exact["coefficients"] = [c.reshape(-1, 1) for c in exact["coefficients"]]
    exact["rows"] = meaning.by_entry(a["rows"], [ks, offsets])
    norms = norm_arguments(a)
    sq = on_threads(lambda: ragged.row_grad_sq(*norms[:4], row_of, *norms[4:]))
    torch.testing.assert_close(
        sq, reference.row_grad_sq(*norm_arguments(exact)), rtol=1e-4, atol=1e-6
    )

    def update() -> tuple[Tensor, ...]:
        b = clone_all(a)
        ragged.row_update(*list(b.values())[:4], row_of, *list(b.values())[4:])
        return tuple(b[name] for name in ("W", "m", "v"))

    got = on_threads(update)
    reference.row_update(*exact.values())
    for g, name in zip(got, ("W", "m", "v"), strict=True):
        step = torch.finfo(g.dtype).eps
        torch.testing.assert_close(g, exact[name], rtol=max(2 * step, 1e-4), atol=1e-5)


@dtypes
@pytest.mark.parametrize("N", [0, 1, 37])
@pytest.mark.parametrize(("d", "F"), [(1, 1), (23, 97), (131, 160)])
@pytest.mark.parametrize("theta", ["each", 4.5, 1e9, 1e-3])
def test_threshold_encode(dtype, N, d, F, theta, poison):
    """In integers, whose sums are exact in float32."""
    x, W, b, b_dec = (
        integers(*s, seed=i).to(dtype) for i, s in enumerate([(N, d), (F, d), (F,), (d,)])
    )
    at = integers(F, seed=7).abs() + 0.5 if theta == "each" else theta
    got = on_threads(lambda: ragged.threshold_encode(x, W, b, at, b_dec))
    doubles = (x.double(), W.double(), b.double(), at, b_dec.double())
    values, latents, offsets = meaning.threshold_encode(*doubles)
    equal(got, (values.to(dtype), latents, offsets))
    equal(ragged.threshold_encode(x, W, b, at), meaning.threshold_encode(x, W, b, at))


def test_threshold_encode_takes_whole_rows_and_leaves_nan():
    x, W, b = torch.ones(3, 5), torch.ones(F, 5), torch.zeros(F)
    x[1] = torch.nan
    values, latents, offsets = ragged.threshold_encode(x, W, b, 1.0)
    assert offsets.tolist() == [0, F, F, 2 * F]
    assert torch.equal(latents, torch.arange(F).repeat(2)) and bool((values == 5).all())


@dtypes
def test_threshold_encode_of_random_numbers(dtype):
    """What is chosen otherwise than in float64 lies within the rounding of its threshold."""
    N, d = 50, 131
    x, W, b = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    values, latents, offsets = on_threads(lambda: ragged.threshold_encode(x, W, b, 6.0))
    u = x.double() @ W.double().T + b.double()
    chosen = torch.zeros(N, F, dtype=torch.bool)
    rows = meaning.rows_of(offsets).long()
    chosen[rows, latents] = True
    assert bool(((u - 6.0).abs() < 1e-4)[chosen != (u > 6.0)].all())
    near(values, u[rows, latents])
