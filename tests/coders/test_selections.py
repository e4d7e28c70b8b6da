# SPDX-License-Identifier: Apache-2.0
"""Coders with AbsTopK, GroupMax and NormTopK: the dense model in float64, both steps, files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from training import assert_fused_is_unfused, assert_reads_back

import ksae
from ksae.analysis.evaluate import evaluate
from ksae.coders.coder import SparseCoder

N, D, OUT, F, K = 60, 17, 23, 96, 6
KINDS = {"abs": ksae.AbsTopK, "group": ksae.GroupMax, "norm": ksae.NormTopK}
CASES: dict[str, dict[str, Any]] = {
    "sae": {"normalize_decoder": False},
    "aux": {"dead_after": 100, "k_aux": 4, "auxk_alpha": 0.5},
    "aux of all": {"dead_after": 100, "k_aux": 4, "auxk": "batch_topk"},
    "prefixes": {"prefixes": [20, 50, F], "normalize_decoder": False},
    "other k": {"multi_k": [3, 11]},
    "skip": {"dead_after": 100, "k_aux": 4},
}
BOTH = [p for p in itertools.product(KINDS, CASES) if p != ("group", "other k")]
both = pytest.mark.parametrize(("kind", "case"), BOTH)
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, case: str = "sae", dtype: torch.dtype = torch.float64) -> SparseCoder:
    torch.manual_seed(0)
    activation, options = KINDS[kind](K), CASES[case]
    if case == "skip":
        model: SparseCoder = ksae.Transcoder(D, OUT, F, activation=activation, skip=True, **options)
    else:
        model = ksae.SAE(D, F, activation, **options)
    with torch.no_grad():
        model.W_dec.copy_(randn(*model.W_dec.shape, seed=2))
        if model.normalize_decoder:
            model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
        else:
            model.W_dec *= torch.linspace(0.1, 2, F)[:, None]
            model.W_dec[::9] = 0
        model.b_enc.copy_(randn(F, seed=3) * 0.3)
        model.b_dec.copy_(randn(*model.b_dec.shape, seed=4) * 0.1)
        if model.W_skip is not None:
            model.W_skip.copy_(randn(OUT, D, seed=5) * 0.1)
        model.tokens_since_fired[::3] = 1000
    return model.to(dtype)


def batch(case: str, seed: int = 10) -> list[Tensor]:
    x = randn(N, D, seed=seed)
    return [x, randn(N, OUT, seed=seed + 1)] if case == "skip" else [x]


def pre_activations(model: SparseCoder, x: Tensor) -> Tensor:
    return (x - (model.b_dec if model.centred else 0)) @ model.W_enc.T + model.b_enc


def dense_code(kind: str, model: SparseCoder, u: Tensor, k: int) -> Tensor:
    """What the activation makes of pre-activations u [N, F]."""
    if kind == "group":
        chosen = torch.zeros_like(u).reshape(len(u), k, -1)
        groups = u.reshape(chosen.shape)
        at = (groups == groups.amax(2, keepdim=True)).int().argmax(2, keepdim=True)  # the first
        return chosen.scatter(2, at, groups.gather(2, at).relu()).reshape(u.shape)
    norms = model.W_dec.norm(dim=1)
    score = u.abs() if kind == "abs" else u * torch.where(norms > 0, norms, 1)
    at = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    values = u if kind == "abs" else u.relu()
    return torch.zeros_like(u).scatter(1, at, values.gather(1, at))


def by_formula(kind: str, model: SparseCoder, x: Tensor, y: Tensor) -> Tensor:
    """The loss of the dense code."""
    u = pre_activations(model, x)
    skipped = x @ model.W_skip.T if model.W_skip is not None else 0
    variance = (y - y.mean(0)).square().sum().detach()
    widths, dead = model.prefixes or (F,), model.dead
    f, loss = dense_code(kind, model, u, K), torch.zeros((), dtype=x.dtype)
    for width in widths:
        recon = f[:, :width] @ model.W_dec[:width] + model.b_dec + skipped
        loss = loss + (recon - y).square().sum() / variance / len(widths)
    for k, weight in model.multi_k:
        other = dense_code(kind, model, u, k) @ model.W_dec + model.b_dec
        loss = loss + weight * (other - y).square().sum() / variance
    if dead.any():
        at = torch.where(dead, u, -torch.inf).topk(model.k_aux).indices
        aux = torch.zeros_like(u).scatter(1, at, u.gather(1, at).relu()) @ model.W_dec
        e = y - recon if model.auxk == "batch_topk" else (y - recon).detach()
        if model.auxk == "batch_topk":
            error = (aux + model.b_dec - e).square().sum() / y.numel()
        else:
            error = (aux - e).square().sum() / (e - e.mean(0)).square().sum()
        loss = loss + model.auxk_alpha * error
    return loss


@both
def test_gradients_are_those_of_the_dense_model(kind: str, case: str) -> None:
    model, data = build(kind, case), [t.double() for t in batch(case)]
    x = data[0].requires_grad_()
    want_loss = by_formula(kind, model, x, data[-1])
    leaves = [x, *model.parameters()]
    want = torch.autograd.grad(want_loss, leaves)
    out = model(*data)
    torch.testing.assert_close(out.loss, want_loss, rtol=1e-10, atol=0)
    got = torch.autograd.grad(out.loss, leaves)
    for name, g, w in zip(["x", *dict(model.named_parameters())], got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11, msg=name)
    if kind == "abs":
        assert (out.values < 0).any() and (out.values > 0).any()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_is_unfused(kind: str, case: str, dtype: torch.dtype) -> None:
    assert_fused_is_unfused(
        lambda fused: ksae.TrainStep(build(kind, case, dtype), 1e-2, clip_norm=0.1, fused=fused),
        [batch(case, seed) for seed in (10, 20)],
    )


@both
def test_in_use(kind: str, case: str) -> None:
    model, x = build(kind, case, torch.float32).eval(), batch(case)[0]
    want = dense_code(kind, model, pre_activations(model, x), K)
    torch.testing.assert_close(model.encode_dense(x), want)
    if case == "sae":
        metrics = evaluate(model, [x]).metrics
        assert metrics["l0"] == pytest.approx(float((want != 0).sum() / N))


@kinds
def test_ties_and_zeros(kind: str) -> None:
    """Equal scores: the smaller index, of both signs; where nothing is left, zeros."""
    model = ksae.SAE(2, 6, KINDS[kind](3))
    with torch.no_grad():
        W = torch.tensor([[1, 0], [-1, 0], [1, 0], [-1, 0], [1, 0], [0, 0]])
        model.W_enc.copy_(W)
        model.W_dec.fill_(1.0)
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    dense = model.eval().encode_dense(x)
    want = {
        "abs": [[2, -2, 2, 0, 0, 0], [-2, 2, -2, 0, 0, 0], [0] * 6],
        "norm": [[2, 0, 2, 0, 2, 0], [0, 2, 0, 2, 0, 0], [0] * 6],
        "group": [[2, 0, 2, 0, 2, 0], [0, 2, 0, 2, 0, 0], [0] * 6],
    }[kind]
    assert dense.tolist() == want
    assert model.encode(x[:0])[0].shape == (0, 3)


def test_a_row_without_numbers_takes_no_step() -> None:
    for kind in KINDS:
        step = ksae.TrainStep(build(kind, dtype=torch.float32))
        before = {n: t.clone() for n, t in step.model.state_dict().items()}
        x = batch("sae")[0]
        x[3, 4] = torch.nan
        with pytest.warns(UserWarning, match="a step was not taken"):
            step(x)
        assert all(torch.equal(before[n], t) for n, t in step.model.state_dict().items())


def test_with_unit_rows_norms_choose_what_topk_chooses() -> None:
    model, x = build("norm", "aux", torch.float32), batch("aux")[0]
    model.activation = ksae.TopK(K)
    plain = model.encode_dense(x)
    model.activation = ksae.NormTopK(K)
    torch.testing.assert_close(model.encode_dense(x), plain)


@both
def test_files(kind: str, case: str, tmp_path: Path) -> None:
    model = build(kind, case, torch.float32)
    assert_reads_back(model, tmp_path)


def test_messages() -> None:
    for kind in KINDS.values():
        with pytest.raises(ValueError, match=r"SAE: k must be in \[1, 9\], the number of latents"):
            ksae.SAE(3, 9, kind(10))
    with pytest.raises(ValueError, match="SAE: k must divide 9, the number of latents, got 2"):
        ksae.SAE(3, 9, ksae.GroupMax(2))
    with pytest.raises(ValueError, match="SAE: multi_topk must be False with GroupMax, got True"):
        ksae.SAE(3, 9, ksae.GroupMax(3), multi_topk=True)
