# SPDX-License-Identifier: Apache-2.0
"""Every op's numbers, each implementation and dtype, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    SCORES,
    SHAPES,
    Implementation,
    assert_close,
    assert_same,
    code,
    dense_model,
    integers,
    norm_arguments,
    randn,
    row_arguments,
    scores,
    sums_arguments,
    written,
)
from implementations import CPU, EVERY, INTERPRETED, KERNELS
from torch import Tensor

from ksae import functional, ops, reference
from ksae.backends import cpu as native

every_kernel = pytest.mark.implementations(*KERNELS)
every_implementation = pytest.mark.implementations(*EVERY)
interpreted_too = pytest.mark.implementations(*EVERY, INTERPRETED)
Shape = tuple[int, int, int, int]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-d{}-F{}-k{}".format(*s))

# --------------------------------------------------------------------------------------------- topk


@pytest.mark.parametrize("kind", SCORES)
@every_kernel
def test_topk(impl: Implementation, dtype: torch.dtype, kind: str) -> None:
    for F in (1, 33, 130, 1000):
        x = scores(kind, 7, F, dtype)
        for k in {1, min(5, F), F // 2 + 1, F}:
            got, want = impl.topk(x, k), reference.topk(x, k)
            assert_same("values", got[0], want[0])
            assert_same("indices", got[1], want[1])
            assert_same("values at the indices", got[0], x.gather(1, got[1]))


@every_kernel
def test_topk_of_many_columns_and_of_no_row(impl: Implementation, dtype: torch.dtype) -> None:
    x = randn(2, 70_001, dtype=dtype)  # indices past 16 bits, and many ties at 16 bits a number
    for k in (1, 9, 700):
        assert_same("indices", impl.topk(x, k)[1], reference.topk(x, k)[1])
    values, indices = impl.topk(x[:0], 3)
    assert values.shape == indices.shape == (0, 3) and indices.dtype == torch.int64


# ------------------------------------------------------------------------------------------- encode


def masks(F: int, k: int) -> list[Tensor | None]:
    """None, half, fewer True than k, none True."""
    few = torch.zeros(F, dtype=torch.bool)
    few[F // 2 : F // 2 + max(k // 2, 1)] = True
    return [None, torch.arange(F) % 2 == 1, few, torch.zeros(F, dtype=torch.bool)]


@shapes
@pytest.mark.implementations(*KERNELS, INTERPRETED)
def test_encode_of_integers_is_the_reference_bit_by_bit(
    impl: Implementation, dtype: torch.dtype, shape: Shape
) -> None:
    """Sums are exact in every order, so selection has no excuse; ties are everywhere."""
    N, d, F, k = shape
    x, W, b = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    for b_dec in (None, integers(d, dtype=dtype, seed=3)):
        for mask in masks(F, k):
            got, want = (i.topk_encode(x, W, b, k, b_dec, mask) for i in (impl, reference))
            assert_same("values", got[0], want[0])
            assert_same("indices", got[1], want[1])
    if mask is not None and N:
        assert (got[0] == 0).all()  # all masked


@pytest.mark.parametrize(
    "kind", ["equal", "negative", "x nan", "x inf", "W nan", "W inf", "b", "zeros"]
)
@every_kernel
def test_encode_of_special_numbers(impl: Implementation, dtype: torch.dtype, kind: str) -> None:
    N, d, F, k = 7, 17, 130, 9
    x, W, b = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    nan, inf = torch.nan, torch.inf
    match kind:
        case "equal":
            W = W[:1].expand(F, d).contiguous()
            b.fill_(1)
        case "negative":
            x, W = x.abs(), -W.abs()
            b = -b.abs() - 1
        case "x nan":
            x[2, 3], x[5] = nan, nan
        case "x inf":
            x[1, 4], x[3, 0], x[4, 16] = inf, -inf, inf
        case "W nan":
            W[7, 0], W[129, 16], W[64] = nan, nan, nan
        case "W inf":
            W[3, 2], W[40, 5] = inf, -inf
        case "b":
            b[0], b[77], b[129] = inf, nan, -inf
        case "zeros":
            x, W = -torch.zeros_like(x), W * 0
            b = torch.where(torch.arange(F) % 2 == 0, -0.0, 0.0).to(dtype)
    for mask in masks(F, k)[:3]:
        got, want = (i.topk_encode(x, W, b, k, None, mask) for i in (impl, reference))
        assert_same("values", got[0], want[0])
        assert_same("indices", got[1], want[1])


@shapes
@every_implementation
def test_encode_of_normal_numbers(impl: Implementation, dtype: torch.dtype, shape: Shape) -> None:
    N, d, F, k = shape
    x, W, b, b_dec = (
        randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,), (d,)])
    )
    values, indices = impl.topk_encode(x, W, b, k, b_dec)
    xc = x - b_dec  # rounded to dtype by definition
    u = xc.double() @ W.double().T + b.double()
    plain = torch.nn.functional.linear(xc, W, b)
    assert_close("values", values, plain.gather(1, indices).relu(), u.gather(1, indices).relu())
    # the support may differ from the oracle's by the error of a float32 sum only
    bound = 4 * torch.finfo(torch.float32).eps * (xc.abs().double() @ W.abs().double().T + b.abs())
    at_k = u.sort(dim=1, descending=True).values[:, k - 1 : k]
    assert (u.gather(1, indices) >= at_k - bound.amax(1, keepdim=True)).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (values[:, 1:] <= values[:, :-1]).all()


# ------------------------------------------------------------------------------------------- decode


def dense(values: Tensor, indices: Tensor, F: int) -> Tensor:
    """The code with its zeros [N, F]; repeats add up."""
    return torch.zeros(values.shape[0], F, dtype=values.dtype).scatter_add(
        1, indices.long(), values
    )


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@shapes
@interpreted_too
def test_decode(
    impl: Implementation, dtype: torch.dtype, shape: Shape, index_dtype: torch.dtype
) -> None:
    N, d, F, k = shape
    values, indices = code(N, F, k, dtype)
    indices = indices.to(index_dtype)
    W, b, grad = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(F, d), (d,), (N, d)]))
    a = dense(values.double(), indices, F)
    rows = W[indices.long()]  # [N, k, d]
    plain = torch.einsum("nk,nkd->nd", values, rows)
    assert_close("decode", impl.sparse_decode(values, indices, W), plain, a @ W.double())
    exact = a @ W.double() + b.double()
    assert_close("decode with bias", impl.sparse_decode(values, indices, W, b), plain + b, exact)

    for bias, target in ((b, grad), (None, grad.float())):  # a target in T, or unrounded
        exact = a @ W.double() - target.double() + (0 if bias is None else b.double())
        recon = plain if bias is None else plain + b
        args = (values, indices, W, bias, target)
        residual, sq_error, grads = impl.sparse_residual(*args, d)
        assert residual.dtype == grads.dtype == torch.float32 and sq_error.dtype == torch.float64
        assert_close("residual", residual, (recon - target).float(), exact)
        torch.testing.assert_close(sq_error, residual.double().square().sum(1), rtol=1e-6, atol=0)
        exact_grads = (exact @ W.double().T).gather(1, indices.long())
        exact_grads = torch.where(values == 0, 0, exact_grads)
        plain_grads = torch.einsum("nd,nkd->nk", recon - target, rows.to(target.dtype))
        assert_close("products", grads, torch.where(values == 0, 0, plain_grads), exact_grads)
        start, stop = d // 3, d - d // 4
        part = impl.sparse_residual_slice(*args, start, stop)
        assert_same("slice", part, residual[:, start:stop])
        assert_same("first columns", impl.sparse_residual(*args, start)[0], residual[:, :start])

    got = impl.sparse_decode_backward_values(grad, indices, W)
    exact = (grad.double() @ W.double().T).gather(1, indices.long())
    assert_close("gradient of values", got, torch.einsum("nd,nkd->nk", grad, rows), exact)

    grad_W, value_sum = impl.sparse_decode_backward_weight(grad, values, indices, F)
    plain_W = dense(values, indices, F).T @ grad
    assert_close("gradient of W", grad_W, plain_W, a.T @ grad.double())
    assert_close("sum of values", value_sum, dense(values, indices, F).sum(0), a.sum(0))

    for name, t, want in zip(
        ("offsets", "order"),
        impl.group_by_latent(values, indices, F),
        reference.group_by_latent(values, indices, F),
        strict=True,
    ):
        assert_same(name, t, want)


@interpreted_too
def test_decode_of_special_numbers(impl: Implementation, dtype: torch.dtype) -> None:
    """Zero values silence infinite rows; NaN values count as entries and spread; -0 is a zero."""
    N, d, F, k = 7, 19, 33, 6
    values, indices = code(N, F, k, dtype)
    W, grad = integers(F, d, dtype=dtype), integers(N, d, dtype=dtype, seed=1)
    values = (values * 2).round()
    values[1], values[2, 3], values[3, 0], values[4] = 0, torch.nan, torch.inf, -0.0
    W[indices[1, 0]], W[indices[5, 5], 3], grad[1], grad[6, 2] = (
        torch.inf,
        torch.nan,
        torch.nan,
        torch.inf,
    )
    arguments: list[tuple[str, tuple[Any, ...]]] = [
        ("sparse_decode", (values, indices, W)),
        ("sparse_decode_backward_values", (grad, indices, W)),
        ("sparse_decode_backward_weight", (grad, values, indices, F)),
        ("group_by_latent", (values, indices, F)),
        ("sparse_residual", (values, indices, W, W[0], grad, d)),
        ("sparse_residual_slice", (values, indices, W, None, grad, 3, 11)),
    ]
    for name, args in arguments:  # sums are exact: only the last rounding is left
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
        got, want = getattr(impl, name)(*args), getattr(reference, name)(*wide)
        for g, w in zip(*([t] if isinstance(t, Tensor) else t for t in (got, want)), strict=True):
            assert_same(name, g, w.to(g.dtype))


@every_implementation
def test_one_latent_takes_every_token(impl: Implementation, dtype: torch.dtype) -> None:
    """A hot latent: one segment of N entries, all others empty."""
    N, d, F = 700, 9, 33
    grad, values = integers(N, d, dtype=dtype), integers(N, 1, dtype=dtype, seed=1).abs()
    indices = torch.full((N, 1), 32)
    got = impl.sparse_decode_backward_weight(grad, values, indices, F)
    want = reference.sparse_decode_backward_weight(grad, values, indices, F)
    assert_same("gradient of W", got[0], want[0])
    assert_same("sum of values", got[1], want[1])
    assert (got[0][:32] == 0).all()


# -------------------------------------------------------------------------------------- determinism


def test_bits_do_not_depend_on_the_number_of_threads(
    impl: Implementation, dtype: torch.dtype, threads: None
) -> None:
    N, d, F, k = 61, 40, 517, 17
    x, W, b = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    mask = torch.arange(F) % 3 == 0
    results = []
    # the reference promises equal runs; across threads torch's own product may differ
    for count in (1, 2, 3) if impl.native else (1, 1):
        torch.set_num_threads(count)
        out: list[Tensor] = []
        out += impl.topk_encode(x, W, b, k)
        out += impl.topk_encode(x, W, b, k, None, mask)
        values, indices = impl.topk_encode(x, W, b, k)
        out += impl.topk(x, 7)
        out.append(impl.sparse_decode(values, indices, W))
        out += impl.sparse_residual(values, indices, W, x[0], x, d)
        out.append(impl.sparse_decode_backward_values(x, indices, W))
        out += impl.sparse_decode_backward_weight(x, values, indices, F)
        out += impl.group_by_latent(values, indices, F)
        out += impl.latent_sums(*sums_arguments(dtype, N=61, F=97).values())
        for side in ("encoder", "decoder"):
            a = row_arguments(dtype, side, N=61, F=97)
            out.append(impl.row_grad_sq(*norm_arguments(a)))
            impl.row_update(*a.values())
            out += written(a).values()
        results.append(out)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# ------------------------------------------------------------------- gradients through the op table


@pytest.mark.implementations(CPU)
def test_gradients_through_the_ops(impl: Implementation, dtype: torch.dtype) -> None:
    gradients_through_the_ops(dtype)


def test_gradients_through_the_ops_in_float64() -> None:
    gradients_through_the_ops(torch.float64)


def gradients_through_the_ops(kind: torch.dtype) -> None:
    """Encode and decode under autograd against the dense model, in float64 and in the dtype."""
    N, d, F, k = 19, 17, 130, 12
    shapes = {"x": (N, d), "W_enc": (F, d), "b_enc": (F,), "W_dec": (F, d), "b_dec": (d,)}
    # sixteenths up to 2: the difference x - b_dec is exact in every dtype
    t = {
        n: (randn(*s, seed=i).clamp(-2, 2) * 16).round() / 16
        for i, (n, s) in enumerate(shapes.items())
    }
    t["b_enc"] -= 3
    weight = randn(N, d, seed=9, dtype=kind)

    def run(model: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: p.to(dtype).requires_grad_() for n, p in t.items()}
        recon = model(**leaves)
        return [
            recon,
            *torch.autograd.grad((recon * weight.to(dtype)).sum(), list(leaves.values())),
        ]

    chosen: list[Tensor] = []

    def ours(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        values, indices = ops.topk_encode(x, W_enc, b_enc, k, b_dec)
        chosen.append(indices)
        return ops.sparse_decode(values, indices, W_dec, b_dec)

    got = run(ours, kind)
    model = lambda **p: dense_model(**p, indices=chosen[0])
    for name, g, p, e in zip(
        ["recon", *shapes], got, run(model, kind), run(model, torch.float64), strict=True
    ):
        assert_close(name, g, p, e)


def test_functional_takes_any_leading_dimensions_and_strides(
    impl: Implementation, dtype: torch.dtype
) -> None:
    d, F, k = 17, 33, 5
    x = integers(3, d, 4, 2, dtype=dtype).permute(0, 2, 3, 1)  # [3, 4, 2, d], not contiguous
    W, b = integers(d, F, dtype=dtype, seed=1).T, integers(2 * F, dtype=dtype, seed=2)[::2]
    rows = x.reshape(-1, d).contiguous()
    values, indices = functional.topk_encode(x, W, b, k)
    want = reference.topk_encode(rows, W.contiguous(), b.contiguous(), k)
    assert_same("values", values, want[0].reshape(3, 4, 2, k))
    assert_same("indices", indices, want[1].reshape(3, 4, 2, k))
    one = functional.topk_encode(x[1, 2, 1], W, b, k)
    assert torch.equal(one[0], values[1, 2, 1]) and torch.equal(one[1], indices[1, 2, 1])
    assert_same("topk", functional.topk(x, 3)[0], reference.topk(rows, 3)[0].reshape(3, 4, 2, 3))
    sliced = functional.sparse_decode(values[:, ::2], indices[:, ::2], W)
    whole = functional.sparse_decode(values, indices, W)
    assert_same("decode", sliced, whole[:, ::2])
    assert functional.sparse_decode(values[:0], indices[:0], W).shape == (0, 4, 2, d)


def test_float64_is_left_to_the_reference() -> None:
    x = randn(3, 9).double()
    assert_same("values", ops.topk(x, 4)[0], reference.topk(x, 4)[0])
    assert ops.serving()["topk"].get("cpu", "native" if native.available() else None) in (
        None,
        "native",
    )
