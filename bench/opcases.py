# SPDX-License-Identifier: Apache-2.0
"""Inputs of the op benchmark, and those of torch's ways that take more than a line."""

from __future__ import annotations

from collections.abc import Callable

import data
import torch
from torch import Tensor

from ksae import native, ops

HYPER = [1e-3, 1.0, 0.9, 0.999, 1e-8, 1.0, 0.1, 0.001]  # as row_update takes them


class Case:
    """One shape and dtype: a batch, weights, and the code of the batch."""

    def __init__(
        self, N: int, d: int, F: int, k: int, name: str, dtype: torch.dtype, kind: str
    ) -> None:
        self.N, self.d, self.F, self.k, self.name, self.dtype = N, d, F, k, name, dtype
        weights = data.initial_weights(F, d)
        self.x = data.batches(kind, N, d, 1)[0].to(dtype)
        self.W = weights["W_enc"].to(dtype)
        self.b_enc, self.b_dec = weights["b_enc"].to(dtype), weights["b_dec"].to(dtype)
        self.grad = torch.randn(N, d).to(dtype)
        self.values, self.indices = ops.topk_encode(self.x, self.W, self.b_enc, k, self.b_dec)
        # torch accumulates some of its ways in the storage dtype
        self.tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        self.can_screen = False
        if native.available():
            from ksae import _cpu

            self.can_screen = _cpu.can_screen()

    def dense_code(self) -> Tensor:
        """[N, F]"""
        code = torch.zeros(self.N, self.F, dtype=self.dtype)
        return code.scatter_(1, self.indices, self.values)

    def index_add(self) -> tuple[Tensor, Tensor]:
        """Gradient of the decoder and sum of the values, as one writes them in torch."""
        contributions = self.values[:, :, None] * self.grad[:, None, :]  # [N, k, d]
        flat = self.indices.reshape(-1)
        grad_W = torch.zeros(self.F, self.d, dtype=self.dtype)
        grad_W.index_add_(0, flat, contributions.reshape(-1, self.d))
        value_sum = torch.zeros(self.F, dtype=self.dtype)
        return grad_W, value_sum.index_add_(0, flat, self.values.reshape(-1))

    def sort_by_latent(self) -> tuple[Tensor, Tensor]:
        """Offsets and order of the entries with a value; the others count for a latent F."""
        latent = torch.where(self.values != 0, self.indices, self.F).reshape(-1)
        sorted_, order = latent.sort(stable=True)
        bounds = torch.arange(self.F + 1)
        return torch.searchsorted(sorted_, bounds), order


Way = Callable[[], Tensor]


def latent_pass(case: Case) -> tuple[Way, Way, Callable[[], None]]:
    """The same update of W_enc, b_enc and W_dec by ksae and by torch, and torch's fused Adam alone.

    Each has parameters and moments of its own; the first two return their W_dec.
    """
    residual, _, grads = ops.sparse_residual(
        case.values, case.indices, case.W, case.b_dec, case.x, case.d
    )
    scale = torch.tensor([2 / float(case.x.square().sum())])
    return _ours(case, residual, grads, scale), *_torchs(case, residual, scale)


def _ours(case: Case, residual: Tensor, grads: Tensor, scale: Tensor) -> Way:
    W_enc, W_dec = case.W.clone(), case.W.clone()
    moments = [torch.zeros_like(W_enc) for _ in range(4)]
    b_enc, m, v = case.b_enc.clone(), torch.zeros(case.F), torch.zeros(case.F)
    hyper = torch.tensor(HYPER)
    hyper[1] = HYPER[7] ** 0.5  # of the first step, as torch's
    hyper[0] = HYPER[0] / HYPER[6]
    grad_b_dec = torch.empty(case.d)
    offsets, order = ([t] for t in ops.group_by_latent(case.values, case.indices, case.F))

    def call() -> Tensor:
        grad_b_enc, along = ops.latent_sums([case.values], [grads], offsets, order, scale)
        state = (W_enc, None, moments[0], moments[1], hyper, grad_b_dec)
        encoder = ([grads], offsets, order, [case.x], scale, case.b_dec, None)
        ops.row_update(*encoder, grad_b_enc, *state, 0, False)
        state = (W_dec, None, moments[2], moments[3], hyper, None)
        decoder = ([case.values], offsets, order, [residual], scale, None, along)
        ops.row_update(*decoder, None, *state, 0, True)
        m.lerp_(grad_b_enc, HYPER[6])  # b_enc is one small vector
        v.mul_(HYPER[3]).addcmul_(grad_b_enc, grad_b_enc, value=HYPER[7])
        b_enc.addcdiv_(m, v.sqrt() / hyper[1] + HYPER[4], value=-float(hyper[0]))
        return W_dec

    return call


def _torchs(case: Case, residual: Tensor, scale: Tensor) -> tuple[Way, Callable[[], None]]:
    flat = case.indices.reshape(-1)
    x = case.x - case.b_dec
    W_enc, b_enc, W_dec = (torch.nn.Parameter(t.clone()) for t in (case.W, case.b_enc, case.W))
    adam = torch.optim.Adam([W_enc, b_enc, W_dec], lr=HYPER[0], fused=True)

    def summed(coefficients: Tensor, rows: Tensor) -> Tensor:
        contributions = coefficients[:, :, None] * rows[:, None, :]  # [N, k, d]
        total = torch.zeros(case.F, case.d)
        return total.index_add_(0, flat, contributions.reshape(-1, case.d))

    def call() -> Tensor:
        grad = scale * residual
        dv = torch.bmm(case.W[case.indices], grad[:, :, None])[:, :, 0]  # [N, k]
        dv = torch.where(case.values > 0, dv, 0)
        W_enc.grad = summed(dv, x)
        b_enc.grad = torch.zeros(case.F).index_add_(0, flat, dv.reshape(-1))
        W_dec.grad = summed(case.values, grad)
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        adam.step()
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return W_dec.detach()

    return call, adam.step
