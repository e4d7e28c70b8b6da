# SPDX-License-Identifier: Apache-2.0
"""Token-major gathers of decoder rows: reconstruction, residual, gradients of the values.

decode: one program a token and slice of columns, slices outermost, so that a cache has to hold one
slice of W_dec only. values: one program a few slots of a token, its dot products in one reading of
the token's row. Sums run over slots in order, or over columns in a tree that depends on sizes
alone. A slot with value 0 is not read. With row offsets, a program of values has a few entries of
any tokens, each of which reads its own token's row.

Bytes: N k d sizeof(T) gathered by each kernel, N d written by decode. Flops: 2 N k d each.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SLICE = 128  # columns of a program of decode: 33 MB of a bf16 W_dec of 131072 rows
SLOTS = 4  # dot products of a program of values
COLUMNS = 256  # columns of them at a time


@triton.jit
def decode_kernel(
    values_ptr,  # [N, k] T
    indices_ptr,  # [N, k] int64 or int32
    W_ptr,  # [F, d] T
    b_ptr,  # [d] T, read with BIAS
    target_ptr,  # [N, d] T or float32, read with TARGET
    offsets_ptr,  # [N + 1] int64 or None: of the rows of values and indices [E]; k is not read
    out_ptr,  # [N, stop - start]: T, or float32
    rounded_ptr,  # [N, stop - start] T, the same, or None
    d, k, start, stop,
    BIAS: tl.constexpr, TARGET: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Columns [start, stop) of the reconstruction, less the target."""
    n = tl.program_id(0).to(tl.int64)
    c = start + tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    inside = c < stop
    first = n * k
    count = k
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + n)
        count = (tl.load(offsets_ptr + n + 1) - first).to(tl.int32)
    total = tl.zeros((SLICE,), tl.float32)
    for j in tl.range(0, count, loop_unroll_factor=4):
        v = tl.load(values_ptr + first + j).to(tl.float32)
        row = W_ptr + tl.load(indices_ptr + first + j).to(tl.int64) * d
        total += v * tl.load(row + c, c < tl.where(v == 0, start, stop), 0.0).to(tl.float32)
    if BIAS:
        total += tl.load(b_ptr + c, inside, 0.0).to(tl.float32)
    if TARGET:
        total -= tl.load(target_ptr + n * d + c, inside, 0.0).to(tl.float32)
    out = out_ptr + n * (stop - start) + c - start
    tl.store(out, total.to(out_ptr.dtype.element_ty), inside)
    if rounded_ptr is not None:
        here = rounded_ptr + n * (stop - start) + c - start
        tl.store(here, total.to(rounded_ptr.dtype.element_ty), inside)


@triton.jit
def values_kernel(
    rows_ptr,  # [N, d] T or float32
    values_ptr,  # [N, k] T, read with SKIP: slots with value 0 get 0
    indices_ptr,  # [N, k] int64 or int32
    W_ptr,  # [F, d] T
    out_ptr,  # [N, k]
    d, k,
    SKIP: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """<rows[n], W[indices[n, j]]>"""
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    wanted = j < k
    if SKIP:
        wanted &= tl.load(values_ptr + n * k + j, wanted, 0.0).to(tl.float32) != 0
    W = W_ptr + tl.load(indices_ptr + n * k + j, wanted, 0).to(tl.int64) * d
    total = tl.zeros((SLOTS, COLUMNS), tl.float32)
    for first in range(0, d, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        r = tl.load(rows_ptr + n * d + c, c < d, 0.0).to(tl.float32)
        inside = wanted[:, None] & (c < d)[None, :]
        w = tl.load(W[:, None] + c[None, :], inside, 0.0).to(tl.float32)
        total += tl.where(inside, r[None, :] * w, 0.0)
    tl.store(out_ptr + n * k + j, tl.sum(total, axis=1).to(out_ptr.dtype.element_ty), j < k)


@triton.jit
def entries_kernel(
    rows_ptr,  # [N, d] T or float32
    row_of_ptr,  # [E] int32
    values_ptr,  # [E] T, read with SKIP: entries with value 0 get 0
    indices_ptr,  # [E] int64 or int32
    W_ptr,  # [F, d] T
    out_ptr,  # [E]
    E, d,
    SKIP: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """<rows[row_of[e]], W[indices[e]]>, summed in the order of values_kernel."""
    e = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    wanted = e < E
    if SKIP:
        wanted &= tl.load(values_ptr + e, wanted, 0.0).to(tl.float32) != 0
    W = W_ptr + tl.load(indices_ptr + e, wanted, 0).to(tl.int64) * d
    row = rows_ptr + tl.load(row_of_ptr + e, wanted, 0).to(tl.int64) * d
    total = tl.zeros((SLOTS, COLUMNS), tl.float32)
    for first in range(0, d, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = wanted[:, None] & (c < d)[None, :]
        r = tl.load(row[:, None] + c[None, :], inside, 0.0).to(tl.float32)
        w = tl.load(W[:, None] + c[None, :], inside, 0.0).to(tl.float32)
        total += tl.where(inside, r * w, 0.0)
    tl.store(out_ptr + e, tl.sum(total, axis=1).to(out_ptr.dtype.element_ty), e < E)


@triton.jit
def squares_kernel(
    rows_ptr,  # [N, d] float32
    out_ptr,  # [N] float64
    d,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, d, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        r = tl.load(rows_ptr + n * d + c, c < d, 0.0).to(tl.float64)
        total += r * r
    tl.store(out_ptr + n, tl.sum(total, axis=0))


def decode(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor | None,  # [N, d]
    start: int,
    stop: int,
    out: Tensor,  # [N, stop - start], written
    row_offsets: Tensor | None = None,  # [N + 1] of a code [E, 1]
    rounded: Tensor | None = None,  # [N, stop - start] T, written
) -> None:
    """Columns [start, stop) of the reconstruction, less the target if there is one."""
    k, d = values.shape[1], W_dec.shape[1]
    if out.numel() == 0:
        return
    decode_kernel[out.shape[0], triton.cdiv(stop - start, SLICE)](
        values, indices, W_dec, values if b_dec is None else b_dec,
        values if target is None else target, row_offsets, out, rounded, d, k, start, stop,
        BIAS=b_dec is not None, TARGET=target is not None, SLICE=SLICE, num_warps=1,
    )  # fmt: skip


def value_products(
    rows: Tensor,  # [N, d]
    values: Tensor | None,  # [N, k]; None: every slot counts
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    out: Tensor,  # [N, k], written
    row_of: Tensor | None = None,  # [E] int32: the row of each entry of a code [E, 1]
) -> None:
    """<rows[n], W_dec[indices[n, j]]>, 0 where the value is 0."""
    (N, k), d = indices.shape, W_dec.shape[1]
    if out.numel() == 0:
        return
    if row_of is not None:
        entries_kernel[(triton.cdiv(N, SLOTS),)](
            rows, row_of, rows if values is None else values, indices, W_dec, out, N, d,
            SKIP=values is not None, SLOTS=SLOTS, COLUMNS=COLUMNS, num_warps=1,
        )  # fmt: skip
        return
    values_kernel[N, triton.cdiv(k, SLOTS)](
        rows, rows if values is None else values, indices, W_dec, out, d, k,
        SKIP=values is not None, SLOTS=SLOTS, COLUMNS=COLUMNS, num_warps=1,
    )  # fmt: skip


def row_squares(rows: Tensor, out: Tensor) -> None:
    """Sum of squares of each row [N, d] float32, in float64, into out [N]."""
    if out.numel():
        columns = min(1024, triton.next_power_of_2(max(rows.shape[1], 1)))
        squares_kernel[(rows.shape[0],)](rows, out, rows.shape[1], COLUMNS=columns, num_warps=4)


def sparse_residual(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d]
    residual: Tensor,  # [N, columns] float32, written
    sq_error: Tensor,  # [N] float64, written
    grads: Tensor,  # [N, k] float32, written
    chunk: int,
    row_offsets: Tensor | None = None,  # [N + 1] of a code [E, 1]
    row_of: Tensor | None = None,  # [E] int32, with row_offsets
    rounded: Tensor | None = None,  # [N, d] T, written
) -> None:
    """Residual, its sums of squares and its products with the chosen rows.

    Where fewer than d columns are wanted, whole rows are held `chunk` at a time; all of them with
    row offsets, for the host does not know which entries a chunk has.
    """
    N, d = target.shape
    columns = residual.shape[1]
    if row_offsets is not None:
        rows = residual if columns == d else residual.new_empty(N, d)
        decode(values, indices, W_dec, b_dec, target, 0, d, rows, row_offsets, rounded)
        row_squares(rows, sq_error)
        value_products(rows, values, indices, W_dec, grads, row_of)
        if columns < d:
            residual.copy_(rows[:, :columns])
        return
    step = max(N if columns == d else min(chunk, N), 1)
    whole = residual if columns == d else residual.new_empty(step, d)
    for n in range(0, N, step):
        part = slice(n, n + step)
        rows = whole[: min(step, N - n)]
        code = (values[part], indices[part], W_dec)
        narrow = None if rounded is None else rounded[part]
        decode(*code, b_dec, target[part], 0, d, rows, None, narrow)
        row_squares(rows, sq_error[part])
        value_products(rows, *code, grads[part])
        if columns < d:
            residual[part].copy_(rows[:, :columns])
