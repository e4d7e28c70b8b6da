# SPDX-License-Identifier: Apache-2.0
"""The terms of a step's loss and their scales.

One program: it replaces tens of launches on single numbers. Bytes: 8 a token and term.
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
