# SPDX-License-Identifier: Apache-2.0
"""The passes over latents that end a training step: what they must move and compute, by formula as
in costs.py, and what they are timed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksae import ops

from ..harness import costs
from ..harness.costs import F32, I32, Cost, adam
from .case import Call, Case, Problem

# lr/bc1, sqrt(bc2), beta1, beta2, eps, grad_scale, 1 - beta1, 1 - beta2 of step 1
HYPER = [1e-2, 0.001**0.5, 0.9, 0.999, 1e-8, 1.0, 0.1, 0.001]
SOURCE = "csrc/cuda/row_update.cu: pieces_kernel, latent_kernel"  # of the row pass on CUDA
STEP = ("latent_sums", "row_update", "row_update")  # the passes of a step, of both matrices


def latent_sums(N: int, F: int, k: int, s: int = F32) -> Cost:
    return Cost(N * k * (s + F32 + I32) + (F + 1) * I32 + 2 * F * F32, 3 * N * k)


def row_grad_sq(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    """Row sums of squares of the encoder's gradient."""
    read = N * d * s + N * k * (F32 + I32) + (F + 1) * I32
    return Cost(read + F * 8, 2 * N * k * d + 2 * F * d)


def row_update(
    N: int, d: int, F: int, k: int, s: int = F32, *, row: int = F32, coefficient: int = F32
) -> Cost:
    """One matrix: gradient, projection, Adam, unit rows. `row`, `coefficient`: element sizes."""
    read = N * d * row + N * k * (coefficient + I32) + (F + 1) * I32
    return Cost(read, 2 * N * k * d + 6 * F * d) + adam(F * d, s)


def cost(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    """The sums, and the update of both matrices."""
    both = row_update(N, d, F, k, s, row=s) + row_update(N, d, F, k, s, coefficient=s)
    return latent_sums(N, F, k, s) + both


def train_step(N: int, d: int, F: int, k: int, s: int = F32) -> dict[str, Cost]:
    """The fused step by phase; each phase counts its tensors once."""
    return {
        "topk_encode": costs.topk_encode(N, d, F, k, s),
        "sparse_residual": costs.sparse_residual(N, d, F, k, s),
        "group_by_latent": costs.group_by_latent(N, F, k, s),
        "latent_sums": latent_sums(N, F, k, s),
        "row_update W_enc": row_update(N, d, F, k, s, row=s),
        "row_update W_dec": row_update(N, d, F, k, s, coefficient=s),
    }


def forward(case: Case) -> Iterator[Problem]:
    N, d, F, k, s = case.N, case.d, case.F, case.k, case.dtype.itemsize
    values, grads = case.values, case.grads
    lists = ([case.offsets], [case.order])
    encoder = ([grads], *lists, [case.x], case.scale, case.b_dec)
    yield Problem(
        "latent_sums",
        "forward",
        latent_sums(N, F, k, s),
        lambda impl: partial(impl.latent_sums, [values], [grads], *lists, case.scale),
        check=list,
    )
    yield Problem(
        "row_grad_sq",
        "forward",
        row_grad_sq(N, d, F, k, s),
        lambda impl: partial(impl.row_grad_sq, *encoder, None, case.W, 0),
    )
    along = ops.latent_sums([values], [grads], *lists, case.scale)[1]
    decoder = ([values], *lists, [case.residual], case.scale, None)
    yield Problem(
        "row_update",
        "forward",
        row_update(N, d, F, k, s, coefficient=s),
        lambda impl: _update(case, impl, decoder, along),
        {"index_add_, fused Adam": _torch_update(case)} if s == 4 else {},
    )


def _update(case: Case, impl: Any, lists: tuple[Any, ...], along: Tensor) -> Call:
    """The decoder's update on weights and moments of its own."""
    W = case.W.clone()
    master = None if case.dtype == torch.float32 else W.float()
    m, v = (torch.zeros_like(W, dtype=torch.float32) for _ in range(2))
    hyper = torch.tensor(HYPER, device=W.device)

    def call() -> Tensor:
        impl.row_update(*lists, along, None, W, master, m, v, hyper, None, 0, True)
        return W

    return call


def _torch_update(case: Case) -> Call:
    """The same in torch: index_add_, projection, Adam(fused=True), unit rows."""
    flat = case.indices.reshape(-1)
    state: list[Any] = []

    def call() -> Tensor:
        if not state:  # made at the first call: most of the time nobody asks
            W = torch.nn.Parameter(case.W.clone())
            state.extend([W, torch.optim.Adam([W], lr=1e-3, fused=True)])
        W, adam = state
        rows = case.values[:, :, None] * (case.scale * case.residual)[:, None, :]  # [N, k, d]
        W.grad = torch.zeros_like(W).index_add_(0, flat, rows.reshape(-1, case.d))
        W.grad -= (W.grad * W).sum(1, keepdim=True) * W
        adam.step()
        with torch.no_grad():
            W.div_(W.norm(dim=1, keepdim=True))
        result: Tensor = W.detach()
        return result

    return call


def both_passes(
    x: Tensor,
    W: Tensor,
    b_dec: Tensor,
    values: Tensor,
    indices: Tensor,
    groups: tuple[Tensor, Tensor],
    impl: Any,
) -> Callable[[], Tensor]:
    """Gradients, projection, Adam and unit rows of both matrices, as `impl` computes them; the
    float32 W_dec."""
    error = x.float() - W[indices[:, 0]].float()  # a residual's kind of numbers
    grads = torch.where(values == 0, 0, values.float())
    wide, device = torch.float32, W.device
    masters = [None if W.dtype == wide else W.float() for _ in range(2)]
    W_enc, W_dec = W.clone(), W.clone()
    moments = [torch.zeros(W.shape, device=device, dtype=wide) for _ in range(4)]
    hyper = torch.tensor([1e-4, 0.03, 0.9, 0.999, 1e-8, 1.0, 0.1, 0.001], device=device)
    grad_b_dec = torch.empty(W.shape[1], device=device)
    scale = torch.full((1,), 1e-6, device=device)
    offsets, order = ([t] for t in groups)

    def call() -> Any:
        b_enc, along = impl.latent_sums([values], [grads], offsets, order, scale)
        encoder = ([grads], offsets, order, [x], scale, b_dec, None, b_enc, W_enc, masters[0])
        impl.row_update(*encoder, moments[0], moments[1], hyper, grad_b_dec, 0, False)
        decoder = ([values], offsets, order, [error], scale, None, along, None, W_dec, masters[1])
        impl.row_update(*decoder, moments[2], moments[3], hyper, None, 0, True)
        return W_dec if masters[1] is None else masters[1]

    return call
