# SPDX-License-Identifier: Apache-2.0
"""Sums of numbers over the entries of each latent: gradients of biases, and what is grad_dot_w.

One program a latent takes SUMS entries at a time, in float64, so that sums depend on no order but
that of the entries. Bytes: an entry's position, value and gradient. A latent that every token
selects is one program's.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

SUMS = 32  # entries of a latent at a time


@triton.jit
def finite(scales_ptr, GROUPS: tl.constexpr):
    """Whether the step is to be taken."""
    bad = 0
    for g in tl.static_range(GROUPS):
        bad += tl.where(tl.abs(tl.load(scales_ptr + g)) < float("inf"), 0, 1)
    return bad == 0


@triton.jit
def sums_kernel(
    values,  # of each group [N, k] T
    grads,  # [N, k] float32, with GRADS
    offsets,
    order,
    scales_ptr,  # [GROUPS] float32, with GRADS
    bias_ptr,  # [F]: the sum of scale * grad, or of the values
    grad_dot_w_ptr,  # [F]: the sum of scale * value * grad, with GRADS
    GROUPS: tl.constexpr, GRADS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    bias = tl.zeros((SUMS,), tl.float64)
    grad_dot_w = tl.zeros((SUMS,), tl.float64)
    good = True
    if GRADS:
        good = finite(scales_ptr, GROUPS)
    if good:
        for g in tl.static_range(GROUPS):
            last = tl.load(offsets[g] + i + 1)
            for first in range(tl.load(offsets[g] + i), last, SUMS):
                e = first + tl.arange(0, SUMS)
                at = tl.load(order[g] + e, e < last, 0)
                v = tl.load(values[g] + at, e < last, 0.0).to(tl.float64)
                if GRADS:
                    scale = tl.load(scales_ptr + g).to(tl.float64)
                    product = scale * tl.load(grads[g] + at, e < last, 0.0).to(tl.float64)
                    bias += product  # entries have values that are not 0
                    grad_dot_w += v * product
                else:
                    bias += v
    tl.store(bias_ptr + i, tl.sum(bias, axis=0).to(tl.float32).to(bias_ptr.dtype.element_ty))
    if GRADS:
        tl.store(grad_dot_w_ptr + i, tl.sum(grad_dot_w, axis=0).to(tl.float32))


def latent_sums(
    values: Sequence[Tensor],  # G of [N, k_g] T
    grads: Sequence[Tensor],  # G of [N, k_g] float32
    offsets: Sequence[Tensor],  # G of [F+1] int32
    order: Sequence[Tensor],  # G of [N*k_g] int32
    scales: Tensor,  # [G] float32
    grad_b_enc: Tensor,  # [F] float32, written
    grad_dot_w: Tensor,  # [F] float32, written
) -> None:
    """Sums of scale * grad and of scale * value * grad over the entries of each latent."""
    sums_kernel[(grad_b_enc.numel(),)](
        tuple(values), tuple(grads), tuple(offsets), tuple(order), scales, grad_b_enc, grad_dot_w,
        GROUPS=len(values), GRADS=True, SUMS=SUMS, num_warps=1,
    )  # fmt: skip


def value_sums(
    values: Sequence[Tensor],  # one of [N, k] T
    offsets: Sequence[Tensor],  # one of [F+1] int32
    order: Sequence[Tensor],  # one of [N*k] int32
    out: Tensor,  # [F] T, written
) -> None:
    """Sums of the values of each latent's entries."""
    sums_kernel[(out.numel(),)](
        values, values, offsets, order, values[0], out, out, GROUPS=1, GRADS=False, SUMS=SUMS,
        num_warps=1,
    )  # fmt: skip
