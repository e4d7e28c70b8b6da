# SPDX-License-Identifier: Apache-2.0
"""prefix_residual: the residuals of Matryoshka prefixes, against one dense prefix at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    SHAPES,
    Implementation,
    assert_close,
    assert_same,
    code,
    integers,
    on_threads,
    randn,
)
from torch import Tensor

from ksae import reference


def widths_of(F: int, kind: str) -> Tensor:
    cuts = {
        "one": [F],
        "some": [*range(F // 7 + 1, F, F // 3 + 1), F],
        "bias alone": [0, F // 2, F],
        "each latent": list(range(1, F + 1))[-40:],
    }[kind]
    return torch.tensor(cuts)


def dense(
    values: Tensor,
    indices: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    widths: Tensor,
    shares: Tensor,
    row: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals, squares and gradients of entries [E], each prefix by a product with all of W."""
    F, N = len(W), len(target)
    errors = []
    for width in widths.tolist():
        a = torch.zeros(N, F, dtype=values.dtype)
        kept = torch.where(indices < width, values, 0)
        a.index_put_((row, indices), kept, accumulate=True)
        errors.append(a @ W - target + (0 if b is None else b))
    every = torch.stack(errors)  # [P, N, d]
    tables = torch.stack([(shares[m:, None, None] * every[m:]).sum(0) for m in range(len(widths))])
    group = (indices[:, None] >= widths).sum(1)
    grads = (tables[group, row] * W[indices]).sum(1)
    return tables, every.square().sum(2), torch.where(values == 0, 0, grads)


@pytest.mark.parametrize("kind", ["one", "some", "bias alone", "each latent"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_prefix(
    impl: Implementation, dtype: torch.dtype, shape: tuple[int, int, int, int], kind: str
) -> None:
    N, d, F, k = shape
    values, indices = code(N, F, k, dtype)
    W, b, y = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(F, d), (d,), (N, d)]))
    widths = widths_of(F, kind)
    shares = torch.linspace(0.5, 2.0, len(widths))
    row = torch.arange(N)[:, None].expand(N, k).reshape(-1)
    for bias, target, index in ((b, y, indices), (None, y.float(), indices.int())):
        args: tuple[Any, ...] = (values, index, W, bias, target, widths, shares)
        flat = (values.reshape(-1), indices.reshape(-1))
        wide = [t if t is None else t.double() for t in (W, bias, target)]
        exact = dense(flat[0].double(), flat[1], *wide, widths, shares.double(), row)  # type: ignore[arg-type]
        got = impl.prefix_residual(*args, d)
        narrow = [t if t is None else t.float() for t in (W, bias, target)]
        plain = dense(flat[0].float(), flat[1], *narrow, widths, shares, row)  # type: ignore[arg-type]
        assert [t.dtype for t in got] == [torch.float32, torch.float64, torch.float32]
        assert_close("residual", got[0], plain[0], exact[0])
        torch.testing.assert_close(got[1], exact[1], rtol=1e-5, atol=1e-6 * d)
        assert_close("products", got[2].reshape(-1), plain[2], exact[2])
        start, stop = d // 3, d - d // 4
        part = impl.prefix_residual_slice(*args, start, stop)
        assert_same("slice", part, got[0][:, :, start:stop])
        assert_same("first columns", impl.prefix_residual(*args, start)[0], got[0][:, :, :start])


@pytest.mark.parametrize("lengths", [[0, 5, 0, 200, 1, 3, 0], [0] * 7, [33]], ids=str)
def test_codes_with_row_offsets(
    impl: Implementation, dtype: torch.dtype, lengths: list[int]
) -> None:
    N, E, d, F = len(lengths), sum(lengths), 21, 77
    values = randn(E, 1, dtype=dtype, seed=5).relu()
    generator = torch.Generator().manual_seed(6)
    indices = torch.randint(0, F, (E, 1), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    W, b, y = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(F, d), (d,), (N, d)]))
    widths = widths_of(F, "some")
    shares = torch.linspace(1, 3, len(widths))
    args = (values, indices, W, b, y, widths, shares)
    row = reference.rows_of(offsets, E).long()
    exact, plain = (
        dense(
            values[:, 0].to(T), indices[:, 0], W.to(T), b.to(T), y.to(T), widths, shares.to(T), row
        )
        for T in (torch.float64, torch.float32)
    )
    got = impl.prefix_residual(*args, d, offsets)
    assert_close("residual", got[0], plain[0], exact[0])
    torch.testing.assert_close(got[1], exact[1], rtol=1e-5, atol=1e-5)
    assert_close("products", got[2][:, 0], plain[2], exact[2])
    assert_same("slice", impl.prefix_residual_slice(*args, 4, 19, offsets), got[0][:, :, 4:19])


def test_special_numbers(impl: Implementation, dtype: torch.dtype) -> None:
    """Zero values silence infinite rows; what is not finite spreads to later prefixes only."""
    N, d, F, k = 7, 19, 33, 6
    values, indices = code(N, F, k, dtype, repeats=False)
    W, y, b = integers(F, d, dtype=dtype), integers(N, d, dtype=dtype, seed=1), integers(d)
    values = (values * 2).round()
    values[1], values[2, 3], values[4] = 0, torch.nan, -0.0
    W[indices[1, 0]] = torch.inf
    y[6, 2] = torch.inf
    args = (values, indices, W, b.to(dtype), y, torch.tensor([0, 9, 20, F]), torch.ones(4))
    wide = [t.double() if t.is_floating_point() else t for t in args]
    for got, want in zip(
        impl.prefix_residual(*args, d), reference.prefix_residual(*wide, d), strict=True
    ):
        assert_same("special", got, want.to(got.dtype))  # sums are exact


def test_one_prefix_is_the_plain_residual(impl: Implementation, dtype: torch.dtype) -> None:
    N, d, F, k = 19, 100, 1000, 70
    values, indices = code(N, F, k, dtype)
    W, b, y = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(F, d), (d,), (N, d)]))
    got = impl.prefix_residual(values, indices, W, b, y, torch.tensor([F]), torch.ones(1), d)
    want = impl.sparse_residual(values, indices, W, b, y, d)
    torch.testing.assert_close(got[0][0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1][0], want[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-3)


def test_the_same_bits_for_every_number_of_threads(impl: Implementation) -> None:
    N, d, F, k = 200, 40, 300, 9
    values, indices = code(N, F, k, torch.float32)
    W, y = randn(F, d), randn(N, d, seed=1)
    args = (values, indices, W, None, y, torch.tensor([40, 41, F]), torch.ones(3), d)
    results = on_threads(lambda: impl.prefix_residual(*args))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)
