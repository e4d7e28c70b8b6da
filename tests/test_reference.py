# SPDX-License-Identifier: Apache-2.0
"""The reference against definitions in plain Python and dense float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cases import NAMES, SCORES, code, dense_model, latent_arguments, randn, scores, to_float64
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
    restored = reference._ungroup(offsets, order, values.shape)
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
def test_latent_gradients_are_those_of_autograd(centred: bool) -> None:
    """Autograd of the sum over groups of scale/2 |residual|^2, in float64."""
    N, d, F = 11, 6, 20
    x, b_dec, y = randn(N, d).double(), randn(d, seed=1).double(), randn(N, d, seed=2).double()
    W_enc, b_enc = (
        randn(F, d, seed=3).double().requires_grad_(),
        randn(F, seed=4).double().requires_grad_(),
    )
    W_dec = randn(F, d, seed=5).double().requires_grad_()
    centre = b_dec.clone().requires_grad_()
    scales = torch.tensor([0.7, 0.2], dtype=torch.float64)
    groups, residuals, loss = [], [], torch.zeros((), dtype=torch.float64)
    for k, s in zip((4, 9), scales, strict=True):
        v, i = ops.topk_encode(x, W_enc, b_enc, k, centre if centred else None)
        r = ops.sparse_decode(v, i, W_dec, b_dec) - y
        loss = loss + s / 2 * r.square().sum()
        groups.append((v.detach(), *reference.group_by_latent(v.detach(), i, F)))
        residuals.append(r.detach())
    values, offsets, order = (list(t) for t in zip(*groups, strict=True))
    wanted = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec} | (
        {"b_dec": centre} if centred else {}
    )
    want = gradients(loss, wanted)
    parameters = (W_enc.detach(), b_enc.detach(), W_dec.detach())
    common = (x, b_dec if centred else None, values, offsets, order, residuals, scales)
    got = reference._latent_gradients(*common, parameters[0], parameters[2])
    for name, g in zip(("W_enc", "b_enc", "W_dec"), got, strict=False):
        torch.testing.assert_close(g, want[name], rtol=1e-11, atol=1e-12)
    if centred:
        torch.testing.assert_close(-got[3], want["b_dec"], rtol=1e-11, atol=1e-12)
    for project in (False, True):
        square, grad_b_dec = reference.latent_grad_norm(*common, *parameters, project)
        dW_dec = want["W_dec"]
        if project:
            unit = parameters[2] / parameters[2].norm(dim=1, keepdim=True)
            dW_dec = dW_dec - (dW_dec * unit).sum(1, keepdim=True) * unit
        exact = want["W_enc"].square().sum(1) + want["b_enc"].square() + dW_dec.square().sum(1)
        torch.testing.assert_close(square, exact, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grad_b_dec, got[3])


def test_latent_update_is_torchs_adam() -> None:
    """Three steps with the reference gradients, projected and scaled, then unit rows."""
    a = to_float64(latent_arguments(torch.float32))
    theta = [a[n].clone().requires_grad_() for n in ("W_enc", "b_enc", "W_dec")]
    adam = torch.optim.Adam(theta, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, foreach=False)
    a["moments"] = [torch.zeros_like(m) for m in a["moments"]]
    for t in range(1, 4):
        hyper = [1e-2 / (1 - 0.9**t), math.sqrt(1 - 0.99**t), 0.9, 0.99, 1e-8, 0.5, 0.1, 0.01]
        a["hyper"] = torch.tensor(hyper, dtype=torch.float64)
        names = (
            "x",
            "b_dec",
            "values",
            "offsets",
            "order",
            "residuals",
            "scales",
            "W_enc",
            "W_dec",
        )
        grads = list(reference._latent_gradients(*(a[n] for n in names)))
        w = a["W_dec"]
        used = w.square().sum(1) > 0
        unit = torch.where(used[:, None], w / w.norm(dim=1, keepdim=True), 0)
        grads[2] = grads[2] - (grads[2] * unit).sum(1, keepdim=True) * unit
        for p, g in zip(theta, grads, strict=False):
            p.grad = 0.5 * g
        adam.step()
        with torch.no_grad():
            theta[2] /= theta[2].norm(dim=1, keepdim=True)
        reference.latent_update(**a)
        for name, p in zip(("W_enc", "b_enc", "W_dec"), theta, strict=True):
            torch.testing.assert_close(a[name], p.detach(), rtol=1e-12, atol=1e-13)


def test_a_scale_that_is_not_finite_writes_nothing() -> None:
    for bad in (torch.nan, torch.inf):
        a, before = latent_arguments(torch.bfloat16), latent_arguments(torch.bfloat16)
        a["scales"][1] = bad
        a["grad_b_dec"].fill_(7.0)
        reference.latent_update(**a)
        assert (a["grad_b_dec"] == 0).all()
        for name in ("W_enc", "b_enc", "W_dec"):
            assert torch.equal(a[name], before[name])
        assert all(
            map(torch.equal, a["moments"] + a["masters"], before["moments"] + before["masters"])
        )


def test_every_op_has_a_reference() -> None:
    assert all(callable(getattr(reference, name)) for name in NAMES)
