# SPDX-License-Identifier: Apache-2.0
"""Total variance of a batch in one reading (csrc/cuda/total_variance.cu has the formula): sums of
y - pivot and of its square in double, in shares of the rows, then over the shares, then over the
columns.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARES = 5 if triton.knobs.runtime.interpret else 256
ROWS = 8  # read at a time
COLUMNS = 128
BLOCK = 1024  # partial sums that the last program reads at a time


@triton.jit
def shares_kernel(
    y_ptr,  # [N, d] T
    sums_ptr,  # [shares, d] float64
    squares_ptr,  # [shares * slices] float64
    N, d, share, slices,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) // slices
    c = tl.program_id(0) % slices * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    pivot = tl.load(y_ptr + c, c < d, 0.0).to(tl.float32).to(tl.float64)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    squares = tl.zeros((ROWS, COLUMNS), tl.float64)
    last = tl.minimum((at + 1) * share, N)
    for first in range(at * share, last, ROWS):
        n = first + r
        here = (n < last)[:, None] & (c < d)[None, :]
        y = tl.load(y_ptr + n.to(tl.int64)[:, None] * d + c[None, :], here, 0.0)
        t = tl.where(here, y.to(tl.float32).to(tl.float64) - pivot, 0.0)
        sums += t
        squares += t * t
    tl.store(sums_ptr + at.to(tl.int64) * d + c, tl.sum(sums, axis=0), c < d)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(tl.sum(squares, axis=0), axis=0))


@triton.jit
def columns_kernel(
    sums_ptr,
    columns_ptr,  # [ceil(d / COLUMNS)] float64 of - S^2 / N
    N, d, shares,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, shares, ROWS):
        s = first + r
        here = (s < shares)[:, None] & (c < d)[None, :]
        sums += tl.load(sums_ptr + s.to(tl.int64)[:, None] * d + c[None, :], here, 0.0)
    total = tl.sum(sums, axis=0)
    tl.store(columns_ptr + tl.program_id(0), -tl.sum(total * total, axis=0) / N.to(tl.float64))


@triton.jit
def variance_kernel(squares_ptr, columns_ptr, variance_ptr, squares, columns, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, squares, BLOCK):
        sums += tl.load(squares_ptr + first + i, first + i < squares, 0.0)
    for first in range(0, columns, BLOCK):
        sums += tl.load(columns_ptr + first + i, first + i < columns, 0.0)
    total = tl.sum(sums, axis=0)
    tl.store(variance_ptr, tl.where(total < 0, 0.0, total).to(tl.float32))  # NaN stays


def total_variance(y: Tensor) -> Tensor:
    """sum (y - mean over the rows of y)^2 of y [N, d] T -> [] float32."""
    N, d = y.shape
    variance = y.new_empty((), dtype=torch.float32)
    share = max(triton.cdiv(N, SHARES), 1)
    shares, slices = triton.cdiv(N, share), triton.cdiv(d, COLUMNS)
    sums = y.new_empty(shares, d, dtype=torch.float64)
    squares = y.new_empty(shares * slices, dtype=torch.float64)
    columns = y.new_empty(slices if shares else 0, dtype=torch.float64)
    if squares.numel():
        shares_kernel[(shares * slices,)](
            y, sums, squares, N, d, share, slices, ROWS=ROWS, COLUMNS=COLUMNS
        )
        columns_kernel[(slices,)](sums, columns, N, d, shares, ROWS=ROWS, COLUMNS=COLUMNS)
    variance_kernel[(1,)](squares, columns, variance, squares.numel(), columns.numel(), BLOCK=BLOCK)
    return variance
