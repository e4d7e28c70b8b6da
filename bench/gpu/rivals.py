# SPDX-License-Identifier: Apache-2.0
"""What gpu/run.py compares ksae's kernels with: dense torch, and the Triton way of other libraries.

The Triton kernels are written from a description of that way: dense encoder, ReLU and torch.topk;
a decoder that gathers, one program a token and block of columns; value gradients as dot products of
gathered rows; both weight gradients latent by latent over tokens sorted by latent; torch's fused
Adam.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def bag_kernel(values, rows, table, out, d, k: tl.constexpr, BLOCK: tl.constexpr):
    """out[n] = sum of values[n, j] table[rows[n, j]]"""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        row = tl.load(rows + n * k + j).to(tl.int64)
        value = tl.load(values + n * k + j).to(tl.float32)
        total += value * tl.load(table + row * d + columns, mask=inside).to(tl.float32)
    tl.store(out + n * d + columns, total, mask=inside)


@triton.jit
def segment_kernel(values, rows, bounds, table, out, d, BLOCK: tl.constexpr):
    """out[i] = sum of values[e] table[rows[e]] over e in [bounds[i], bounds[i + 1])"""
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    e = tl.load(bounds + i)
    last = tl.load(bounds + i + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    while e < last:
        row = tl.load(rows + e).to(tl.int64)
        value = tl.load(values + e).to(tl.float32)
        total += value * tl.load(table + row * d + columns, mask=inside).to(tl.float32)
        e += 1
    tl.store(out + i * d + columns, total, mask=inside)


@triton.jit
def dots_kernel(grad, rows, table, out, d: tl.constexpr, k: tl.constexpr, BLOCK: tl.constexpr):
    """out[n, j] = <grad[n], table[rows[n, j]]>"""
    e = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + e).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        g = tl.load(grad + (e // k) * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        w = tl.load(table + row * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        total += g * w
    tl.store(out + e, tl.sum(total, 0))


def block(d: int) -> int:
    return min(1024, triton.next_power_of_2(d))


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """[N, d] in W_dec's dtype."""
    (N, k), d = values.shape, W_dec.shape[1]
    out = torch.empty(N, d, dtype=W_dec.dtype, device=W_dec.device)
    grid = (N, triton.cdiv(d, block(d)))
    bag_kernel[grid](values, indices, W_dec, out, d, k, BLOCK=block(d))
    return out


def dots(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Gradient of the values [N, k], float32."""
    k, d = indices.shape[1], W_dec.shape[1]
    out = torch.empty(indices.shape, dtype=torch.float32, device=grad.device)
    dots_kernel[(indices.numel(),)](grad, indices, W_dec, out, d, k, BLOCK=block(d))
    return out


def weight_gradient(values: Tensor, indices: Tensor, rows: Tensor, F: int) -> Tensor:
    """[F, d] float32: the sum of values[n, j] rows[n] over the tokens n that chose a latent."""
    k, d = indices.shape[1], rows.shape[1]
    latent, order = indices.reshape(-1).sort(stable=True)
    bounds = torch.searchsorted(latent, torch.arange(F + 1, device=rows.device))
    out = torch.empty(F, d, dtype=torch.float32, device=rows.device)
    sorted_values, tokens = values.reshape(-1)[order], order // k
    grid = (F, triton.cdiv(d, block(d)))
    segment_kernel[grid](sorted_values, tokens, bounds, rows, out, d, BLOCK=block(d))
    return out


class SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, low: torch.dtype) -> Any:
        W = W_dec.to(low)
        ctx.save_for_backward(values, indices, W)
        return decode(values, indices, W)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, indices, W = ctx.saved_tensors
        grad = grad.contiguous()
        dv = dots(grad, indices, W).to(values.dtype)
        return dv, None, weight_gradient(values, indices, grad, W.shape[0]), None


class SparseEncode(torch.autograd.Function):
    """linear, ReLU, topk; the backward touches chosen latents only. No gradient of the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b_dec: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Any:
        x = x - b_dec.to(x.dtype)
        u = torch.nn.functional.linear(x, W_enc.to(x.dtype), b_enc.to(x.dtype))  # [N, F]
        values, indices = u.relu_().topk(k, sorted=False)
        ctx.save_for_backward(x, values, indices, W_enc)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        x, values, indices, W_enc = ctx.saved_tensors
        F = W_enc.shape[0]
        dv = torch.where(values > 0, grad, 0)
        db = torch.zeros(F, device=x.device)
        db.index_add_(0, indices.reshape(-1), dv.reshape(-1).float())
        return None, -(db @ W_enc), weight_gradient(dv, indices, x, F), db, None


class Rival:
    """float32 parameters, products in `low`, torch's fused Adam, unit decoder rows."""

    def __init__(self, W: Tensor, k: int, low: torch.dtype, lr: float) -> None:
        F, d = W.shape
        self.k, self.low = k, low
        start = {"W_enc": W, "b_enc": W.new_zeros(F), "W_dec": W, "b_dec": W.new_zeros(d)}
        self.theta = {n: torch.nn.Parameter(t.float().clone()) for n, t in start.items()}
        self.optimizer = torch.optim.Adam(self.theta.values(), lr=lr, fused=True)

    def reconstruct(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, x: Tensor) -> Tensor:
        """One training step on x [N, d] in `low`; the loss before the update."""
        wide = x.float()
        error = (self.reconstruct(x).float() - wide).square().sum()
        loss = error / (wide - wide.mean(0)).square().sum()
        loss.backward()
        W = self.theta["W_dec"]
        assert W.grad is not None
        with torch.no_grad():
            W.grad -= (W.grad * W).sum(1, keepdim=True) * W
            self.optimizer.step()
            self.optimizer.zero_grad()
            W /= W.norm(dim=1, keepdim=True)
        return loss.detach()


class Dense(Rival):
    def reconstruct(self, x: Tensor) -> Tensor:
        W_enc, b_enc, W_dec, b_dec = (p.to(self.low) for p in self.theta.values())
        u = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)  # [N, F]
        values, indices = u.topk(self.k, sorted=False)  # [N, k]
        code = torch.zeros_like(u).scatter(1, indices, values.relu())  # [N, F]
        return code @ W_dec + b_dec


class Triton(Rival):
    def reconstruct(self, x: Tensor) -> Tensor:
        W_enc, b_enc, W_dec, b_dec = self.theta.values()
        values, indices = SparseEncode.apply(x, b_dec, W_enc, b_enc, self.k)
        return SparseDecode.apply(values, indices, W_dec, self.low) + b_dec.to(self.low)
