# SPDX-License-Identifier: Apache-2.0
"""Coders with BatchTopK: the dense model in float64, both steps, thresholds, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from torch.nn import functional as nnf
from training import assert_fused_is_unfused, assert_same_bits_on_threads

import ksae
from ksae.analysis.evaluate import evaluate
from ksae.coders.code import Code
from ksae.coders.coder import SparseCoder

N, D, OUT, F, K = 60, 17, 23, 97, 5
CASES: dict[str, dict[str, Any]] = {
    "sae": {},
    "aux": {"dead_after": 100, "k_aux": 4, "auxk_alpha": 0.5},
    "mse": {"loss": "mse", "normalize_decoder": False},
    "prefixes": {"prefixes": [20, 50, F], "prefix_weights": [0.5, 0.3, 1.0]},
    "prefixes, aux": {"prefixes": [20, F], "dead_after": 100, "k_aux": 4},
    "transcoder": {},
    "skip": {"dead_after": 100, "k_aux": 4},
}
cases = pytest.mark.parametrize("case", CASES)


def ragged(values: Tensor) -> Code:
    """A code of these values in one row."""
    E = len(values)
    return Code(values, torch.arange(E), torch.tensor([0, E]))


def build(case: str, dtype: torch.dtype = torch.float64, **settings: Any) -> SparseCoder:
    torch.manual_seed(0)
    options = {**CASES[case], **settings}
    activation = options.pop("activation", ksae.BatchTopK(K))
    if case in ("transcoder", "skip"):
        model: SparseCoder = ksae.Transcoder(
            D, OUT, F, activation=activation, skip=case == "skip", **options
        )
    else:
        model = ksae.SAE(D, F, activation, **options)
    with torch.no_grad():
        model.W_dec.copy_(randn(*model.W_dec.shape, seed=2))
        model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
        model.b_enc.copy_(randn(F, seed=3) * 0.3 - 0.2)
        model.b_dec.copy_(randn(*model.b_dec.shape, seed=4) * 0.1)
        if model.W_skip is not None:
            model.W_skip.copy_(randn(OUT, D, seed=5) * 0.1)
        model.tokens_since_fired[::3] = 1000
    return model.to(dtype)


def batch(case: str, seed: int = 10) -> list[Tensor]:
    x = randn(N, D, seed=seed) * torch.linspace(0.1, 3, N)[:, None]
    return [x] if case not in ("transcoder", "skip") else [x, randn(N, OUT, seed=seed + 1)]


def dense_loss(model: SparseCoder, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a model of float64, from its whole pre-activations."""
    centre = model.b_dec if model.centred else 0
    u = (x - centre) @ model.W_enc.T + model.b_enc
    keep = torch.zeros(u.numel(), dtype=torch.bool)
    keep[u.detach().flatten().topk(N * K).indices] = True
    z = torch.where(keep.view_as(u), u, 0).relu()
    skipped = x @ model.W_skip.T if model.W_skip is not None else 0
    variance = (y - y.mean(0)).square().sum().detach()
    norm = variance if model.loss == "fvu" else y.numel()
    widths = model.prefixes or (F,)
    weights = model.prefix_weights if model.prefixes else [1.0]
    if weights == "mean":
        weights = [1 / len(widths)] * len(widths)
    loss = torch.zeros((), dtype=x.dtype)
    for width, weight in zip(widths, weights, strict=True):
        recon = z[:, :width] @ model.W_dec[:width] + model.b_dec + skipped
        loss = loss + float(weight) * (recon - y).square().sum() / norm
    if (dead := model.dead).any() and model.auxk_alpha:
        e = (y - recon).detach()
        of_dead = torch.where(dead, u, -torch.inf)
        at = of_dead.topk(min(model.k_aux, int(dead.sum()))).indices
        aux = torch.zeros_like(u).scatter(1, at, u.gather(1, at).relu()) @ model.W_dec
        loss = loss + model.auxk_alpha * (aux - e).square().sum() / (e - e.mean(0)).square().sum()
    return loss


@cases
def test_gradients_are_those_of_the_dense_model(case: str) -> None:
    model, data = build(case), [t.double() for t in batch(case)]
    model.train()
    x = data[0].requires_grad_()
    inputs = [x, *model.parameters()]
    want = torch.autograd.grad(dense_loss(model, x, data[-1]), inputs)
    loss = model(*data).loss
    assert loss is not None
    for got, w in zip(torch.autograd.grad(loss, inputs), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-8, atol=1e-11)


@cases
@pytest.mark.parametrize("clip", [None, 0.01], ids=["", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_is_unfused(case: str, clip: float | None, dtype: torch.dtype) -> None:
    model = assert_fused_is_unfused(
        lambda fused: ksae.TrainStep(build(case, dtype), 1e-2, clip_norm=clip, fused=fused),
        [batch(case, seed) for seed in (10, 20)],
    )
    assert (model.tokens_since_fired == 0).any()


@pytest.mark.parametrize("case", ["sae", "aux", "prefixes"])
def test_a_step_has_the_same_bits_for_any_number_of_threads(case: str) -> None:
    assert_same_bits_on_threads(
        lambda: ksae.TrainStep(build(case, torch.float32), 1e-2), batch(case)
    )


def test_a_row_may_take_everything() -> None:
    model = build("sae", torch.float32)
    x = batch("sae")[0]
    x[7] *= 1e4
    out = model(x)
    assert out.row_offsets.diff()[7] == out.row_offsets.diff().max() > 6 * K
    assert len(out.values) == N * K == out.row_offsets[-1]
    dense = out.code.dense(F)
    values, indices = out.code.padded()
    assert torch.equal(torch.zeros(N, F).scatter_add(1, indices, values), dense)
    step = ksae.TrainStep(model)
    assert step(x)["loss"].isfinite()


# --------------------------------------------------------------------------------------- thresholds


def smallest(model: SparseCoder, x: Tensor) -> float:
    values = model.select(x, K, None)[0].detach()
    return float(values[values > 0].min()) if (values > 0).any() else math.inf


def running(stream: list[float]) -> float:
    """As each library writes it, in its own numbers."""
    theta = -1.0
    for n, m in enumerate(stream, 1):
        theta = m if theta < 0 else theta + (m - theta) / min(n, 100)
    return theta


def saelens(stream: list[float]) -> float:
    theta = torch.tensor(0.0, dtype=torch.float64)
    for m in stream:
        theta = (1 - 0.01) * theta + 0.01 * torch.tensor(m, dtype=torch.float64)
    return float(theta)


def dictionary_learning(stream: list[float]) -> float:
    theta = torch.tensor(-1.0)
    for step, m in enumerate(stream):
        if step > 1000:
            least = torch.tensor(m)
            theta = least if theta < 0 else (0.999 * theta) + ((1 - 0.999) * least)
    return float(theta)


@pytest.mark.parametrize("rule", [running, saelens, dictionary_learning])
def test_thresholds_follow_their_estimators(rule: Any) -> None:
    activation = ksae.BatchTopK(K, rule.__name__)
    model = build("sae", torch.float32, activation=activation)
    stream = [float(m) for m in randn(1105, seed=7).abs() + 0.1]
    for m in stream:
        activation.observe(model, ragged(torch.tensor([0.0, m, m + 1, 0.0])))
    assert float(model.threshold) == pytest.approx(rule(stream), rel=1e-12)
    assert model.threshold_batches == len(stream)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_step_observes_its_batch_once(fused: bool) -> None:
    model = build("aux", torch.float32)
    step = ksae.TrainStep(model, 1e-3, fused=fused)
    stream = []
    for seed in range(3):
        x = batch("sae", seed)[0]
        stream.append(smallest(model, x))
        step(x)
    assert float(model.threshold) == pytest.approx(running(stream), rel=1e-5)
    with pytest.warns(UserWarning, match="not taken"):
        step(torch.full((4, D), torch.nan))
    assert model.threshold_batches == 3 and model.threshold > 0


def test_a_batch_without_positive_values_leaves_the_threshold() -> None:
    for rule, want in (("running", -1.0), ("saelens", 0.0)):
        model = build("sae", torch.float32, activation=ksae.BatchTopK(K, rule))
        model.activation.observe(model, ragged(torch.zeros(5)))
        assert float(model.threshold) == want
        model.activation.observe(model, ragged(torch.zeros(0)))
        assert float(model.threshold) == want


def test_in_use_a_row_stands_alone() -> None:
    model = build("sae", torch.float32).eval()
    x = batch("sae")[0]
    assert len(model(x).values) == N * K  # no threshold yet
    model.threshold.fill_(0.7)
    offsets = model.encode(x)[2]
    u = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    dense = torch.where(u > 0.7, u, 0)
    torch.testing.assert_close(model.encode_dense(x), dense)
    assert offsets.tolist() == [0, *(u > 0.7).sum(1).cumsum(0).tolist()]
    out = model(x)
    torch.testing.assert_close(out.recon, nnf.linear(dense, model.W_dec.T, model.b_dec))
    for part in (slice(0, 1), slice(3, 20)):
        torch.testing.assert_close(model(x[part]).recon, out.recon[part])
    assert model.encode_dense(x.reshape(3, 20, D)).shape == (3, 20, F)
    assert model.train()(x).row_offsets[-1] == N * K


def test_evaluation_counts_entries() -> None:
    model = build("sae", torch.float32)
    model.threshold.fill_(0.7)
    x = batch("sae")[0]
    result = evaluate(model, [x[:31], x[31:]])
    want = (model.eval().encode_dense(x) > 0).float()
    assert result.metrics["l0"] == pytest.approx(float(want.sum(1).mean()))
    torch.testing.assert_close(result.frequency.float(), want.mean(0))


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("case", ["sae", "prefixes", "skip"])
def test_files(case: str, tmp_path: Path) -> None:
    model = build(case, torch.float32, activation=ksae.BatchTopK(K, "saelens"))
    ksae.TrainStep(model, 1e-3)(*batch(case))
    model.save(tmp_path / "model.safetensors")
    back = ksae.load(tmp_path / "model.safetensors")
    assert type(back) is type(model) and back.config() == model.config()
    assert back.activation == ksae.BatchTopK(K, "saelens")
    for name, t in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], t)
    x = batch(case)[0]
    torch.testing.assert_close(back.eval()(x).recon, model.eval()(x).recon)


def test_names_in_files_stay() -> None:
    for model in (ksae.TopKSAE(3, 9, 2), ksae.SAE(3, 9, ksae.TopK(2))):
        assert model.config()["class"] == "TopKSAE" and model.config()["k"] == 2
        assert "activation" not in model.config()


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"SAE: k must be in \[1, 9\]"):
        ksae.SAE(3, 9, ksae.BatchTopK(10))
    with pytest.raises(ValueError, match="SAE: threshold must be one of running, saelens"):
        ksae.SAE(3, 9, ksae.BatchTopK(2, "mean"))
    with pytest.raises(ValueError, match="SAE: multi_topk must be False with BatchTopK"):
        ksae.SAE(3, 9, ksae.BatchTopK(2), multi_topk=True)
    with pytest.raises(ValueError, match="activation: name must be one of TopK"):
        ksae.SAE(3, 9, {"name": "Softmax"})
