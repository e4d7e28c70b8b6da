# SPDX-License-Identifier: Apache-2.0
"""The proven bound of a score that was computed from bf16 copies.

With x^, w^ the copies, s^ = <w^, x^> + b in float32 and g = (d + 16) 2^-22 bounding what either
accumulation loses,
  |s - s^| <= |w - w^| |x| (1 + g) + |w^| (|x - x^| + g |x^| + g |x|) + 2^-20 |b| + d 2^-124 = m.
Tensor cores truncate where a chain of float32 sums rounds: hence 2^-22, four times the rounding.

Norms are float32 sums, rounded up; the floor of d 2^-126 under each square sum covers squares and
inputs lost to underflow. Where a sum might overflow (a norm above 2^60, a bias above 1e37, a NaN)
the norm is made infinite, and so is m: such a latent is always a candidate and proves nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norms_kernel(
    t_ptr,  # [rows, d] float32
    rounded_ptr,  # [rows, d] bf16
    norms_ptr,  # [3, rows]: of t, of t - rounded, of rounded
    rows, d, slack,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    here = tl.minimum(n, rows - 1).to(tl.int64)[:, None] * d
    full = tl.zeros((ROWS, BLOCK), tl.float32)
    lost = tl.zeros((ROWS, BLOCK), tl.float32)
    rounded = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, d, BLOCK):
        inside = (start + c < d)[None, :]
        t = tl.load(t_ptr + here + (start + c)[None, :], inside, 0.0)
        r = tl.load(rounded_ptr + here + (start + c)[None, :], inside, 0.0).to(tl.float32)
        full += t * t
        lost += (t - r) * (t - r)
        rounded += r * r
    size, of_lost, of_rounded = norms_above(
        tl.sum(full, axis=1), tl.sum(lost, axis=1), tl.sum(rounded, axis=1), d
    )
    tl.store(norms_ptr + n, size * slack, n < rows)
    tl.store(norms_ptr + rows + n, of_lost * slack, n < rows)
    tl.store(norms_ptr + 2 * rows + n, of_rounded * slack, n < rows)


@triton.jit
def norms_above(full, lost, rounded, d):
    """Upper bounds of the three norms of rows from the float32 sums of their d squares."""
    size = _above(full, d)
    safe = size <= 2.0**60  # not if it is NaN
    size = tl.where(safe, size, float("inf"))
    of_lost = tl.where(safe, _above(lost, d), float("inf"))
    of_rounded = tl.where(safe, _above(rounded, d), float("inf"))
    return size, of_lost, of_rounded


@triton.jit
def _above(squares, d):
    """An upper bound of the norm from a float32 sum of squares."""
    return tl.sqrt(squares * (1 + (d + 64) * 2.0**-22) + d * 2.0**-126) * (1 + 2.0**-18)


def norms(t: Tensor, rounded: Tensor, slack: float = 1.0) -> Tensor:
    """Upper bounds of the norms of the rows of t [rows, d] float32, of what its bf16 copy lost and
    of the copy -> [3, rows] float32. A slack below 1 breaks the bound: tests want to see that."""
    rows, d = t.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=t.device)
    if rows:
        norms_kernel[(triton.cdiv(rows, 16),)](
            t, rounded, out, rows, d, slack, ROWS=16, BLOCK=128, num_warps=4
        )
    return out


@triton.jit
def of_row(x_norms_ptr, n, N, d):
    """What rows n add to the margin of each latent: the factors of what it lost and of its copy."""
    g = (d + 16) * 2.0**-22
    full = tl.load(x_norms_ptr + n)
    lost = tl.load(x_norms_ptr + N + n)
    rounded = tl.load(x_norms_ptr + 2 * N + n)
    of_lost = full * (1 + g)
    of_rounded = lost + g * (rounded + full)
    return of_lost, of_rounded


@triton.jit
def of_bias(b, d):
    """The part of the margin that does not depend on the row."""
    size = tl.abs(b)
    return tl.where(size < 1e37, size * 2.0**-20, float("inf")) + d * 2.0**-124


@triton.jit
def margin(w_lost, w_rounded, of_lost, of_rounded, bias):
    """m, from the norms of a latent, `of_row` and `of_bias`."""
    m = w_lost * of_lost + w_rounded * of_rounded
    return m + bias


@triton.jit
def margins(op, rows, f, b):
    """m [BLOCK_N, BLOCK_F] of a tile; b [BLOCK_F] float32."""
    of_lost, of_rounded = of_row(op.x_norms, rows, op.N, op.d)
    w_lost = tl.load(op.w_norms + op.F + f)
    w_rounded = tl.load(op.w_norms + 2 * op.F + f)
    bias = of_bias(b, op.d)
    return margin(
        w_lost[None, :], w_rounded[None, :], of_lost[:, None], of_rounded[:, None], bias[None, :]
    )
