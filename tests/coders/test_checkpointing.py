# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of modules: eager gradients, and counters that count once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ksae
from ksae.interop import nvidia, openai

N, D, F, K = 30, 8, 64, 3
WIDE = 512
Loss = Callable[[Any, Tensor], Tensor]


def own(model: Any, x: Tensor) -> Tensor:
    y = randn(N, D, seed=7)
    loss: Tensor = model(x, **({"grad": y} if model.needs_gradient else {})).loss
    return loss


def sparse(activation: ksae.Activation) -> ksae.SAE:
    """A coder that leaves its dense products after the first batch."""
    model = ksae.SAE(D, WIDE, activation, dead_after=N)
    nn.init.constant_(model.b_enc, -2.0)
    return model


KINDS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "topk": (lambda: ksae.TopKSAE(D, F, K, auxk_alpha=1.0, dead_after=2 * N - 1), own),
    "batch_topk": (lambda: ksae.SAE(D, F, activation=ksae.BatchTopK(K)), own),
    "jump_relu": (lambda: ksae.SAE(D, F, activation=ksae.JumpReLU()), own),
    "jump_relu, sparse": (lambda: sparse(ksae.JumpReLU(0.1, bandwidth=0.5, pre_act=0.1)), own),
    "relu, sparse": (lambda: sparse(ksae.ReLU(0.1)), own),
    "relu, annealed": (lambda: sparse(ksae.ReLU(0.1, p_end=0.5, p_steps=(0, 2), updates=3)), own),
    "gated, sparse": (lambda: sparse(ksae.Gated(0.1)), own),
    "grad_topk": (lambda: ksae.GradTopKSAE(D, F, K, grad_norm="rms"), own),
    "transcoder": (
        lambda: ksae.Transcoder(D, D, F, K, skip=True),
        lambda model, x: model(x, randn(N, D, seed=7)).loss,
    ),
    "openai": (
        lambda: openai.Autoencoder(F, D, openai.TopK(K)),
        lambda model, x: (model(x)[2] - x).square().mean(),
    ),
    "openai fast": (
        lambda: openai.FastAutoencoder(F, D, K, 6, 2),
        lambda model, x: (model(x)[0] - x).square().mean(),
    ),
    "nvidia": (lambda: nvidia.TopKSAE(D, F, K), lambda model, x: model.loss(x)["total"]),
}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", KINDS)
def test_a_checkpointed_forward_pass_counts_once(name: str, reentrant: bool) -> None:
    make, loss_of = KINDS[name]
    torch.manual_seed(0)
    plain = make().train()
    torch.manual_seed(0)
    again = make().train()
    for seed in range(3):  # latents die meanwhile
        losses = []
        for model, way in ((plain, None), (again, checkpoint)):
            x = randn(N, D, seed=seed).requires_grad_()
            model.zero_grad()
            call = lambda x, model=model: loss_of(model, x)
            loss = call(x) if way is None else way(call, x, use_reentrant=reentrant)
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        for (key, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), key
            assert a.grad is None or torch.equal(a.grad, b.grad), key
        for (key, a), b in zip(plain.named_buffers(), again.buffers(), strict=True):
            assert torch.equal(a, b), key
    if isinstance(plain, ksae.SAE) and plain.d_sae == WIDE:
        assert not plain.activation.is_dense(plain) and plain.mean_active > 0
