# SPDX-License-Identifier: Apache-2.0
"""Gradients of every differentiable op: what is saved is unpacked once, activation checkpointing
works, and forward mode is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import ksae
from ksae import ops
from ksae.ops import autograd

N, d, F, k = 6, 5, 20, 3


def call(name: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """An op as a function of the tensors that it has gradients for, and these."""
    x, W, b, b_dec = (randn(*s, seed=i) for i, s in enumerate([(N, d), (F, d), (F,), (d,)]))
    values, indices = ops.topk_encode(x, W, b, k)
    grad = x.flip(0)
    calls: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "topk": (lambda W: ops.topk(W, k), [W]),
        "topk_encode": (lambda *t: ops.topk_encode(*t[:3], k, t[3]), [x, W, b, b_dec]),
        "grad_topk_encode": (
            lambda x, W, b, b_dec: ops.grad_topk_encode(
                x, grad, W, b, W.detach(), k, 0.5, "additive", b_dec
            ),
            [x, W, b, b_dec],
        ),
        "batch_topk_encode": (
            lambda x, W, b, b_dec: ops.batch_topk_encode(x, W, b, k, b_dec),
            [x, W, b, b_dec],
        ),
        "threshold_encode": (
            lambda x, W, b, b_dec: ops.threshold_encode(x, W, b, W.detach()[:, 0].abs(), b_dec),
            [x, W, b, b_dec],
        ),
        "sparse_decode": (lambda v, *t: ops.sparse_decode(v, indices, *t), [values, W, b_dec]),
        "sparse_decode_backward_values": (
            lambda g, W: ops.sparse_decode_backward_values(g, indices, W),
            [x, W],
        ),
        "sparse_decode_backward_weight": (
            lambda g, v: ops.sparse_decode_backward_weight(g, v, indices, F),
            [x, values],
        ),
    }
    return calls[name]


def total(out: Any) -> Tensor:
    """The sum of the squares of what has a gradient."""
    tensors = out if isinstance(out, tuple) else (out,)
    return torch.stack([t.square().sum() for t in tensors if t.requires_grad]).sum()


each_op = pytest.mark.parametrize("name", list(autograd.RULES))


@each_op
def test_saved_tensors_are_unpacked_once(name: str) -> None:
    function, inputs = call(name)
    inputs = [t.requires_grad_() for t in inputs]
    packed, unpacked = [0], []

    def pack(t: Tensor) -> tuple[int, Tensor]:
        packed[0] += 1
        return packed[0], t

    def unpack(kept: tuple[int, Tensor]) -> Tensor:
        unpacked.append(kept[0])
        return kept[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = function(*inputs)
    loss = total(out)
    torch.autograd.grad(loss, inputs)
    assert sorted(unpacked) == list(range(1, packed[0] + 1))


@each_op
def test_activation_checkpointing(name: str) -> None:
    function, inputs = call(name)
    inputs = [t.requires_grad_() for t in inputs]
    want = torch.autograd.grad(total(function(*inputs)), inputs)
    again = checkpoint(lambda *t: total(function(*t)), *inputs, use_reentrant=False)
    assert isinstance(again, Tensor)
    assert all(map(torch.equal, torch.autograd.grad(again, inputs), want))


def test_activation_checkpointing_of_an_autoencoder() -> None:
    _, inputs = call("topk_encode")
    inputs = [t.requires_grad_() for t in inputs]

    def loss(x: Tensor, W: Tensor, b: Tensor, b_dec: Tensor) -> Tensor:
        return ksae.sparse_decode(*ksae.topk_encode(x, W, b, k, b_dec), W, b_dec).square().sum()

    want = torch.autograd.grad(loss(*inputs), inputs)
    again = checkpoint(loss, *inputs, use_reentrant=False)
    assert isinstance(again, Tensor)
    assert all(map(torch.equal, torch.autograd.grad(again, inputs), want))


@each_op
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_forward_mode_is_refused(name: str, wants_gradient: bool) -> None:
    function, inputs = call(name)
    inputs = [t.requires_grad_(wants_gradient) for t in inputs]
    message = f"^{name}: has no derivative in forward mode"
    for i, t in enumerate(inputs):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(t, torch.ones_like(t))
            with pytest.raises(NotImplementedError, match=message):
                function(*inputs[:i], dual, *inputs[i + 1 :])
            function(*inputs)  # without a tangent there is nothing to refuse
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, tuple(inputs), tuple(map(torch.ones_like, inputs)))
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, tuple(inputs), tuple(map(torch.ones_like, inputs)))
