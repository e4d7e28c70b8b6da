# SPDX-License-Identifier: Apache-2.0
"""Gradients for the codes and pre-activations that a forward pass returned: those of dense
tensors, or an error, never None without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_close, randn
from torch import Tensor
from torch.nn import functional as nnf

import ksae
from ksae.interop import lazy, nvidia, openai, overcomplete, sparsify
from ksae.interop.dictionary_learning import AutoEncoderTopK

N, D, F, K = 19, 16, 64, 4
X, G = randn(N, D, seed=1), randn(N, D, seed=2)

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | float]  # recon, code, pre, W, std


def from_nvidia(normalize: bool) -> Parts:
    sae = nvidia.TopKSAE(D, F, K, normalize_input=normalize)
    out = sae.forward_with_aux(X)
    std = out["norm_info"]["std"] if normalize else 1.0
    return out["recon"], out["codes"], out["pre_act"], sae.decoder.weight.T, std


def from_openai() -> Parts:
    sae = openai.Autoencoder(F, D, openai.TopK(K), normalize=True)
    pre, codes, recon = sae(X)
    return recon, codes, pre, sae.decoder.weight.T, sae.preprocess(X)[1]["std"]


def from_overcomplete(training: bool) -> Parts:
    sae = overcomplete.TopKSAE(D, F, K, dictionary_params={"use_multiplier": True})
    sae.dictionary.multiplier.data.fill_(0.3)  # type: ignore[operator]
    pre, codes, recon = sae.train(training)(X)
    return recon, codes, pre, sae.get_dictionary(), 1.0


def from_dictionary_learning() -> Parts:
    sae = AutoEncoderTopK(D, F, K)
    f, _, _, post = sae.encode(X, return_topk=True)
    return sae.decode(f), f, post, sae.decoder.weight.T, 1.0


KINDS: dict[str, Callable[[], Parts]] = {
    "nvidia": lambda: from_nvidia(True),
    "nvidia plain": lambda: from_nvidia(False),
    "openai": from_openai,
    "overcomplete": lambda: from_overcomplete(True),
    "overcomplete eval": lambda: from_overcomplete(False),
    "dictionary_learning": from_dictionary_learning,
}


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_for_a_returned_code_is_that_of_a_dense_one(name: str) -> None:
    torch.manual_seed(0)
    recon, code, pre, W_dec, std = KINDS[name]()
    assert isinstance(code, lazy.Code) and pre is not None
    got, of_pre = torch.autograd.grad((recon * G).sum(), [code, pre], retain_graph=True)
    expected = [(G * std).to(t) @ W_dec.detach().to(t).T for t in (torch.float32, torch.float64)]
    assert_close("code", got, expected[0], expected[1])
    chosen = code.detach().dense() > 0  # where the selection passes a gradient on
    torch.testing.assert_close(of_pre, torch.where(chosen, expected[0], 0))
    assert lazy.known(code) is not None  # nothing was built


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_has_all_that_was_made_of_a_code(name: str) -> None:
    """A loss that looks at the entries too, before and after the decoder and with shortcuts."""
    torch.manual_seed(0)
    recon, code, _, W_dec, std = KINDS[name]()
    weight = randn(N, F, seed=3)
    penalties = 3 * code.sum() + 2 * code.abs().square().sum() + (code * weight).sum()
    (got,) = torch.autograd.grad((recon * G).sum() + penalties, [code])
    dense = code.dense().detach()
    torch.testing.assert_close(got, (G * std) @ W_dec.detach().T + 3 + 4 * dense + weight)


def test_gradients_for_lazy_and_ordinary_tensors_come_together() -> None:
    torch.manual_seed(0)
    sae = nvidia.TopKSAE(D, F, K)
    x = X.clone().requires_grad_()
    recon, code = sae(x)
    loss = recon.square().sum()
    alone = torch.autograd.grad(loss, [x, sae.decoder.weight], retain_graph=True)
    together = torch.autograd.grad(
        loss, [x, code, sae.decoder.weight, sae.latent_bias], retain_graph=True
    )
    assert torch.equal(together[0], alone[0]) and torch.equal(together[2], alone[1])
    other = sae(x)[1]
    with pytest.raises(RuntimeError, match=r"inputs\[1\] must be a tensor that the outputs were"):
        torch.autograd.grad(loss, [x, other], retain_graph=True)
    unused = torch.autograd.grad(loss, [x, other], allow_unused=True, retain_graph=True)
    assert torch.equal(unused[0], alone[0]) and unused[1] is None
    zeros = torch.autograd.grad(loss, [other], materialize_grads=True)[0]
    assert torch.equal(zeros, torch.zeros(N, F))


def test_pre_activations_have_the_gradient_of_dead_latents() -> None:
    torch.manual_seed(0)
    W, b = randn(F, D, seed=3).requires_grad_(), randn(F, seed=4)
    u = lazy.PreActivations(X, W, b, relu=False)
    dense = nnf.linear(X, W, b)
    weight, mask = randn(N, 5, seed=5), torch.arange(F) % 2 == 0
    results = []
    for t in (u, dense):
        values, _ = torch.where(mask, t, -torch.inf).topk(5)
        results.append(torch.autograd.grad((values * weight).sum(), [t])[0])
    assert torch.equal(*results) and not u.built
    part = torch.where(mask, u, -torch.inf)
    looked = torch.autograd.grad(part.clamp(min=-1e3).square().sum(), [u])[0]
    torch.testing.assert_close(looked, torch.where(mask, 2 * dense, 0))


def refusals() -> dict[str, Callable[[], Any]]:
    sae = nvidia.TopKSAE(D, F, K)
    recon, code = sae(X)
    with torch.no_grad():
        late = sae(X)[1]
    moved, stale = sae(X)
    loss = moved.sum()
    with torch.no_grad():
        sae.decoder.weight.add_(1)
    return {
        "retain_grad": lambda: code.retain_grad(),
        "register_hook": lambda: code.register_hook(print),
        "without gradients": lambda: torch.autograd.grad(recon.sum(), [late], allow_unused=True),
        "the weights change": lambda: torch.autograd.grad(loss, [stale]),
        "got backward": lambda: recon.sum().backward(inputs=[code]),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_what_would_give_none_raises(name: str) -> None:
    with pytest.raises(RuntimeError, match=name):
        refusals()[name]()


def test_a_code_that_keeps_its_gradient_before_it_is_used_has_it() -> None:
    torch.manual_seed(0)
    sae = AutoEncoderTopK(D, F, K)
    f = sae.encode(X, return_topk=True)[0]
    f.retain_grad()
    (sae.decode(f) * G).sum().backward()
    torch.testing.assert_close(f.grad, G @ sae.decoder.weight.detach())


OWN: dict[str, Callable[[], ksae.SparseCoder]] = {
    "sae": lambda: ksae.TopKSAE(D, F, K),
    "transcoder": lambda: ksae.Transcoder(D, D, F, K, skip=True),
    "grad_topk": lambda: ksae.GradTopKSAE(D, F, K),
    "multi_topk": lambda: ksae.TopKSAE(D, F, K, multi_topk=True, loss="mse"),
}


@pytest.mark.parametrize("lead", [(N,), (N, 1), ()], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_the_values_of_ksaes_modules_have_their_gradient(name: str, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    coder = OWN[name]()
    coder.W_dec.data.copy_(randn(F, D, seed=3))
    x = X[0] if not lead else X.reshape(*lead, D)
    y = randn(*x.shape, seed=6)
    out = coder(x, y, **({"grad": y} if coder.needs_gradient else {}))
    got = torch.autograd.grad(out.recon.sum(), out.values, retain_graph=True)[0]
    assert got.shape == out.values.shape == (*lead, K)
    torch.testing.assert_close(got, coder.W_dec.detach()[out.indices].sum(-1))
    assert torch.autograd.grad(out.loss, out.values)[0].any()


def test_the_values_have_the_gradient_of_the_wider_code_too() -> None:
    torch.manual_seed(0)
    sae = ksae.TopKSAE(D, F, K, multi_topk=True, loss="mse", auxk_alpha=0)
    out = sae(X)
    (got,) = torch.autograd.grad(out.loss, [out.values])
    values, indices = ksae.topk_encode(X, sae.W_enc, sae.b_enc, 4 * K, sae.b_dec)
    values = values.detach().requires_grad_()
    loss = torch.zeros(())
    for k, weight in ((K, 1.0), (4 * K, 1 / 8)):
        recon = ksae.sparse_decode(values[:, :k], indices[:, :k], sae.W_dec, sae.b_dec)
        loss = loss + weight * (recon - X).square().mean()
    torch.testing.assert_close(got, torch.autograd.grad(loss, [values])[0][:, :K])


def test_the_acts_of_sparsify_have_their_gradient() -> None:
    torch.manual_seed(0)
    sae = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K))
    out = sae(X)
    got = torch.autograd.grad(out.sae_out.sum(), out.latent_acts)[0]
    assert sae.W_dec is not None
    torch.testing.assert_close(got, sae.W_dec.detach()[out.latent_indices].sum(-1))
    acts, indices, pre_acts = sae.encode(X)
    loss = sae.decode(acts, indices).sum()
    (of_pre,) = torch.autograd.grad(loss, [pre_acts])
    dense = sae.W_dec.detach().sum(-1).expand(N, F)
    chosen = torch.zeros(N, F, dtype=torch.bool).scatter(1, indices, True)
    torch.testing.assert_close(of_pre, torch.where(chosen, dense, 0))


@pytest.mark.parametrize("lead", [(N,), (4, 5)], ids=str)
def test_a_sparse_code_has_its_gradient(lead: tuple[int, ...]) -> None:
    """COO, as SAELens' training output: retained, asked for, and on to what it was made of."""
    values = randn(*lead, K, seed=3).requires_grad_()
    indices = torch.rand(*lead, F, generator=torch.Generator().manual_seed(4)).topk(K).indices
    W, g = randn(F, D, seed=5), randn(*lead, D, seed=2)
    code = lazy.coo(lazy.Code(values, indices, F))
    assert code.is_sparse and code.shape == (*lead, F)
    dense = torch.zeros(*lead, F).scatter(-1, indices, values.detach())
    assert torch.equal(code.detach().to_dense(), dense)
    recon = ksae.sparse_decode(lazy.values_of(code), indices, W)
    loss = (recon * g).sum()
    want = torch.zeros(*lead, F).scatter(-1, indices, (g @ W.T).gather(-1, indices))
    (got,) = torch.autograd.grad(loss, [code], allow_unused=True, retain_graph=True)
    torch.testing.assert_close(got.to_dense(), want)
    code.retain_grad()
    loss.backward(retain_graph=True)
    assert code.grad is not None and values.grad is not None
    torch.testing.assert_close(code.grad.to_dense(), want)
    torch.testing.assert_close(values.grad, want.gather(-1, indices))
    weight = randn(*lead, F, seed=6)  # a loss that looks at the entries too
    both = loss + (code.to_dense() * weight).sum()
    (of_values,) = torch.autograd.grad(both, [values])
    torch.testing.assert_close(of_values, (want + weight).gather(-1, indices))
