# SPDX-License-Identifier: Apache-2.0
"""Matryoshka prefixes of a coder: the loss and its gradients, options, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor

import ksae
from ksae.analysis.evaluate import evaluate

N, d, F, k = 31, 9, 40, 6
PREFIXES = [0, 5, 20, F]


def sae(**options: Any) -> ksae.SAE:
    torch.manual_seed(0)
    model = ksae.SAE(
        d, F, ksae.TopK(k), **{"prefixes": PREFIXES, "dtype": torch.float64, **options}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def dense_code(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    u = (x - b_dec) @ W_enc.T + b_enc
    chosen = torch.zeros_like(u).scatter(1, u.topk(k, dim=1).indices, 1.0)
    return u.relu() * chosen


@pytest.mark.parametrize("loss", ["fvu", "mse"])
@pytest.mark.parametrize("weights", ["mean", "sum", "dictionary_learning", [0.1, 2.0, 1.0, 0.5]])
def test_loss_and_gradients_are_those_of_dense_prefixes(loss: str, weights: Any) -> None:
    model = sae(loss=loss, prefix_weights=weights, auxk_alpha=0.0)
    x = randn(N, d, seed=7).double().requires_grad_()
    y = randn(N, d, seed=8).double()
    P = len(PREFIXES)
    counts = {"mean": [1 / P] * P, "sum": [1.0] * P, "dictionary_learning": [1 / P**2] * P}
    shares = counts[weights] if isinstance(weights, str) else weights
    W_enc, b_enc, W_dec, b_dec = model.W_enc, model.b_enc, model.W_dec, model.b_dec
    f = dense_code(x, W_enc, b_enc, b_dec)
    below = (y - y.mean(0)).square().sum() if loss == "fvu" else y.numel()
    terms = [
        (f[:, :width] @ W_dec[:width] + b_dec - y).square().sum() / below for width in PREFIXES
    ]
    want = sum(s * t for s, t in zip(shares, terms, strict=True))
    assert isinstance(want, Tensor)
    inputs = [x, *model.parameters()]
    expected = torch.autograd.grad(want, inputs)
    out = model(x, y)
    assert out.loss is not None and out.prefix_fvu is not None
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)
    variance = (y - y.mean(0)).square().sum()
    torch.testing.assert_close(out.prefix_fvu, torch.stack(terms) * below / variance)
    torch.testing.assert_close(out.fvu, out.prefix_fvu[-1], rtol=0, atol=0)
    for got, exact in zip(torch.autograd.grad(out.loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-13)


def test_the_target_of_an_autoencoder_is_its_input() -> None:
    """Both ways by which x reaches the loss, with a dead latent's AuxK beside it."""
    model = sae(k_aux=3, prefix_weights="sum")
    model.tokens_since_fired[::4] = model.dead_after + 1
    silent = model.dead
    x = randn(N, d, seed=7).double().requires_grad_()
    got = model(x).loss
    assert got is not None
    (grad,) = torch.autograd.grad(got, x)
    f = dense_code(x, model.W_enc, model.b_enc, model.b_dec)
    below = (x - x.mean(0)).square().sum().detach()
    recons = [f[:, :m] @ model.W_dec[:m] + model.b_dec for m in PREFIXES]
    want = sum((r - x).square().sum() / below for r in recons)
    u = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    top = u.masked_fill(~silent, -torch.inf).topk(3, dim=1)
    e = (x - recons[-1]).detach()
    dead = torch.zeros_like(u).scatter(1, top.indices, top.values.relu()) @ model.W_dec
    want = want + (dead - e).square().sum() / (e - e.mean(0)).square().sum() / 32
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, x)[0])


def test_all_latents_alone_are_the_plain_coder() -> None:
    x = randn(N, d).double()
    plain, nested = sae(prefixes=None)(x), sae(prefixes=[F])(x)
    assert torch.equal(plain.loss, nested.loss) and torch.equal(plain.fvu, nested.fvu)
    assert plain.prefix_fvu is None and nested.prefix_fvu is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefixes": [5, 20]}, ValueError, "prefixes must rise from 0 or more to d_sae = 40"),
        ({"prefixes": [20, 5, F]}, ValueError, "got [20, 5, 40]"),
        ({"prefixes": [5, 5, F]}, ValueError, "prefixes must rise"),
        ({"prefixes": [-1, F]}, ValueError, "prefixes must rise"),
        ({"prefixes": [5.5, F]}, TypeError, "prefixes must be an integer, got 5.5"),
        ({"prefixes": 40}, TypeError, "prefixes must be a list of integers, got 40"),
        ({"prefix_weights": "saelens"}, ValueError, "prefix_weights must be one of mean, sum,"),
        ({"prefix_weights": [1.0]}, ValueError, "prefix_weights must be 4 finite numbers above 0"),
        ({"prefix_weights": [1, 2, 0, 1]}, ValueError, "got [1.0, 2.0, 0.0, 1.0]"),
        ({"prefixes": None, "prefix_weights": [1.0]}, ValueError, "must be 0 finite numbers"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        sae(**options)
    assert message in str(caught.value) and str(caught.value).startswith("SAE: ")


@pytest.mark.parametrize("weights", ["sum", [1, 2, 3, 4]])
def test_a_file_keeps_the_prefixes(tmp_path: Path, weights: Any) -> None:
    model = sae(prefix_weights=weights)
    model.save(tmp_path / "m.safetensors")
    again = ksae.load(tmp_path / "m.safetensors")
    assert again.prefixes == tuple(PREFIXES) and again.config() == model.config()
    x = randn(N, d).double()
    assert torch.equal(again(x).loss, model(x).loss)
    assert "prefixes" not in sae(prefixes=None).config()


def test_evaluation_has_the_fvu_of_each_prefix() -> None:
    model, x = sae(), randn(200, d, seed=3).double() + 1
    f = dense_code(x, model.W_enc, model.b_enc, model.b_dec).detach()
    result = evaluate(model, [x[:70], x[70:]])
    variance = (x - x.mean(0)).square().sum()
    for width in PREFIXES[:-1]:
        e = f[:, :width] @ model.W_dec[:width] + model.b_dec - x
        want = float((e.square().sum() / variance).detach())
        assert result.metrics[f"fvu_{width}"] == pytest.approx(want, rel=1e-9)
    assert f"fvu_{F}" not in result.metrics
