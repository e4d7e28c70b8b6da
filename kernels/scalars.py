# SPDX-License-Identifier: Apache-2.0
"""The numbers of a training step: the terms of its loss, and what Adam wants to know.

One program each: what it replaces is tens of launches on single numbers. Bytes: 8 a token and term.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # squared errors at a time


@triton.jit
def terms_kernel(
    sq_errors,  # of each term [N] float64
    denominators,  # [] float32
    shares,
    sizes,  # N
    errors_ptr,  # [TERMS]
    terms_ptr,  # [TERMS]
    loss_ptr,  # []
    scales_ptr,  # [TERMS]
    TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    loss = 0.0
    for g in tl.static_range(TERMS):
        sums = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, sizes[g], BLOCK):
            sums += tl.load(sq_errors[g] + first + i, first + i < sizes[g], 0.0)
        error = tl.sum(sums, axis=0).to(tl.float32)
        below = tl.load(denominators[g])
        weight = tl.div_rn(1.0 + tl.zeros_like(below), below)
        if g > 0:
            weight = tl.where(below > 0, weight, 0.0)
        term = error * weight
        tl.store(errors_ptr + g, error)
        tl.store(terms_ptr + g, term)
        tl.store(scales_ptr + g, 2 * shares[g] * weight)
        loss += shares[g] * term
    tl.store(loss_ptr, loss)


@triton.jit
def _rest(beta, t):
    """1 - beta^t in float64, for t > 0."""
    return 1 - tl.where(beta > 0, tl.exp(t * tl.log(tl.where(beta > 0, beta, 1.0))), 0.0)


@triton.jit
def adam_kernel(
    loss_ptr,
    norm_ptr,  # or None
    clip_norm,
    scales_ptr,  # [SCALES]
    lr_ptr, t_ptr, constants_ptr,  # float64
    hyper_ptr,  # [8]
    taken_ptr,  # int8
    taken_scales_ptr,  # [SCALES]
    SCALES: tl.constexpr,
):  # fmt: skip
    beta1 = tl.load(constants_ptr)
    beta2 = tl.load(constants_ptr + 1)
    t = tl.load(t_ptr) + 1
    taken = tl.abs(tl.load(loss_ptr)) < float("inf")
    grad_scale = tl.full((), 1.0, tl.float32)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        taken = taken & (tl.abs(norm) < float("inf"))
        limit = tl.div_rn(clip_norm + tl.zeros_like(norm), norm + 1e-6)
        grad_scale = tl.where(limit > 1, 1.0, limit)  # NaN stays
    tl.store(hyper_ptr, (tl.load(lr_ptr) / _rest(beta1, t)).to(tl.float32))
    tl.store(hyper_ptr + 1, tl.sqrt(_rest(beta2, t)).to(tl.float32))
    tl.store(hyper_ptr + 2, beta1.to(tl.float32))
    tl.store(hyper_ptr + 3, beta2.to(tl.float32))
    tl.store(hyper_ptr + 4, tl.load(constants_ptr + 2).to(tl.float32))
    tl.store(hyper_ptr + 5, grad_scale)
    tl.store(hyper_ptr + 6, (1 - beta1).to(tl.float32))
    tl.store(hyper_ptr + 7, (1 - beta2).to(tl.float32))
    tl.store(taken_ptr, taken.to(tl.int8))
    for g in tl.static_range(SCALES):
        tl.store(taken_scales_ptr + g, tl.where(taken, tl.load(scales_ptr + g), float("nan")))


def loss_terms(
    sq_errors: Sequence[Tensor], denominators: Sequence[Tensor], shares: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference: errors, terms, loss and scales."""
    first, G = denominators[0], len(shares)
    errors, terms, scales = (first.new_empty(G) for _ in range(3))
    loss = torch.empty_like(first)
    terms_kernel[(1,)](
        tuple(sq_errors), tuple(denominators), tuple(map(float, shares)),
        tuple(e.numel() for e in sq_errors), errors, terms, loss, scales, TERMS=G, BLOCK=BLOCK,
    )  # fmt: skip
    return errors, terms, loss, scales


def adam_scalars(
    loss: Tensor,
    norm: Tensor | None,
    clip_norm: float | None,
    scales: Tensor,
    lr: Tensor,
    t: Tensor,
    constants: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference: hyper, whether the step is taken, and the scales if so."""
    hyper, taken_scales = loss.new_empty(8), torch.empty_like(scales)
    taken = loss.new_empty((), dtype=torch.bool)
    adam_kernel[(1,)](
        loss, norm, float(clip_norm or 0), scales, lr, t, constants, hyper, taken.view(torch.int8),
        taken_scales, SCALES=scales.numel(), num_warps=1,
    )  # fmt: skip
    return hyper, taken, taken_scales
