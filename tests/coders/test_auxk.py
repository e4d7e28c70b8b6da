# SPDX-License-Identifier: Apache-2.0
"""AuxK in the libraries' variants and losses at other k: each against its formula, dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor

import ksae
from ksae.coders.auxk import AUXK
from ksae.coders.predictions import unrectified

N, d, F, k, K_AUX = 31, 8, 40, 5, 6
ALPHA = 0.7


def sae(every: int = 4, **options: Any) -> tuple[ksae.SAE, Tensor]:
    """A coder, and which of its latents are dead."""
    torch.manual_seed(0)
    given = {"dtype": torch.float64, "k_aux": K_AUX, "auxk_alpha": ALPHA, **options}
    model = ksae.SAE(d, F, ksae.TopK(k), **given)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        model.b_enc.sub_(0.3)  # some of the largest dead pre-activations are negative
    model.tokens_since_fired[::every] = model.dead_after + 1
    return model, model.dead


def top(u: Tensor, count: int) -> Tensor:
    chosen = u.topk(count, dim=1)
    return torch.zeros_like(u).scatter(1, chosen.indices, chosen.values)


def auxk(name: str, model: ksae.SAE, x: Tensor, y: Tensor, dead: Tensor) -> Tensor:
    """As the library has it, on the dense matrix."""
    W_dec, b_dec = model.W_dec, model.b_dec
    u = (x - b_dec) @ model.W_enc.T + model.b_enc
    e = y - (top(u, k).relu() @ W_dec + b_dec)
    n_dead = int(dead.sum())
    count = min(K_AUX, n_dead)
    chosen = top(u[:, dead], count)
    ehat = chosen.relu() @ W_dec[dead]
    of_e = (e - e.mean(0)).square().sum().detach()
    match name:
        case "dictionary_learning":
            return (ehat - e.detach()).square().sum() / of_e
        case "openai":
            target = e.detach() + b_dec.detach()
            return (ehat + b_dec - target).square().sum() / of_e
        case "sparsify":
            scale = min(n_dead / (d // 2), 1.0)
            of_y = (y - y.mean(0)).square().sum().detach()
            return scale * (ehat + b_dec - e.detach()).square().sum() / of_y
        case "saelens":
            scale = min(n_dead / (d // 2), 1.0)
            ehat = chosen @ W_dec[dead]
            return scale * (ehat - e.detach()).square().sum(1).mean() / d
        case "batch_topk":
            return (ehat + b_dec - e).square().mean()
    raise AssertionError(name)


@pytest.mark.parametrize("every", [4, 15], ids=["many dead", "fewer dead than k_aux"])
@pytest.mark.parametrize("name", AUXK)
def test_loss_and_gradients_are_those_of_the_library(name: str, every: int) -> None:
    model, dead = sae(every, auxk=name)
    assert (every == 4) != (int(dead.sum()) < K_AUX)
    x = randn(N, d, seed=7).double().requires_grad_()
    inputs = [x, *model.parameters()]
    want = auxk(name, model, x, x, dead)
    u = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    error = x - (top(u, k).relu() @ model.W_dec + model.b_dec)
    fvu = error.square().sum() / (x - x.mean(0)).square().sum().detach()
    expected = torch.autograd.grad(fvu + ALPHA * want, inputs)
    out = model(x)
    assert out.loss is not None and out.auxk_loss is not None
    torch.testing.assert_close(out.auxk_loss, want, rtol=1e-12, atol=0)
    for got, exact in zip(torch.autograd.grad(out.loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-14)


def test_saelens_takes_negative_values_of_dead_latents_alone() -> None:
    model, dead = sae(2, auxk="saelens")
    with torch.no_grad():
        model.b_enc.fill_(-20.0)
    x = randn(N, d).double()
    values, indices = ksae.topk_encode(x, model.W_enc, model.b_enc, K_AUX, model.b_dec, dead)
    got = unrectified(model, x, values, indices, dead)
    u = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    assert (values == 0).all() and (got < 0).all()
    torch.testing.assert_close(got, u.gather(1, indices))
    none = torch.zeros_like(dead)
    assert (unrectified(model, x, values, indices, none) == 0).all()


def test_values_of_matching_pursuit_are_products_with_the_decoder() -> None:
    torch.manual_seed(0)
    model = ksae.SAE(d, F, ksae.MatchingPursuit(k), auxk="saelens", k_aux=K_AUX, auxk_alpha=ALPHA)
    with torch.no_grad():
        model.W_enc.add_(randn(F, d, seed=1))
        model.b_enc.fill_(3.0)
        model.b_dec.copy_(randn(d, seed=2))
    model.tokens_since_fired[::8] = model.dead_after + 1  # five, all of which AuxK takes
    dead, x = model.dead, randn(N, d, seed=3)
    u = (x - model.b_dec) @ model.W_dec.T
    values, indices = model.encode_dead(x, int(dead.sum()))
    got = unrectified(model, x, values, indices, dead)
    assert (got < 0).any() and (got > 0).any()
    torch.testing.assert_close(got, u.gather(1, indices))
    loss = model(x).loss
    assert loss is not None
    loss.backward()
    assert model.W_dec.grad is not None
    assert model.W_enc.grad is None and model.b_enc.grad is None  # which are not used


@pytest.mark.parametrize("prefixes", [None, [10, F]], ids=["plain", "prefixes"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clip"])
@pytest.mark.parametrize("name", AUXK)
def test_the_fused_step_has_the_same_gradients(
    name: str, clip: float | None, prefixes: list[int] | None
) -> None:
    states = []
    for fused in (True, False):
        model, _ = sae(auxk=name, prefixes=prefixes)
        step = ksae.TrainStep(model, 1e-2, clip_norm=clip, fused=fused)
        metrics = [step(randn(N, d, seed=s).double()) for s in range(3)]
        states.append((step.state_dict(), metrics))
    (fused_state, fused_metrics), (state, metrics) = states
    for got, want in zip(fused_metrics, metrics, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    for entry, value in state.items():
        torch.testing.assert_close(fused_state[entry], value, rtol=1e-9, atol=1e-13, msg=entry)


@pytest.mark.parametrize("name", AUXK)
def test_float32_kernels_train_as_autograd_does(name: str) -> None:
    """The native kernels, negative values and codes of two selections among them."""
    losses = {}
    for fused in (True, False):
        model, _ = sae(2, auxk=name, dtype=torch.float32, multi_k=[9, 2], dead_after=3 * N)
        step = ksae.TrainStep(model, 5e-3, clip_norm=1.0, fused=fused)
        losses[fused] = [float(step(randn(N, d, seed=s))["loss"]) for s in range(20)]
    assert losses[True][-1] < losses[True][0]
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-4, atol=0)


def test_losses_at_other_k() -> None:
    model, _ = sae(multi_k=[9, 2], multi_weights=[0.5, 2.0], auxk_alpha=0.0)
    x = randn(N, d, seed=7).double().requires_grad_()
    u = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    variance = (x - x.mean(0)).square().sum().detach()

    def fvu(count: int) -> Tensor:
        recon = top(u, count).relu() @ model.W_dec + model.b_dec
        return (x - recon).square().sum() / variance

    want = fvu(k) + 0.5 * fvu(9) + 2.0 * fvu(2)
    inputs = [x, *model.parameters()]
    expected = torch.autograd.grad(want, inputs, retain_graph=True)
    out = model(x)
    assert out.loss is not None
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.fvu, fvu(k))
    torch.testing.assert_close(out.multi_topk_loss, (0.5 * fvu(9) + 2.0 * fvu(2)) / 2.5)
    for got, exact in zip(torch.autograd.grad(out.loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-14)
    one, _ = sae(multi_k=[4 * k], auxk_alpha=0.0)
    short, _ = sae(multi_topk=True, auxk_alpha=0.0)
    assert torch.equal(one(x.detach()).loss, short(x.detach()).loss)


def test_a_file_keeps_the_options(tmp_path: Path) -> None:
    model, _ = sae(auxk="saelens", multi_k=[9, 2], multi_weights=[0.5, 2.0])
    model.save(tmp_path / "m.safetensors")
    again = ksae.load(tmp_path / "m.safetensors")
    assert again.config() == model.config() and again.auxk == "saelens"
    assert again.multi_k == ((9, 0.5), (2, 2.0))
    plain, _ = sae()
    assert not {"auxk", "multi_k", "multi_weights"} & plain.config().keys()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"auxk": "anthropic"}, ValueError, "auxk must be one of dictionary_learning, openai,"),
        ({"multi_k": [0]}, ValueError, "multi_k must be different numbers in [1, 40], got [0]"),
        ({"multi_k": [41]}, ValueError, "got [41]"),
        ({"multi_k": [3, 3]}, ValueError, "multi_k must be different numbers"),
        ({"multi_k": 3}, TypeError, "multi_k must be a list of integers, got 3"),
        ({"multi_k": [2.5]}, TypeError, "multi_k must be an integer, got 2.5"),
        ({"multi_k": [3], "multi_topk": True}, ValueError, "multi_k must be None with multi_topk"),
        ({"multi_k": [3], "multi_weights": 0}, ValueError, "multi_weights must be 1 finite"),
        ({"multi_k": [3], "multi_weights": [1, 2]}, ValueError, "one for each of multi_k"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        sae(**options)
    assert message in str(caught.value) and str(caught.value).startswith("SAE: ")


@pytest.mark.parametrize("options", [{"multi_k": [3]}, {"multi_topk": True}])
def test_batch_topk_has_no_other_k(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"SAE: {name} must be .* with BatchTopK"):
        ksae.SAE(d, F, ksae.BatchTopK(k), **options)
