# SPDX-License-Identifier: Apache-2.0
"""batch_topk_encode: the selection is a flat sort of all scores with the tie rule, whatever the
implementation, the instruction set, the number of threads and the way through the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, SHAPES, Implementation, dtype_id, integers, on_threads, randn
from torch import Tensor

import ksae
from ksae import ops, reference
from ksae.backends import cpu as native
from ksae.backends import product

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def flat_sort(u: Tensor, k: int) -> list[tuple[int, int]]:
    """(row, latent) of the N*k first by (-u, row, latent), NaN first; in that order of rows."""
    N, F = u.shape
    entries = [(n, i) for n in range(N) for i in range(F)]

    def key(at: tuple[int, int]) -> tuple[float, int, int]:
        score = float(u[at])
        return (-torch.inf if score != score else -score, *at)

    nan_first = sorted(entries, key=lambda at: (not u[at].isnan(), *key(at)))
    return sorted(nan_first[: N * k])


def same_selection(got: tuple[Tensor, ...], u: Tensor, k: int) -> None:
    """The selection of scores u [N, F], which are exact in any order of summation."""
    values, indices, row_offsets = got
    rows = reference.rows_of(row_offsets, len(values)).tolist()
    assert list(zip(rows, indices.tolist(), strict=True)) == flat_sort(u, k)
    chosen = u[rows, indices]
    want = torch.where(chosen <= 0, 0, chosen).to(values.dtype)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)


def alike(run: Callable[[], Any]) -> Any:
    """What `run` gives on three threads, after a check that it gives the same bits on one."""
    results = on_threads(run, (1, 3))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return results[1]


def problem(N: int, d: int, F: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Small integers: ties abound, and sums are exact."""
    shapes = [(N, d), (F, d), (F,), (d,)]
    return [integers(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]


def scores(x: Tensor, W: Tensor, b: Tensor, b_dec: Tensor) -> Tensor:
    return ((x - b_dec).double() @ W.double().T + b.double()).float()


@dtypes
@pytest.mark.parametrize("N, d, F, k", SHAPES)
def test_selection_is_a_flat_sort(
    impl: Implementation, N: int, d: int, F: int, k: int, dtype: torch.dtype
) -> None:
    x, W, b, b_dec = problem(N, d, F, dtype)
    got = alike(lambda: impl.batch_topk_encode(x, W, b, k, b_dec))
    if N:
        same_selection(got, scores(x, W, b, b_dec), k)
    assert got[2].tolist()[-1] == N * k == len(got[0])


def hard(kind: str, N: int, d: int, F: int) -> list[Tensor]:
    """Batches that a guessed threshold, or a limit a row, gets wrong."""
    x, W, b, b_dec = problem(N, d, F)
    match kind:
        case "one row takes everything":
            x[N // 2] *= 1000
            W, b_dec = W.abs() + 1, 0 * b_dec
            x[N // 2] = x[N // 2].abs() + 1000
        case "all equal":
            x, W, b, b_dec = torch.ones(N, d), torch.ones(F, d), torch.ones(F), torch.zeros(d)
        case "equal rows":
            x = x[:1].repeat(N, 1)
        case "rising rows":
            x = torch.arange(N)[:, None] * torch.ones(N, d)
            W, b_dec = W.abs() + 1, 0 * b_dec
        case "nothing positive":
            b -= 10_000
        case "one latent":
            b[F // 2] += 10_000
        case "NaN row":
            x[N // 2] = torch.nan
        case "NaN latent":
            W[F // 2] = torch.nan
        case "infinite":
            b[0], b[1:] = torch.inf, -torch.inf
        case "most are -inf":
            b[F // 8 :] = -torch.inf
        case "the sample misleads":  # every row of a kernel's evenly spread sample is large
            x[:: max(N // 56, 1)] *= 100
            W = W.abs()
            x, b_dec = x.abs(), 0 * b_dec
    return [x, W, b, b_dec]


KINDS = (
    "one row takes everything",
    "all equal",
    "equal rows",
    "rising rows",
    "nothing positive",
    "one latent",
    "NaN row",
    "NaN latent",
    "infinite",
    "most are -inf",
    "the sample misleads",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N, F, k", [(5, 40, 3), (130, 150, 2), (61, 230, 40)])
def test_hard_batches(impl: Implementation, kind: str, N: int, F: int, k: int) -> None:
    x, W, b, b_dec = hard(kind, N, 9, F)
    got = alike(lambda: impl.batch_topk_encode(x, W, b, k, b_dec))
    same_selection(got, scores(x, W, b, b_dec), k)


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_screening_is_the_float32_path(kind: str) -> None:
    if not native.available():
        pytest.fail("native kernels: " + native.reason())
    from ksae import _cpu

    before = _cpu.isa()
    _cpu.set_isa(_cpu.isas()[-1])
    try:
        inputs = hard(kind, 200, 33, 700)
        if kind == "plain":
            inputs = [randn(*t.shape, seed=i) for i, t in enumerate(inputs)]
        for slack in (1.0, 30.0, 1e4):
            got = native.batch_topk_encode_counted(
                *inputs[:3], 3, inputs[3], screen=True, slack=slack
            )
            want = native.batch_topk_encode_counted(*inputs[:3], 3, inputs[3], screen=False)
            for a, b in zip(got[:3], want[:3], strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        if kind == "plain" and _cpu.can_screen():
            *_, (screened, survivors, redone) = native.batch_topk_encode_counted(
                *inputs[:3], 3, inputs[3], screen=True
            )
            assert (screened, redone) == (200, 0)
            assert 600 <= survivors <= 1200
    finally:
        _cpu.set_isa(before)


def test_random_numbers(impl: Implementation) -> None:
    """Rows differ in size, so that they get from none to many entries."""
    x = randn(300, 48) * torch.linspace(0.05, 3, 300)[:, None]
    W, b, b_dec = randn(900, 48, seed=1) / 48**0.5, 0.1 * randn(900, seed=2), 0.1 * randn(48)
    got = alike(lambda: impl.batch_topk_encode(x, W, b, 5, b_dec))
    u = (x.double() - b_dec.double()) @ W.double().T + b.double()
    bar = u.flatten().topk(1500).values[-1]
    chosen = torch.zeros_like(u, dtype=torch.bool)
    chosen[reference.rows_of(got[2], 1500), got[1]] = True
    assert chosen.sum() == 1500
    assert (chosen != (u >= bar)).sum() <= 2  # near ties
    assert got[2].diff().max() > 50
    torch.testing.assert_close(got[0].double(), u[chosen], rtol=1e-5, atol=1e-5)


def test_chunks_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves GPUs, on tensors of the CPU: chunks of a few rows."""

    class Chunked(product.Encode):
        def _select(self, *args: Any, **options: Any) -> None:
            raise AssertionError

        def _list_columns(self, mask: Tensor) -> Tensor:
            raise AssertionError

        def _screen(self, *args: Any, **options: Any) -> None:
            raise AssertionError

        def bf16_copy(self, *args: Any, **options: Any) -> None:
            raise AssertionError

    monkeypatch.setattr(product, "_rows_of_chunk", lambda *_: 7)
    for kind in KINDS:
        x, W, b, b_dec = hard(kind, 40, 9, 60)
        same_selection(Chunked().batch_topk_encode(x, W, b, 3, b_dec), scores(x, W, b, b_dec), 3)
    values, _, offsets = Chunked().batch_topk_encode(x[:0], W, b, 3, b_dec)
    assert len(values) == 0 and offsets.tolist() == [0]


def coder(x: Tensor, W: Tensor, b: Tensor, b_dec: Tensor) -> Tensor:
    values, indices, offsets = ksae.batch_topk_encode(x, W, b, 3, b_dec)
    return ksae.sparse_decode(values, indices, W, b_dec, offsets)


def test_gradients_are_those_of_the_dense_coder() -> None:
    shapes = [(7, 5), (12, 5), (12,), (5,)]
    t = [randn(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes)]
    x, W, b, b_dec = t
    with torch.no_grad():
        b -= 2.0  # fewer positives than entries
    u = (x - b_dec) @ W.T + b
    keep = torch.zeros_like(u).flatten()
    keep[u.flatten().topk(21).indices] = 1
    dense = (u * keep.view_as(u)).relu() @ W + b_dec
    torch.testing.assert_close(coder(*t), dense)
    want = torch.autograd.grad(dense.square().sum(), t)
    for got, w in zip(torch.autograd.grad(coder(*t).square().sum(), t), want, strict=True):
        torch.testing.assert_close(got, w)
    assert torch.autograd.gradcheck(coder, t)


def test_messages() -> None:
    x, W, b, b_dec = problem(3, 4, 6)
    with pytest.raises(ValueError, match=r"batch_topk_encode: k must be in \[1, 6\] for W_enc"):
        ksae.batch_topk_encode(x, W, b, 7, b_dec)
    with pytest.raises(ValueError, match="k must be at most 2147 for 1000000 rows, got 2148"):
        ops.batch_topk_encode(*(t.to("meta") for t in problem(1_000_000, 1, 3000)[:3]), 2148)


def test_leading_dimensions_and_strides() -> None:
    x, W, b, b_dec = problem(12, 9, 40)
    whole = ksae.batch_topk_encode(x, W, b, 3, b_dec)
    wide = torch.stack([x, x], 2)[..., 0].reshape(3, 4, 9)
    for got, want in zip(ksae.batch_topk_encode(wide, W, b, 3, b_dec), whole, strict=True):
        assert torch.equal(got, want)
