# SPDX-License-Identifier: Apache-2.0
"""Pursuit: steps and gradients of matching pursuit against autograd, training, and codes found for
a given dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from training import assert_resumes

import ksae
from ksae.coders.coder import SparseCoder
from ksae.coders.pursuit import merged

N, D, F, K = 40, 11, 50, 7


def unit(*shape: int, seed: int) -> Tensor:
    W = randn(*shape, seed=seed).double()
    return W / W.norm(dim=1, keepdim=True)


def plain(
    x: Tensor, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, stop: bool = False
) -> tuple[Tensor, Tensor]:
    """The dense code [N, F] and the last residual, by autograd through every step."""
    r, z = x - b_dec, x.new_zeros(len(x), len(W_dec))
    done = torch.zeros(len(x), 1, dtype=torch.bool)
    for _ in range(k):
        u = r @ W_enc.T
        j = u.argmax(1, keepdim=True)
        c = torch.where(done, 0, u.gather(1, j).relu())
        if stop:
            done = done | (z.gather(1, j) > 0)
        z = z.scatter_add(1, j, c)
        r = r - c * W_dec[j[:, 0]]
    return z, r


def dense(values: Tensor, indices: Tensor) -> Tensor:
    return values.new_zeros(len(values), F).scatter_add(1, indices, values)


@pytest.mark.parametrize("stop", [False, True], ids=["", "stops on repeat"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_steps_and_gradients_are_those_of_autograd(tied: bool, stop: bool) -> None:
    x, b = randn(N, D, seed=1).double().requires_grad_(), randn(D, seed=2).double() * 0.1
    b.requires_grad_()
    W_dec = unit(F, D, seed=3).requires_grad_()
    W_enc = W_dec if tied else (W_dec.detach() + 0.1 * randn(F, D, seed=4)).requires_grad_()
    leaves = [x, b, W_dec] if tied else [x, b, W_dec, W_enc]
    h = randn(N, F, seed=5).double()
    z, r = plain(x, W_enc, W_dec, b, K, stop)
    want = torch.autograd.grad((z * h).sum() + r.square().sum(), leaves)
    values, indices = ksae.pursuit.matching_pursuit(x, W_enc, W_dec, K, b, stop_on_repeat=stop)
    torch.testing.assert_close(dense(values, indices), z)
    torch.testing.assert_close(dense(*merged(values, indices)), z)
    left = x - b - ksae.sparse_decode(*merged(values, indices), W_dec)
    got = torch.autograd.grad(
        (dense(*merged(values, indices)) * h).sum() + left.square().sum(), leaves
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
    twice = [len(set(row)) < K for row in indices.tolist()]
    assert any(twice)  # a latent that is taken again
    assert bool((values[twice] == 0).any()) == stop


def test_merged() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 0.0, 0.0, 0.0]])
    indices = torch.tensor([[5, 3, 5, 5], [2, 2, 0, 2]])
    found, at = merged(values, indices)
    assert at.tolist() == [[3, 5, 5, 5], [0, 2, 2, 2]]
    assert found.tolist() == [[2, 13, 0, 0], [0, 1, 0, 0]]


def test_a_residual_that_is_short_enough_takes_no_more() -> None:
    x, W = randn(N, D, seed=1).double(), unit(F, D, seed=3)
    values, indices = ksae.pursuit.matching_pursuit(x, W, W, 30, tolerance=1.0)
    left = (x - ksae.sparse_decode(values, indices, W)).norm(dim=1)
    assert (left <= 1.0).all() and (values == 0).any()
    counts = (values > 0).sum(1)
    before = torch.stack([
        x[n] - ksae.sparse_decode(values[n, : c - 1], indices[n, : c - 1], W)
        for n, c in enumerate(counts.tolist())
    ])  # fmt: skip
    assert (before.norm(dim=1) > 1.0).all()


def test_no_row_and_rows_of_zeros() -> None:
    W = unit(F, D, seed=3)
    for x in (W[:0], torch.zeros(3, D, dtype=torch.float64)):
        for find in (ksae.pursuit.gradient_pursuit, ksae.pursuit.orthogonal_pursuit):
            values, indices = find(x, W, 4)
            assert values.shape == indices.shape == (len(x), 4) and not values.any()
        values, _ = ksae.pursuit.matching_pursuit(x, W, W, 4)
        assert values.shape == (len(x), 4) and not values.any()


# ------------------------------------------------------------------------------------ in training


def build(dtype: torch.dtype = torch.float64, **options: Any) -> SparseCoder:
    torch.manual_seed(0)
    settings = {"auxk_alpha": 0.0} | options
    model = ksae.SAE(D, F, ksae.MatchingPursuit(K), **settings)
    with torch.no_grad():
        model.b_dec.copy_(randn(D, seed=4) * 0.1)
        model.tokens_since_fired[::3] = 1000
    return model.to(dtype)


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_decoder": False, "loss": "mse"}, {"prefixes": [20, F]},
     {"auxk_alpha": 0.5, "dead_after": 100, "k_aux": 4}],
    ids=["fvu", "mse", "prefixes", "aux"],
)  # fmt: skip
def test_gradients_of_the_coder(options: dict[str, Any]) -> None:
    model, x = build(**options), randn(N, D, seed=7).double().requires_grad_()
    z, _ = plain(x, model.W_dec, model.W_dec, model.b_dec, K)
    variance = (x - x.mean(0)).square().sum().detach()
    unit = variance if model.loss == "fvu" else x.numel()
    widths, want_loss = model.prefixes or (F,), torch.zeros(())
    for width in widths:
        error = z[:, :width] @ model.W_dec[:width] + model.b_dec - x
        want_loss = want_loss + error.square().sum() / unit / len(widths)
    if model.auxk_alpha:
        u, e = (x - model.b_dec) @ model.W_dec.T, -error.detach()
        at = torch.where(model.dead, u, -torch.inf).topk(4).indices
        aux = torch.zeros_like(u).scatter(1, at, u.gather(1, at).relu()) @ model.W_dec
        want_loss = want_loss + 0.5 * (aux - e).square().sum() / (e - e.mean(0)).square().sum()
    leaves = [x, model.W_dec, model.b_dec]
    want = torch.autograd.grad(want_loss, leaves)
    out = model(x)
    torch.testing.assert_close(out.loss, want_loss)
    for g, w in zip(torch.autograd.grad(out.loss, leaves), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_learns_and_resumes(dtype: torch.dtype) -> None:
    atoms = unit(30, D, seed=8).float()
    x = torch.stack([
        (torch.rand(256, 3, 1) * atoms[torch.randint(30, (256, 3))]).sum(1) for _ in range(30)
    ])  # fmt: skip
    metrics = assert_resumes(
        lambda: ksae.TrainStep(build(dtype), lr=1e-2, fused=False), [(batch,) for batch in x]
    )
    fvu = [float(m["fvu"]) for m in metrics]
    assert fvu[-1] < 0.5 * fvu[0]


def test_files_and_use(tmp_path: Path) -> None:
    model, x = build(torch.float32).eval(), randn(N, D, seed=7)
    model.save(tmp_path / "model.safetensors")
    back = ksae.load(tmp_path / "model.safetensors")
    assert back.activation == model.activation and back.config() == model.config()
    want, _ = plain(x, model.W_dec, model.W_dec, model.b_dec, K)
    torch.testing.assert_close(back.encode_dense(x), want)


# ------------------------------------------------------------------------- for a given dictionary


def by_gradient(x: Tensor, W: Tensor, k: int) -> Tensor:
    """dictionary_learning's inference, densely."""
    w, active = x.new_zeros(len(x), len(W)), torch.zeros(len(x), len(W), dtype=torch.bool)
    for _ in range(k):
        r = x - w @ W
        p = r @ W.T
        active = active.scatter(1, p.argmax(1, keepdim=True), True)
        q = torch.where(active & ((w > 0) | (p > 0)), p, 0)
        c = q @ W
        square = c.square().sum(1, keepdim=True)
        eta = torch.where(square > 0, (c * r).sum(1, keepdim=True) / square, 0)
        w = (w + eta * q).relu()
    return w


def test_gradient_pursuit_is_its_dense_formula() -> None:
    x, W = randn(N, D, seed=1).double(), unit(F, D, seed=3) * torch.linspace(0.5, 2, F)[:, None]
    values, indices = ksae.pursuit.gradient_pursuit(x, W, K)
    torch.testing.assert_close(dense(values, indices), by_gradient(x, W, K))
    b = randn(D, seed=2).double()
    shifted, _ = ksae.pursuit.gradient_pursuit(x + b, W, K, b)
    torch.testing.assert_close(shifted, values)


def test_what_fits_better_and_best() -> None:
    """Each kind of pursuit explains more than the encoder with as many latents, and the orthogonal
    one as much as non-negative least squares on its latents."""
    x, W = randn(N, D, seed=1).double(), unit(F, D, seed=3)
    errors = []
    encoded = ksae.topk_encode(x, W, torch.zeros(F, dtype=torch.float64), K)
    fine = ksae.pursuit.orthogonal_pursuit(x, W, K, iterations=2000)
    for code in (
        encoded, ksae.pursuit.gradient_pursuit(x, W, K), ksae.pursuit.orthogonal_pursuit(x, W, K),
    ):  # fmt: skip
        values, indices = code
        assert (values >= 0).all() and ((values > 0).sum(1) <= K).all()
        errors.append(float((x - ksae.sparse_decode(values, indices, W)).square().sum()))
    assert errors[0] > errors[1] > errors[2]
    values, indices = fine
    assert all(len(set(row)) == K for row in indices.tolist())
    r = x - ksae.sparse_decode(values, indices, W)
    slopes = (r[:, None] * W[indices]).sum(2)  # the conditions of Karush, Kuhn and Tucker
    assert slopes[values > 0].abs().max() < 1e-6 and (slopes[values == 0] < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    x, W = randn(N, D, seed=1).to(dtype), unit(F, D, seed=3).to(dtype)
    for find in (ksae.pursuit.gradient_pursuit, ksae.pursuit.orthogonal_pursuit):
        values, indices = find(x, W, K)
        left = x - ksae.sparse_decode(values, indices, W)
        assert values.dtype == dtype and left.norm() < 0.6 * x.norm()


def test_messages() -> None:
    x, W = randn(4, D), randn(F, D)
    find = ksae.pursuit.gradient_pursuit
    with pytest.raises(ValueError, match=r"gradient_pursuit: k must be in \[1, 50\], the number"):
        find(x, W, 51)
    with pytest.raises(ValueError, match=r"gradient_pursuit: x must be of shape \[N, d\] for"):
        find(x[:, 1:], W, 5)
    with pytest.raises(ValueError, match=r"gradient_pursuit: b_dec must be of shape \[11\], got"):
        find(x, W, 5, x[0, 1:])
    with pytest.raises(TypeError, match=r"x must be torch.float32 as W_dec, got torch.float64"):
        find(x.double(), W, 5)
    with pytest.raises(ValueError, match="orthogonal_pursuit: iterations must be at least 1"):
        ksae.pursuit.orthogonal_pursuit(x, W, 5, iterations=0)
    with pytest.raises(ValueError, match="matching_pursuit: tolerance must be finite"):
        ksae.pursuit.matching_pursuit(x, W, W, 5, tolerance=-1.0)
    with pytest.raises(ValueError, match=r"matching_pursuit: W_enc must be of shape \[50, 11\]"):
        ksae.pursuit.matching_pursuit(x, W[1:], W, 5)
    with pytest.raises(ValueError, match="SAE: tolerance must be a finite number >= 0, got nan"):
        ksae.SAE(3, 9, ksae.MatchingPursuit(2, tolerance=float("nan")))
    with pytest.raises(ValueError, match="Transcoder: activation must be one of a transcoder, got"):
        ksae.Transcoder(3, 4, 9, activation=ksae.MatchingPursuit(2))
    with pytest.raises(ValueError, match="SAE: multi_topk must be False with MatchingPursuit"):
        ksae.SAE(3, 9, ksae.MatchingPursuit(2), multi_topk=True)
    with pytest.raises(ValueError, match="fused must be False with MatchingPursuit"):
        ksae.TrainStep(build(torch.float32))
