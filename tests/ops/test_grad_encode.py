# SPDX-License-Identifier: Apache-2.0
"""Gradient-aware TopK: its numbers against the float64 oracle, and the properties of its score."""

from __future__ import annotations

import pytest
import torch
from cases import (
    SHAPES,
    Implementation,
    assert_close,
    assert_same,
    grad_encode_arguments,
    integers,
    randn,
)
from implementations import EVERY, KERNELS
from torch import Tensor

import ksae
from ksae import ops, reference
from ksae.ops import MODES

every_implementation = pytest.mark.implementations(*EVERY)
Shape = tuple[int, int, int, int]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-d{}-F{}-k{}".format(*s))
modes = pytest.mark.parametrize("mode", MODES)


def oracle(args: list[Tensor], beta: float, mode: str) -> tuple[Tensor, Tensor]:
    """u and score [N, F] in float64, as a formula of their own."""
    x, grad, W_enc, b_enc, W_dec = (t.double() for t in args)
    u = x @ W_enc.T + b_enc
    a = grad @ W_dec.T
    gate = {
        "additive": 1 + beta * a.abs(),
        "multiplicative": a.abs(),
        "signed": 1 + beta * (-a).clamp(min=0),
    }[mode]
    plain = (grad == 0).all(1) | ~grad.isfinite().all(1)
    return u, torch.where((u <= 0) | plain[:, None], u, u * gate)


@modes
@shapes
@every_implementation
def test_integers_are_the_reference_bit_by_bit(
    impl: Implementation, dtype: torch.dtype, shape: Shape, mode: str
) -> None:
    """Sums are exact in every order and ties are everywhere; so is beta, a power of two."""
    args = grad_encode_arguments(shape, dtype, exact=True)
    k = shape[3]
    if shape[0] > 2:
        args[1][1] = 0  # a row without a gradient
        args[1][2, 0] = torch.inf
    for b_dec in (None, integers(shape[1], dtype=dtype, seed=9)):
        for beta in (0.0, 0.25, 8.0):
            got = impl.grad_topk_encode(*args, k, beta, mode, b_dec)
            xc = args[0] if b_dec is None else args[0] - b_dec
            plain = beta == 0 and mode != "multiplicative"  # then no gradient is looked at
            no_gradient = [xc, args[1] * 0 if plain else args[1], *args[2:]]
            u, score = oracle(no_gradient, beta, mode)
            order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
            assert_same("indices", got[1], order)
            assert_same("values", got[0], u.gather(1, order).relu().to(dtype))


@modes
@pytest.mark.parametrize("d_out", [None, 5], ids=["same-width", "other-width"])
@shapes
@every_implementation
def test_normal_numbers(
    impl: Implementation, dtype: torch.dtype, shape: Shape, mode: str, d_out: int | None
) -> None:
    args = grad_encode_arguments(shape, dtype, d_out=d_out)
    k, beta = shape[3], 0.5
    values, indices = impl.grad_topk_encode(*args, k, beta, mode)
    u, score = oracle(args, beta, mode)
    plain = torch.nn.functional.linear(args[0], args[2], args[3])
    assert_close("values", values, plain.gather(1, indices).relu(), u.gather(1, indices).relu())
    assert all(len(set(row)) == k for row in indices.tolist())
    # the support may differ from the oracle's by the error of float32 sums only: of u and of a
    x, grad, W_enc, b_enc, W_dec = (t.double().abs() for t in args)
    du = 4 * torch.finfo(torch.float32).eps * (x @ W_enc.T + b_enc)  # [N, F]
    da = 4 * torch.finfo(torch.float32).eps * (grad @ W_dec.T)
    bound = du * (1 + (beta + 1) * (grad @ W_dec.T)) + (u.abs() + du) * (beta + 1) * da
    at_k = score.sort(dim=1, descending=True).values[:, k - 1 : k]
    chosen = score.gather(1, indices)
    assert (chosen >= at_k - 2 * bound.amax(1, keepdim=True)).all()
    assert (chosen[:, 1:] <= chosen[:, :-1] + 2 * bound.amax(1, keepdim=True)).all()


@shapes
@every_implementation
def test_without_weight_or_gradient_it_is_topk_encode_bit_for_bit(
    impl: Implementation, dtype: torch.dtype, shape: Shape
) -> None:
    x, grad, W_enc, b_enc, W_dec = grad_encode_arguments(shape, dtype)
    k = shape[3]
    b_dec = randn(shape[1], dtype=dtype, seed=8)
    want = impl.topk_encode(x, W_enc, b_enc, k, b_dec)
    none = torch.zeros_like(grad)
    bad = grad.clone()
    if len(bad):
        bad[:, -1] = torch.nan
    cases = [(grad, 0.0, "additive"), (grad, 0.0, "signed")]
    cases += [(g, 2.0, mode) for g in (none, -none, bad) for mode in MODES]
    for g, beta, mode in cases:
        got = impl.grad_topk_encode(x, g, W_enc, b_enc, W_dec, k, beta, mode, b_dec)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@modes
@pytest.mark.parametrize("kind", ["x nan", "x inf", "W_enc nan", "W_dec nan", "b inf", "negative"])
@pytest.mark.implementations(*KERNELS)
def test_special_numbers(impl: Implementation, dtype: torch.dtype, mode: str, kind: str) -> None:
    args = grad_encode_arguments((7, 17, 130, 9), dtype, exact=True)
    x, _, W_enc, b_enc, W_dec = args
    match kind:
        case "x nan":
            x[2, 3], x[5] = torch.nan, torch.nan
        case "x inf":
            x[1, 4], x[3, 0] = torch.inf, -torch.inf
        case "W_enc nan":
            W_enc[7, 0], W_enc[129, 16] = torch.nan, torch.nan
        case "W_dec nan":
            W_dec[3, 2], W_dec[64, 5] = torch.nan, torch.inf
        case "b inf":
            b_enc[0], b_enc[77] = torch.inf, -torch.inf
        case "negative":
            x.abs_(), W_enc.abs_().neg_(), b_enc.fill_(-1)
    got, want = (i.grad_topk_encode(*args, 9, 0.5, mode) for i in (impl, reference))
    assert_same("values", got[0], want[0])
    assert_same("indices", got[1], want[1])


@every_implementation
def test_scaled_inputs_keep_their_selection(impl: Implementation, dtype: torch.dtype) -> None:
    """x / c with g c leaves z a as it is; additively that takes beta / c or unit gradients."""
    shape, k, c = (19, 100, 1000, 32), 32, 4.0  # powers of two scale without rounding
    x, grad, W_enc, _, W_dec = grad_encode_arguments(shape, dtype)
    b_enc = torch.zeros(1000, dtype=dtype)

    def select(x: Tensor, g: Tensor, beta: float, mode: str) -> Tensor:
        return impl.grad_topk_encode(x, g, W_enc, b_enc, W_dec, k, beta, mode)[1]

    base = select(x, grad, 0.5, "multiplicative")
    assert torch.equal(select(x / c, grad * c, 0.5, "multiplicative"), base)
    base = select(x, grad, 0.5, "additive")
    assert not torch.equal(select(x / c, grad * c, 0.5, "additive"), base)
    assert torch.equal(select(x / c, grad * c, 0.5 / c, "additive"), base)
    unit = grad / grad.norm(dim=1, keepdim=True)
    again = grad * c / (grad * c).norm(dim=1, keepdim=True)
    assert torch.equal(select(x / c, again, 8.0, "additive"), select(x, unit, 8.0, "additive"))


@modes
def test_gradients_are_those_of_the_fixed_selection(mode: str) -> None:
    args = [
        t.requires_grad_(i != 1)
        for i, t in enumerate(grad_encode_arguments((5, 6, 20, 4), torch.float64))
    ]
    b_dec = randn(6, seed=8).double().requires_grad_()
    values, indices = ksae.grad_topk_encode(*args, 4, 1.0, mode, b_dec)
    weight = randn(5, 4, seed=7).double()
    x, _, W_enc, b_enc, W_dec = args
    got = torch.autograd.grad(
        (values * weight).sum(), [x, W_enc, b_enc, b_dec, W_dec], allow_unused=True
    )
    dense = ((x - b_dec) @ W_enc.T + b_enc).gather(1, indices).relu()
    want = torch.autograd.grad((dense * weight).sum(), [x, W_enc, b_enc, b_dec])
    assert got[-1] is None  # nothing flows through the score
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, w)


@modes
def test_opcheck_and_compile(mode: str) -> None:
    x, grad, W_enc, b_enc, W_dec = grad_encode_arguments((5, 6, 20, 4), torch.float32)
    for t in (x, W_enc, b_enc):
        t.requires_grad_()
    b_dec = torch.ones(6, requires_grad=True)
    args = (x, grad, W_enc, b_enc, W_dec, 4, 0.5, mode)
    torch.library.opcheck(ops.grad_topk_encode, (*args, b_dec))
    torch.library.opcheck(ops.grad_topk_encode, args)
    torch._dynamo.reset()
    compiled = torch.compile(ksae.grad_topk_encode, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args, b_dec), ksae.grad_topk_encode(*args, b_dec), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": -1.0}, ValueError, "beta must be a finite number >= 0, got -1.0"),
        ({"beta": float("nan")}, ValueError, "beta must be a finite number >= 0, got nan"),
        ({"beta": float("inf")}, ValueError, "beta must be a finite number >= 0, got inf"),
        ({"mode": "abs"}, ValueError, "mode must be one of additive, multiplicative, signed, got"),
        ({"grad": torch.zeros(4, 6)}, ValueError, r"grad must be of shape \[5, 6\].*got \[4, 6\]"),
        ({"grad": torch.zeros(5, 7)}, ValueError, r"grad must be of shape \[5, 6\], got \[5, 7\]"),
        ({"grad": torch.zeros(5, 6).half()}, TypeError, "grad must be torch.float32"),
        ({"grad": torch.zeros(5, 6, requires_grad=True)}, ValueError, "grad must be detached"),
        ({"W_dec": torch.zeros(19, 6)}, ValueError, r"W_dec must be of shape \[20, \*\]"),
        ({"k": 21}, ValueError, r"k must be in \[1, 20\]"),
    ],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else None,
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    names = ("x", "grad", "W_enc", "b_enc", "W_dec")
    args = dict(zip(names, grad_encode_arguments((5, 6, 20, 4), torch.float32), strict=True))
    with pytest.raises(error, match=f"^grad_topk_encode: {message}"):
        ksae.grad_topk_encode(**{**args, "k": 4, "beta": 0.5, **change})
