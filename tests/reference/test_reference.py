# SPDX-License-Identifier: Apache-2.0
"""The reference against definitions in plain Python and dense float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cases import NAMES, SCORES, code, dense_model, randn, row_arguments, scores, to_float64
from torch import Tensor

from ksae import ops, reference


def by_definition(row: list[float], k: int) -> list[int]:
    """Indices of the k first of a row: NaN first, then the larger, equal ones by index."""
    key = lambda i: (not math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i)
    return sorted(range(len(row)), key=key)[:k]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SCORES)
def test_topk_by_definition(kind: str, dtype: torch.dtype) -> None:
    x = scores(kind, 5, 33, dtype)
    for k in (1, 7, 33):
        values, indices = reference.topk(x, k)
        assert indices.tolist() == [by_definition(row, k) for row in x.tolist()]
        torch.testing.assert_close(values, x.gather(1, indices), rtol=0, atol=0, equal_nan=True)
        assert indices.dtype == torch.int64 and values.dtype == dtype


def test_topk_encode_by_definition() -> None:
    x, W, b = (
        randn(6, 5, dtype=torch.float64),
        randn(30, 5, dtype=torch.float64, seed=1),
        randn(30).double(),
    )
    b_dec, mask = randn(5, seed=2).double(), torch.arange(30) % 7 == 0  # 5 are True
    for m, k in ((None, 30), (None, 4), (mask, 8), (torch.zeros(30, dtype=torch.bool), 3)):
        values, indices = reference.topk_encode(x, W, b, k, b_dec, m)
        for n in range(6):
            u = [float((x[n] - b_dec) @ W[i] + b[i]) for i in range(30)]
            u = [p if m is None or m[i] else -math.inf for i, p in enumerate(u)]
            want = by_definition(u, k)
            assert indices[n].tolist() == want
            torch.testing.assert_close(values[n].tolist(), [max(u[i], 0.0) for i in want])


def test_rows_short_of_positives_carry_zeros() -> None:
    values, indices = reference.topk_encode(
        torch.ones(1, 1), -torch.ones(4, 1), torch.tensor([0.0, 3, 1, 0]), 3
    )
    assert values.tolist() == [[2, 0, 0]] and indices.tolist() == [[1, 2, 0]]


def test_zero_value_adds_nothing_even_to_infinity() -> None:
    W = torch.tensor([[torch.inf, torch.nan], [1.0, 2.0]])
    values, indices = torch.tensor([[0.0, 3.0]]), torch.tensor([[0, 1]])
    assert reference.sparse_decode(values, indices, W).tolist() == [[3, 6]]
    grad = torch.tensor([[torch.inf, torch.nan]])
    grad_W, value_sum = reference.sparse_decode_backward_weight(grad, torch.zeros(1, 2), indices, 2)
    assert grad_W.abs().sum() == 0 and value_sum.tolist() == [0, 0]


def test_group_by_latent_by_definition() -> None:
    values, indices = code(9, 11, 6, torch.float32)
    values[0, 0] = torch.nan  # counts as used
    offsets, order = reference.group_by_latent(values, indices, 11)
    assert offsets.dtype == order.dtype == torch.int32
    flat = list(zip(values.flatten().tolist(), indices.flatten().tolist(), strict=True))
    for i in range(11):
        want = [p for p, (v, latent) in enumerate(flat) if v != 0 and latent == i]
        assert order[offsets[i] : offsets[i + 1]].tolist() == want
    assert (order[offsets[-1] :] == -1).all() and offsets[-1] < order.numel()
    restored = reference.group._ungroup(offsets, order, values.shape)
    assert torch.equal(restored[values != 0], indices[values != 0])


def gradients(loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(tensors.values()))
    return dict(zip(tensors, grads, strict=True))


@pytest.mark.parametrize("N", [1, 13])
def test_gradients_are_those_of_the_dense_model(N: int) -> None:
    """x, W_enc, b_enc, W_dec and b_dec (both paths), with rows short of positives."""
    d, F, k = 6, 20, 15
    shapes = {"x": (N, d), "W_enc": (F, d), "b_enc": (F,), "W_dec": (F, d), "b_dec": (d,)}
    t = {n: randn(*s, seed=i).double().requires_grad_() for i, (n, s) in enumerate(shapes.items())}
    with torch.no_grad():
        t["b_enc"] -= 2.0
    values, indices = ops.topk_encode(t["x"], t["W_enc"], t["b_enc"], k, t["b_dec"])
    assert (values == 0).any() and (values > 0).any()
    recon = ops.sparse_decode(values, indices, t["W_dec"], t["b_dec"])
    exact = dense_model(**t, indices=indices)
    torch.testing.assert_close(recon, exact, rtol=1e-12, atol=1e-12)
    weight = randn(N, d, seed=9).double()
    ours, theirs = gradients((recon * weight).sum(), t), gradients((exact * weight).sum(), t)
    for name in t:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("centred", [True, False])
def test_the_latent_pass_is_autograd(centred: bool) -> None:
    """Gradients of the sum over groups of scale/2 |residual|^2, in float64."""
    N, d, F = 11, 6, 20
    x, b_dec, y = randn(N, d).double(), randn(d, seed=1).double(), randn(N, d, seed=2).double()
    shapes = {"W_enc": (F, d), "b_enc": (F,), "W_dec": (F, d)}
    t = {
        n: randn(*s, seed=3 + i).double().requires_grad_()
        for i, (n, s) in enumerate(shapes.items())
    }
    centre = b_dec.clone().requires_grad_()
    scales = torch.tensor([0.7, 0.2], dtype=torch.float64)
    W_dec = t["W_dec"].detach()
    loss, groups = torch.zeros((), dtype=torch.float64), []
    for k, s in zip((4, 9), scales, strict=True):
        v, i = ops.topk_encode(x, t["W_enc"], t["b_enc"], k, centre if centred else None)
        r = ops.sparse_decode(v, i, t["W_dec"], b_dec) - y
        loss = loss + s / 2 * r.square().sum()
        residual, square, grads = reference.sparse_residual(v.detach(), i, W_dec, b_dec, y, d)
        torch.testing.assert_close(residual, r.detach())
        torch.testing.assert_close(square.sum(), r.detach().square().sum())
        groups.append((v.detach(), grads, *reference.group_by_latent(v, i, F), residual))
    values, products, offsets, order, residuals = (list(g) for g in zip(*groups, strict=True))
    want = gradients(loss, t | ({"b_dec": centre} if centred else {}))

    grad_b_enc, grad_dot_w = reference.latent_sums(values, products, offsets, order, scales)
    torch.testing.assert_close(grad_b_enc, want["b_enc"])
    torch.testing.assert_close(grad_dot_w, (want["W_dec"] * W_dec).sum(1))
    middle = b_dec if centred else None
    encoder = (products, offsets, order, [x, x], scales, middle, None, t["W_enc"].detach())
    decoder = (values, offsets, order, residuals, scales, None, None, W_dec)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    projected = want["W_dec"] - (want["W_dec"] * unit).sum(1, keepdim=True) * unit
    for args, gradient in (
        (encoder, want["W_enc"]),
        (decoder, want["W_dec"]),
        ((*decoder[:6], grad_dot_w, W_dec), projected),
    ):
        square = reference.row_grad_sq(*args, 0)
        torch.testing.assert_close(square, gradient.square().sum(1))
        # with beta1 = 0, lr = eps and both huge, Adam steps by the gradient
        hyper = torch.tensor([1e14, 1, 0, 0, 1e14, 1, 1, 1], dtype=torch.float64)
        W, m, v = args[-1].clone(), torch.zeros(F, d).double(), torch.zeros(F, d).double()
        into = torch.empty(d, dtype=torch.float64)
        reference.row_update(*args[:-1], grad_b_enc, W, None, m, v, hyper, into, 0, False)
        torch.testing.assert_close(m, gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(v, gradient.square(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(args[-1] - W, gradient, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(into, args[-1].T @ grad_b_enc)
        if centred and args is encoder:
            torch.testing.assert_close(-into, want["b_dec"])


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_row_update_is_torchs_adam(side: str) -> None:
    """Three steps with scaled gradients, then unit rows."""
    a = to_float64(row_arguments(torch.float32, side))
    theta = a["W"].clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, foreach=False)
    a["m"].zero_()
    a["v"].zero_()
    for t in range(1, 4):
        hyper = [1e-2 / (1 - 0.9**t), math.sqrt(1 - 0.99**t), 0.9, 0.99, 1e-8, 0.5, 0.1, 0.01]
        a["hyper"] = torch.tensor(hyper, dtype=torch.float64)
        gradient = torch.zeros_like(a["W"])
        groups = zip(
            a["coefficients"], a["offsets"], a["order"], a["rows"], a["scales"], strict=True
        )
        for c, off, order, rows, scale in groups:
            for i in range(33):
                for position in order[off[i] : off[i + 1]].tolist():
                    row = rows[position // c.shape[1]]
                    row = row if a["centre"] is None else row - a["centre"]
                    gradient[i] += scale * c.flatten()[position] * row
        if a["grad_dot_w"] is not None:
            square = a["W"].square().sum(1, keepdim=True)
            gradient -= torch.where(square > 0, a["grad_dot_w"][:, None] / square, 0) * a["W"]
        theta.grad = 0.5 * gradient
        adam.step()
        if a["normalize"]:
            with torch.no_grad():
                theta /= theta.norm(dim=1, keepdim=True)
        reference.row_update(**a)
        torch.testing.assert_close(a["W"], theta.detach(), rtol=1e-12, atol=1e-13)


def test_every_op_has_a_reference() -> None:
    assert all(callable(getattr(reference, name)) for name in NAMES)
