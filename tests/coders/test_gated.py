# SPDX-License-Identifier: Apache-2.0
"""Coders with Gated: the dense model in float64, both steps, sparse and dense, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from training import assert_fused_is_unfused, assert_reads_back, assert_resumes

import ksae
from ksae.coders.coder import SparseCoder

N, D, OUT, F = 60, 17, 23, 97
CASES: dict[str, dict[str, Any]] = {
    "unit": {},
    "norms": {"normalize_decoder": False},
    "sum": {"normalize_decoder": False, "decoder_norm": False},
    "aux": {"dead_after": 100, "k_aux": 4, "auxk_alpha": 0.5},
    "mse": {"loss": "mse", "l1": 1e-3},
    "prefixes": {"prefixes": [20, F]},
    "transcoder": {"l1": 0.01},
    "skip": {"dead_after": 100, "k_aux": 4},
}
cases = pytest.mark.parametrize("case", CASES)


def build(case: str, dtype: torch.dtype = torch.float64, dense: bool = False) -> SparseCoder:
    torch.manual_seed(0)
    options = dict(CASES[case])
    own = {n: options.pop(n) for n in ("l1", "decoder_norm") if n in options}
    activation = ksae.Gated(**{"l1": 0.02} | own)
    if case in ("transcoder", "skip"):
        skip = case == "skip"
        model: SparseCoder = ksae.Transcoder(D, OUT, F, activation=activation, skip=skip, **options)
    else:
        model = ksae.SAE(D, F, activation, **options)
    with torch.no_grad():
        model.W_dec.copy_(randn(*model.W_dec.shape, seed=2))
        if model.normalize_decoder:
            model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
        model.b_enc.copy_(randn(F, seed=3) * 0.3 - 1.0)
        model.b_dec.copy_(randn(*model.b_dec.shape, seed=4) * 0.1)
        model.r_mag.copy_(randn(F, seed=6) * 0.3)
        model.b_mag.copy_(randn(F, seed=7) * 0.3 - 0.9)
        if model.W_skip is not None:
            model.W_skip.copy_(randn(OUT, D, seed=5) * 0.1)
        model.tokens_since_fired[::3] = 1000
        model.get_buffer("mean_active").fill_(torch.inf if dense else 0.0)
    return model.to(dtype)


def batch(case: str, seed: int = 10) -> list[Tensor]:
    x = randn(N, D, seed=seed)
    return [x, randn(N, OUT, seed=seed + 1)] if case in ("transcoder", "skip") else [x]


def dense_code(model: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """f and q [N, F] of the paper."""
    p = (x - (model.b_dec if model.centred else 0)) @ model.W_enc.T
    q = (p + model.b_enc).relu()
    return (q > 0) * (model.r_mag.exp() * p + model.b_mag).relu(), q


def by_formula(model: SparseCoder, x: Tensor, y: Tensor) -> Tensor:
    """The loss of dense pre-activations, all of it differentiable."""
    a: Any = model.activation
    f, q = dense_code(model, x)
    skipped = x @ model.W_skip.T if model.W_skip is not None else torch.zeros(())
    variance = (y - y.mean(0)).square().sum().detach()
    unit = variance if model.loss == "fvu" else y.numel()
    loss = torch.zeros((), dtype=x.dtype)
    widths = model.prefixes or (F,)
    for width in widths:
        recon = f[:, :width] @ model.W_dec[:width] + model.b_dec + skipped
        loss = loss + (recon - y).square().sum() / unit / len(widths)
    frozen = q @ model.W_dec.detach() + model.b_dec.detach() + skipped.detach()
    loss = loss + (frozen - y).square().sum() / unit
    dead = model.dead
    if dead.any():
        at = torch.where(dead, q, -torch.inf).topk(model.k_aux).indices
        aux = torch.zeros_like(q).scatter(1, at, q.gather(1, at)) @ model.W_dec
        e = (y - recon).detach()
        error = (aux - e).square().sum() / (e - e.mean(0)).square().sum()
        loss = loss + model.auxk_alpha * error
    return loss + a.l1 * (q * model.W_dec.norm(dim=1) if a.decoder_norm else q).sum() / N


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@cases
def test_gradients_are_those_of_the_dense_model(case: str, dense: bool) -> None:
    model, data = build(case, dense=dense), [t.double() for t in batch(case)]
    x = data[0].requires_grad_()
    want_loss = by_formula(model, x, data[-1])
    leaves = [x, *model.parameters()]
    want = torch.autograd.grad(want_loss, leaves)
    out = model(*data)
    torch.testing.assert_close(out.loss, want_loss, rtol=1e-10, atol=0)
    got = torch.autograd.grad(out.loss, leaves)
    for name, g, w in zip(["x", *dict(model.named_parameters())], got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11, msg=name)
    shut = (out.values == 0).sum()  # open gates without a magnitude
    assert 0 < shut < len(out.values)


@cases
@pytest.mark.parametrize("clip", [None, 0.01], ids=["", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_is_unfused(case: str, clip: float | None, dtype: torch.dtype) -> None:
    model = assert_fused_is_unfused(
        lambda fused: ksae.TrainStep(build(case, dtype), 1e-2, clip_norm=clip, fused=fused),
        [batch(case, seed) for seed in (10, 20, 30)],
        lambda model: model.mean_active.zero_(),  # else the dense step
    )
    if dtype == torch.float64:
        start = build(case)
        for name in ("r_mag", "b_mag", "b_enc"):
            moved = (model.get_parameter(name) - start.get_parameter(name)).abs() > 1e-3
            assert moved.sum() > F // 2, name


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_dense_step_is_a_sparse_one(fused: bool) -> None:
    ways = []
    for dense in (True, False):
        step = ksae.TrainStep(build("norms"), 1e-2, fused=fused)
        for seed in range(3):
            step.model.mean_active.fill_(torch.inf if dense else 0)
            step(*batch("norms", seed))
        ways.append(step.model.state_dict() | step.state_dict())
    for name, t in ways[0].items():
        torch.testing.assert_close(t, ways[1][name], rtol=1e-8, atol=1e-10, msg=name)


@cases
def test_in_use(case: str) -> None:
    model, x = build(case, torch.float32).eval(), batch(case)[0]
    f, _ = dense_code(model, x)
    torch.testing.assert_close(model.encode_dense(x), f)
    out = model(*batch(case))
    torch.testing.assert_close(out.code.dense(F), f)
    assert out.code.pre is None


@cases
def test_files(case: str, tmp_path: Path) -> None:
    model = build(case, torch.float32)
    ksae.TrainStep(model)(*batch(case))
    assert_reads_back(model, tmp_path)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_step_resumes(fused: bool) -> None:
    assert_resumes(
        lambda: ksae.TrainStep(build("aux", torch.float32), fused=fused),
        [batch("aux", seed) for seed in range(4)],
    )


def test_no_gate_is_open() -> None:
    for dense in (False, True):
        model = build("aux", torch.float32, dense)
        with torch.no_grad():
            model.b_enc.fill_(-100.0)
        metrics = ksae.TrainStep(model)(*batch("aux"))
        assert metrics["l0"] == 0 and metrics["loss"].isfinite()
        assert all(p.isfinite().all() for p in model.parameters())


def test_messages() -> None:
    for l1 in (-1.0, float("inf")):
        with pytest.raises(ValueError, match=f"SAE: l1 must be a finite number >= 0, got {l1}"):
            ksae.SAE(3, 9, ksae.Gated(l1=l1))
    with pytest.raises(ValueError, match="fused must be False with Gated and auxk='batch_topk'"):
        ksae.TrainStep(ksae.SAE(3, 9, ksae.Gated(), auxk="batch_topk"))
    ksae.TrainStep(ksae.SAE(3, 9, ksae.Gated(), auxk="batch_topk"), fused=False)
