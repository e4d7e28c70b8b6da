# SPDX-License-Identifier: Apache-2.0
"""Coders with ReLU: the dense model in float64, both steps, sparse and dense, annealing, files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from training import (
    assert_fused_is_unfused,
    assert_reads_back,
    assert_resumes,
    assert_same_bits_on_threads,
)

import ksae
from ksae.analysis.evaluate import evaluate
from ksae.coders.coder import SparseCoder

N, D, OUT, F = 60, 17, 23, 97
ANNEALED = {"p_end": 0.5, "p_steps": (0, 6), "updates": 3, "queue": 2}
CASES: dict[str, dict[str, Any]] = {
    "unit": {},
    "norms": {"normalize_decoder": False},
    "sum": {"normalize_decoder": False, "decoder_norm": False},
    "annealed": {"normalize_decoder": False, **ANNEALED},
    "powers": {**ANNEALED, "root": False},
    "aux": {"dead_after": 100, "k_aux": 4, "auxk_alpha": 0.5},
    "aux of all": {"dead_after": 100, "k_aux": 4, "auxk": "batch_topk"},
    "mse": {"loss": "mse", "l1": 1e-3},
    "prefixes": {"prefixes": [20, F]},
    "transcoder": {"l1": 0.01},
    "skip": {"dead_after": 100, "k_aux": 4},
}
OWN = ("l1", "decoder_norm", "root", *ANNEALED)
cases = pytest.mark.parametrize("case", CASES)


def build(case: str, dtype: torch.dtype = torch.float64, dense: bool = False) -> SparseCoder:
    torch.manual_seed(0)
    options = dict(CASES[case])
    activation = ksae.ReLU(**{"l1": 0.02} | {n: options.pop(n) for n in OWN if n in options})
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
        if model.W_skip is not None:
            model.W_skip.copy_(randn(OUT, D, seed=5) * 0.1)
        model.tokens_since_fired[::3] = 1000
        model.get_buffer("mean_active").fill_(torch.inf if dense else 0.0)
        if activation.p_end:
            model.get_buffer("anneal").copy_(torch.tensor([2.0, 2.0, 0.8], dtype=torch.float64))
    return model.to(dtype)


def batch(case: str, seed: int = 10) -> list[Tensor]:
    x = randn(N, D, seed=seed)
    return [x, randn(N, OUT, seed=seed + 1)] if case in ("transcoder", "skip") else [x]


def by_formula(model: SparseCoder, x: Tensor, y: Tensor) -> Tensor:
    """The loss of dense pre-activations, all of it differentiable."""
    a: Any = model.activation
    u = (x - (model.b_dec if model.centred else 0)) @ model.W_enc.T + model.b_enc
    f = u.relu()
    skipped = x @ model.W_skip.T if model.W_skip is not None else 0
    variance = (y - y.mean(0)).square().sum().detach()
    loss = torch.zeros((), dtype=x.dtype)
    widths = model.prefixes or (F,)
    for width in widths:
        recon = f[:, :width] @ model.W_dec[:width] + model.b_dec + skipped
        unit = variance if model.loss == "fvu" else y.numel()
        loss = loss + (recon - y).square().sum() / unit / len(widths)
    dead = model.dead
    if dead.any():
        at = torch.where(dead, u, -torch.inf).topk(model.k_aux).indices
        aux = torch.zeros_like(u).scatter(1, at, u.gather(1, at).relu()) @ model.W_dec
        if model.auxk == "batch_topk":
            error = (aux + model.b_dec - (y - recon)).square().sum() / y.numel()
        else:
            e = (y - recon).detach()
            error = (aux - e).square().sum() / (e - e.mean(0)).square().sum()
        loss = loss + model.auxk_alpha * error
    weighed = f * model.W_dec.norm(dim=1) if a.decoder_norm else f
    p, factor = (0.75, 0.8) if a.p_end else (1.0, 1.0)
    weighed = torch.where(weighed > 0, weighed, 1) ** p * (weighed > 0)
    sums = weighed.sum(1)
    return loss + a.l1 * factor * (sums ** (1 / p) if a.root else sums).mean()


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
    assert model.get_buffer("mean_active") == len(out.values) / N


@cases
@pytest.mark.parametrize("clip", [None, 0.01], ids=["", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_is_unfused(case: str, clip: float | None, dtype: torch.dtype) -> None:
    assert_fused_is_unfused(
        lambda fused: ksae.TrainStep(build(case, dtype), 1e-2, clip_norm=clip, fused=fused),
        [batch(case, seed) for seed in (10, 20, 30)],
        lambda model: model.mean_active.zero_(),  # 1 in 6 is active: more than one in 16
    )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_dense_while_many_are_active(fused: bool) -> None:
    """The choice is by the last batch's number; both ways train alike."""
    ways = []
    for name in ("dense", "sparse"):
        model = build("norms", dense=name == "dense")
        step = ksae.TrainStep(model, 1e-2, fused=fused)
        for seed in range(3):
            if name == "sparse":
                model.mean_active.zero_()
            assert model.activation.is_dense(model) == (name == "dense")
            step(*batch("norms", seed))
        assert F / 16 < model.mean_active < F / 2
        ways.append(model.state_dict() | step.state_dict())
    dense, sparse = ways
    for name, t in dense.items():
        torch.testing.assert_close(t, sparse[name], rtol=1e-8, atol=1e-10, msg=name)
    model.b_enc.data -= 2.0
    model.eval()(*batch("norms"))
    assert not model.mean_active < F / 16  # of training batches alone
    step(*batch("norms"))
    assert model.mean_active < F / 16 and not model.activation.is_dense(model)


def test_after_a_dense_step_a_sparse_one_goes_on() -> None:
    both, sparse = (ksae.TrainStep(build("aux", torch.float32), 1e-2) for _ in range(2))
    for seed in range(6):
        sparse.model.mean_active.zero_()
        both.model.mean_active.fill_(torch.inf if seed % 2 else 0)
        both(*batch("aux", seed))
        sparse(*batch("aux", seed))
    assert both.t == 6
    for name, t in sparse.model.state_dict().items():
        torch.testing.assert_close(both.model.state_dict()[name], t, rtol=1e-3, atol=2e-4)


def reference_anneal(losses: list[list[float]], updates: int, queue: int, first: int, last: int):
    """dictionary_learning's PAnneal: (p, factor) of each batch, from the norms of a batch by
    index of p."""
    values = torch.linspace(1.0, 0.5, updates, dtype=torch.float64).tolist()
    due = [first + int(i * (last - first) / (updates - 1)) for i in range(updates)]
    p, following, count, factor, kept, seen = 0, None, 0, 1.0, [], []
    for t, norms in enumerate(losses):
        seen.append((values[p], factor))
        if following is not None:
            kept = [*kept, (norms[p], norms[following])][-queue:]
        if t in due:
            if following is not None:
                now, then = (sum(pair[i] for pair in kept) / len(kept) for i in (0, 1))
                factor *= now / then
            p, following = count, min(count + 1, updates - 1)
            count += 1
    return seen


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("root", [True, False], ids=["root", "powers"])
def test_annealing_is_that_of_dictionary_learning(fused: bool, root: bool) -> None:
    """p and the factor of l1 of every batch, read off the loss of a model that does not move."""
    activation = ksae.ReLU(l1=0.02, p_end=0.5, p_steps=(2, 9), updates=4, queue=2, root=root)
    model = ksae.SAE(D, F, activation, auxk_alpha=0.0, dtype="float64")
    step = ksae.TrainStep(model, lr=0.0, fused=fused)
    model.mean_active.zero_()
    powers = torch.linspace(1.0, 0.5, 4, dtype=torch.float64).tolist()
    norms, penalties = [], []
    for seed in range(14):
        x = randn(N, D, seed=seed).double()
        f = ((x - model.b_dec) @ model.W_enc.T + model.b_enc).relu() * model.W_dec.norm(dim=1)
        sums = [torch.where(f > 0, f, 1) ** p * (f > 0) for p in powers]
        norms.append([
            float((s.sum(1) ** (1 / p if root else 1)).mean().detach())
            for s, p in zip(sums, powers, strict=True)
        ])  # fmt: skip
        metrics = step(x)
        penalties.append(float(metrics["loss"] - metrics["fvu"]))
    want = reference_anneal(norms, 4, 2, 2, 9)
    for (p, factor), of_batch, got in zip(want, norms, penalties, strict=True):
        assert got == pytest.approx(0.02 * factor * of_batch[powers.index(p)], rel=1e-9)
    assert {p for p, _ in want} == set(powers)


@cases
def test_in_use(case: str) -> None:
    model, x = build(case, torch.float32).eval(), batch(case)[0]
    u = (x - model.b_dec if model.centred else x) @ model.W_enc.T + model.b_enc
    torch.testing.assert_close(model.encode_dense(x), u.relu())
    out = model(*batch(case))
    assert float(out.loss.detach()) == pytest.approx(
        float(build(case, torch.float32).eval()(*batch(case)).loss.detach())
    )
    if case == "unit":
        assert evaluate(model, [x]).metrics["l0"] == pytest.approx(float((u > 0).sum() / N))


@cases
def test_files(case: str, tmp_path: Path) -> None:
    model = build(case, torch.float32)
    ksae.TrainStep(model)(*batch(case))
    assert_reads_back(model, tmp_path)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_step_resumes(fused: bool) -> None:
    assert_resumes(
        lambda: ksae.TrainStep(build("annealed", torch.float32), fused=fused),
        [batch("annealed", seed) for seed in range(6)],
    )


def test_a_step_has_the_same_bits_for_any_number_of_threads() -> None:
    assert_same_bits_on_threads(
        lambda: ksae.TrainStep(build("annealed", torch.float32), 1e-2), batch("annealed")
    )


def test_no_entry_at_all() -> None:
    for dense, fused in itertools.product((False, True), (False, True)):
        model = build("annealed", torch.float32, dense)
        with torch.no_grad():
            model.b_enc.fill_(-100.0)
        metrics = ksae.TrainStep(model, fused=fused)(*batch("annealed"))
        assert metrics["l0"] == 0 and metrics["loss"].isfinite()
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1": -1.0}, "l1 must be a finite number >= 0, got -1.0"),
        ({"l1": float("nan")}, "l1 must be a finite number >= 0, got nan"),
        ({"p_end": 0.0}, r"p_end must be in \(0, 1\) or None, got 0.0"),
        ({"p_end": 0.5, "p_steps": (5, 5)}, r"p_steps must be two .*, got \[5, 5\]"),
        ({"p_end": 0.5, "updates": 1}, "updates must be at least 2, got 1"),
        ({"p_end": 0.5, "queue": 0}, "queue must be at least 1, got 0"),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SAE: {message}"):
        ksae.SAE(3, 9, ksae.ReLU(**options))
