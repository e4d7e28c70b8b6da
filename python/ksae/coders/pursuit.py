# SPDX-License-Identifier: Apache-2.0
"""Pursuit: sparse codes that are found step by step, from what earlier steps have left.

`matching_pursuit` is the encoder of MP-SAE (arXiv 2506.03093), with gradients in memory that does
not grow with the steps. `gradient_pursuit` and `orthogonal_pursuit` take any trained dictionary and
find better codes for it than its encoder does, in use alone. The products with the whole dictionary
are those of `ksae.topk_encode`; all else is of the chosen rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import accumulator
from .config import integer


def matching_pursuit(
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    tolerance: float = 0.0,
    stop_on_repeat: bool = False,
) -> tuple[Tensor, Tensor]:
    """k steps of matching pursuit: from r = x - b_dec the latent with the largest <W_enc[i], r> is
    taken with that value c, if it is above 0, and r becomes r - c W_dec[i].

    Args:
        x: [N, d] float32, bfloat16, float16 or float64; the other floating arguments are of the
            same dtype.
        W_enc, W_dec: [F, d]; for tied rows the same tensor.
        k: steps, in [1, F].
        b_dec: [d].
        tolerance: a row with |r| no larger takes no more steps.
        stop_on_repeat: nor does one that has taken a latent for the second time (as SAELens).

    Returns:
        values [N, k] >= 0, c of each step; indices [N, k] int64. A latent may be taken more than
        once: `merged` adds its values up.

    Raises:
        ValueError: shapes that do not fit, k or tolerance out of range. TypeError: dtypes that
            differ.

    Numerics: r is kept in float32 (float64 for float64), products are those of `ksae.topk_encode`
    of r rounded to x's dtype. Gradients for x, W_enc, W_dec and b_dec with the choices fixed; the
    backward pass goes through the steps the other way and computes each r again, so it keeps one r
    however many steps there are. On CUDA, the weights' gradients are sums in no fixed order.
    """
    k = _check("matching_pursuit", x, W_dec, k, b_dec)
    if W_enc.shape != W_dec.shape:
        want, got = list(W_dec.shape), list(W_enc.shape)
        raise ValueError(f"matching_pursuit: W_enc must be of shape {want} as W_dec, got {got}")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"matching_pursuit: tolerance must be finite and >= 0, got {tolerance}")
    acc = accumulator(x.dtype)
    start = x.to(acc) if b_dec is None else x.to(acc) - b_dec.to(acc)
    options = (k, tolerance, stop_on_repeat)
    values, indices = _Matching.apply(start, W_enc, W_dec, *options)  # type: ignore[no-untyped-call]
    return values, indices


class _Matching(torch.autograd.Function):
    """The steps from r [N, d], and their adjoints."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        W_enc: Tensor,
        W_dec: Tensor,
        k: int,
        tolerance: float,
        stop_on_repeat: bool,
    ) -> tuple[Tensor, Tensor]:
        values = W_dec.new_zeros(len(r), k)
        indices = torch.zeros(len(r), k, dtype=torch.int64, device=r.device)
        bias = W_enc.new_zeros(len(W_enc))
        done = torch.zeros(len(r), 1, dtype=torch.bool, device=r.device)
        r = r.clone()
        for t in range(k):
            c, j = ops.topk_encode(r.to(W_enc.dtype), W_enc, bias, 1)
            if tolerance > 0:
                c = torch.where(r.norm(dim=1, keepdim=True) > tolerance, c, 0)
            if stop_on_repeat:
                c = torch.where(done, 0, c)
                again = (indices[:, :t] == j) & (values[:, :t] > 0)
                done |= again.any(1, keepdim=True)
            values[:, t : t + 1], indices[:, t : t + 1] = c, j
            r -= c.to(r.dtype) * W_dec[j[:, 0]].to(r.dtype)
        ctx.save_for_backward(r, W_enc, W_dec, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        r, W_enc, W_dec, values, indices = ctx.saved_tensors
        acc, rho = r.dtype, torch.zeros_like(r)
        of_enc, of_dec = (torch.zeros_like(W, dtype=acc) for W in (W_enc, W_dec))
        for t in reversed(range(values.shape[1])):
            j, c = indices[:, t], values[:, t : t + 1].to(acc)
            written, read = W_dec[j].to(acc), W_enc[j].to(acc)
            gamma = grad[:, t : t + 1].to(acc) - (rho * written).sum(1, keepdim=True)
            gamma = torch.where(c > 0, gamma, 0)
            r = r + c * written  # as it was before this step
            of_enc.index_add_(0, j, gamma * r)
            of_dec.index_add_(0, j, -c * rho)
            rho = rho + gamma * read
        return rho, of_enc.to(W_enc.dtype), of_dec.to(W_dec.dtype), None, None, None


def merged(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same code [N, k] with each latent once: its values added up where it comes first, in the
    order of latents, 0 where it comes again."""
    order = indices.argsort(dim=1, stable=True)
    indices, values = indices.gather(1, order), values.gather(1, order)
    again = torch.zeros_like(indices, dtype=torch.bool)
    again[:, 1:] = indices[:, 1:] == indices[:, :-1]
    group = (~again).cumsum(1) - 1  # of equal latents, from 0
    sums = torch.zeros_like(values).scatter_add(1, group, values)
    return torch.where(again, 0, sums.gather(1, group)), indices


@torch.no_grad()
def gradient_pursuit(
    x: Tensor, W_dec: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of at most k latents by gradient pursuit (Blumensath and Davies 2008; as
    dictionary_learning's inference): the latent with the largest product with the residual joins
    those that were chosen, and all their values take one step along the gradient, no further than
    is best, none below 0.

    Args:
        x: [N, d]. W_dec: [F, d], rows of any length. k: in [1, F]. b_dec: [d].

    Returns:
        values [N, k] >= 0, indices [N, k] int64, each latent once but for entries of value 0.

    Raises:
        ValueError: shapes that do not fit, k out of range. TypeError: dtypes that differ.

    Example:
        >>> import torch, ksae
        >>> ksae.pursuit.gradient_pursuit(torch.tensor([[3.0, 1.0]]), torch.eye(2), 2)
        (tensor([[3., 1.]]), tensor([[0, 1]]))
    """
    k = _check("gradient_pursuit", x, W_dec, k, b_dec)
    return _pursue(x, W_dec, k, b_dec, 1, anew=False)


@torch.no_grad()
def orthogonal_pursuit(
    x: Tensor, W_dec: Tensor, k: int, b_dec: Tensor | None = None, iterations: int = 15
) -> tuple[Tensor, Tensor]:
    """Codes of at most k latents by orthogonal matching pursuit, values >= 0 (as overcomplete): the
    latent with the largest product with the residual that was not chosen yet joins, and all values
    are fitted anew by `iterations` steps of projected gradient, each of the best length.

    Arguments, results and errors as `gradient_pursuit`; iterations at least 1.
    """
    k = _check("orthogonal_pursuit", x, W_dec, k, b_dec)
    if integer("orthogonal_pursuit", "iterations", iterations) < 1:
        raise ValueError(f"orthogonal_pursuit: iterations must be at least 1, got {iterations}")
    return _pursue(x, W_dec, k, b_dec, iterations, anew=True)


def _pursue(
    x: Tensor, W_dec: Tensor, k: int, b_dec: Tensor | None, iterations: int, anew: bool
) -> tuple[Tensor, Tensor]:
    """anew: only latents that were not chosen before join."""
    acc = accumulator(x.dtype)
    target, N = (x if b_dec is None else x - b_dec).to(acc), len(x)
    bias, W = W_dec.new_zeros(len(W_dec)), W_dec.to(acc)
    w = target.new_zeros(N, k)
    indices = torch.zeros(N, k, dtype=torch.int64, device=x.device)
    taken = torch.zeros(N, k, dtype=torch.bool, device=x.device)
    for t in range(k):
        r = target - ops.sparse_decode(w, indices, W)
        _, best = ops.topk_encode(r.to(W_dec.dtype), W_dec, bias, t + 1 if anew else 1)
        known = ((best[:, :, None] == indices[:, None, :]) & taken[:, None, :]).any(2)
        first = known.int().argmin(1, keepdim=True)  # the best that is not known, if any
        indices[:, t : t + 1] = best.gather(1, first)
        taken[:, t : t + 1] = ~known.gather(1, first)
        for i in range(iterations):
            if i:
                r = target - ops.sparse_decode(w, indices, W)
            q = ops.sparse_decode_backward_values(r, indices, W)
            q = torch.where(taken & ((w > 0) | (q > 0)), q, 0)
            c = ops.sparse_decode(q, indices, W)
            square = c.square().sum(1, keepdim=True)
            eta = torch.where(square > 0, (c * r).sum(1, keepdim=True) / square, 0)
            w = (w + eta * q).relu()
    return w.to(x.dtype), indices


def _check(op: str, x: Tensor, W_dec: Tensor, k: int, b_dec: Tensor | None) -> int:
    k = integer(op, "k", k)
    if W_dec.dim() != 2 or x.dim() != 2 or x.shape[1] != W_dec.shape[1]:
        want = f"[N, d] for W_dec of shape {list(W_dec.shape)}"
        raise ValueError(f"{op}: x must be of shape {want}, got {list(x.shape)}")
    if b_dec is not None and b_dec.shape != W_dec.shape[1:]:
        raise ValueError(
            f"{op}: b_dec must be of shape {[W_dec.shape[1]]}, got {list(b_dec.shape)}"
        )
    for name, t in (("x", x), ("b_dec", b_dec)):
        if t is not None and t.dtype != W_dec.dtype:
            raise TypeError(f"{op}: {name} must be {W_dec.dtype} as W_dec, got {t.dtype}")
    if not 1 <= k <= len(W_dec):
        raise ValueError(f"{op}: k must be in [1, {len(W_dec)}], the number of latents, got {k}")
    return k
