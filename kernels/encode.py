# SPDX-License-Identifier: Apache-2.0
"""Encode without the N x F matrix: a product whose epilogue keeps what can be among the k largest.

1. sample: the product on tiles of latents spread over F; maxima of groups of columns are stored.
2. guess: per row the r-th largest maximum, r = k p + 4 sqrt(k p), p the sampled share.
3. gate: the whole product; each score that is not below the guess is appended to the row's
   buffer as a 64-bit key (score, then smaller index), at the place that the row's counter gives.
4. redo: a row whose count is below k or above the capacity is done again, tile by tile, above a
   running threshold; exact on any data. The grid is fixed and leaves at once with nothing to do.
5. pick: sorts the buffer of each row by key and writes the first k.

The count is the proof: at least k scores reach the guess, so none below it wins. Keys are
unique, so the order of appending does not matter and the same input gives the same bits. All three
products are one function with one tile shape, so a score does not depend on the path taken.

Cost: 1 + p products. Memory beyond inputs and outputs: the buffers, N * capacity * 8 bytes, and
the sampled maxima, N * F * p / group * 4 bytes. Nothing synchronises with the host.
Limits: k <= 1024. A redone row is slow: one program works on a tile of rows alone.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_K = 1024
REDO_PROGRAMS = 132

# (BLOCK_N, BLOCK_F, BLOCK_D, warps, stages) by bytes of an element. Not measured: defaults by the
# arithmetic of accumulators in registers and stages in shared memory.
TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 3)}
# 128 x 128 spills on sm_100: its accumulators come back from tensor memory all at once.
BLACKWELL_TILES = {2: (128, 64, 64, 8, 3), 4: TILES[4]}
INTERPRETED_TILE = (16, 64, 32, 4, 1)
# The interpreter's bf16 product is wrong; operands are widened there. The product is the same.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
EMPTY = tl.constexpr(-(2**63))


@triton.jit
def _order(s):
    """int32 in the order of selection: any NaN largest, -0 equal to +0."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(s != s, 0x7FFFFFFF, ordered)


@triton.jit
def _key(s, f):
    """int64: the score's order, then the smaller index first."""
    return (_order(s).to(tl.int64) << 32) | (0x7FFFFFFF - f).to(tl.int64)


@triton.jit
def _score(key):
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scores(
    x_ptr,  # [N, d]
    w_ptr,  # [F, d]
    b_ptr,  # [F]
    mask_ptr,  # [F] int8, read if MASK
    rows,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    f,  # [BLOCK_F]
    F,
    d,
    MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """u [BLOCK_N, BLOCK_F] float32 of a tile; the only product of this file."""
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    c = tl.arange(0, BLOCK_D)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * d
    w_rows = w_ptr + f.to(tl.int64)[None, :] * d
    for start in range(0, d, BLOCK_D):
        inside = start + c < d
        x = tl.load(x_rows + (start + c)[None, :], valid[:, None] & inside[None, :], 0.0)
        w = tl.load(w_rows + (start + c)[:, None], (f < F)[None, :] & inside[:, None], 0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    u = acc + tl.load(b_ptr + f, f < F, 0.0).to(tl.float32)[None, :]
    if MASK:
        living = tl.load(mask_ptr + f, f < F, 0) != 0
        u = tl.where(living[None, :], u, float("-inf"))
    return u


@triton.jit
def sample_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr,
    maxima_ptr,  # [N, groups]
    N, F, d, groups, stride,
    MASK: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    f = tile * stride * BLOCK_F + tl.arange(0, BLOCK_F)
    u = _scores(
        x_ptr, w_ptr, b_ptr, mask_ptr, rows, rows < N, f, F, d, MASK, BLOCK_D, BLOCK_N, BLOCK_F
    )
    u = tl.where((f < F)[None, :], u, float("-inf"))
    PARTS: tl.constexpr = BLOCK_F // GROUP
    best = tl.max(tl.reshape(u, (BLOCK_N, PARTS, GROUP)), axis=2)
    g = tile * PARTS + tl.arange(0, PARTS)
    tl.store(
        maxima_ptr + rows.to(tl.int64)[:, None] * groups + g[None, :], best, (rows < N)[:, None]
    )


@triton.jit
def guess_kernel(
    maxima_ptr,  # [N, groups]
    tau_ptr,  # [N]
    groups, r,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The r-th largest of a row by bisection on the bits of its order; -inf if there are fewer."""
    n = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK)
    m = tl.load(maxima_ptr + n * groups + g, g < groups, float("-inf"))
    order = tl.where(g < groups, _order(m).to(tl.int64), EMPTY)
    low = tl.full((), -(2**31), tl.int64)
    for i in range(32):
        trial = low + (tl.full((), 1, tl.int64) << (31 - i))
        low = tl.where(tl.sum((order >= trial).to(tl.int32)) >= r, trial, low)
    none = tl.sum((order >= low).to(tl.int32)) < r
    tl.store(tau_ptr + n, tl.where(none, float("-inf"), _score(low << 32)))


@triton.jit
def gate_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr,
    tau_ptr,  # [N]
    count_ptr,  # [N] int32, zero
    keys_ptr,  # [N, CAPACITY]
    N, F, d,
    MASK: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    u = _scores(
        x_ptr, w_ptr, b_ptr, mask_ptr, rows, rows < N, f, F, d, MASK, BLOCK_D, BLOCK_N, BLOCK_F
    )
    tau = tl.load(tau_ptr + rows, rows < N, 0.0)
    below = u < tau[:, None]  # a NaN is not below
    passed = (below == 0) & (rows < N)[:, None] & (f < F)[None, :]
    counter = count_ptr + rows[:, None] + tl.zeros((BLOCK_N, BLOCK_F), tl.int32)
    place = tl.atomic_add(counter, 1, mask=passed, sem="relaxed")  # only survivors reach memory
    here = keys_ptr + rows.to(tl.int64)[:, None] * CAPACITY + place
    tl.store(here, _key(u, f[None, :]), passed & (place < CAPACITY))


@triton.jit
def list_kernel(
    count_ptr,  # [N]
    list_ptr,  # [N]
    listed_ptr,  # [1] int32, zero
    N, k,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows whose count proves nothing. Their order in the list does not show in the result."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr + n, n < N, k)
    bad = ((count < k) | (count > CAPACITY)) & (n < N)
    place = tl.atomic_add(listed_ptr + tl.zeros((BLOCK,), tl.int32), 1, mask=bad, sem="relaxed")
    tl.store(list_ptr + place, n, bad)


@triton.jit
def redo_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr,
    list_ptr, listed_ptr,
    count_ptr, keys_ptr,
    F, d, k,
    MASK: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    listed = tl.load(listed_ptr)
    slot = tl.arange(0, BLOCK_N)
    c = tl.arange(0, CAPACITY)
    for first in range(tl.program_id(0) * BLOCK_N, listed, tl.num_programs(0) * BLOCK_N):
        valid = first + slot < listed
        rows = tl.load(list_ptr + first + slot, valid, 0)
        count = tl.zeros((BLOCK_N,), tl.int32)
        least = tl.full((BLOCK_N,), EMPTY, tl.int64)  # keys at or below it have lost
        for start in range(0, F, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            u = _scores(
                x_ptr, w_ptr, b_ptr, mask_ptr, rows, valid, f, F, d,
                MASK, BLOCK_D, BLOCK_N, BLOCK_F,
            )  # fmt: skip
            key = _key(u, f[None, :])
            passed = (key > least[:, None]) & valid[:, None] & (f < F)[None, :]
            one = passed.to(tl.int32)
            place = count[:, None] + tl.cumsum(one, axis=1) - one
            tl.store(keys_ptr + rows.to(tl.int64)[:, None] * CAPACITY + place, key, passed)
            count += tl.sum(one, axis=1)
            tl.debug_barrier()  # other threads of the program read what was stored
            for i in range(BLOCK_N):
                mine = tl.sum(tl.where(slot == i, count, 0))
                if mine > CAPACITY - BLOCK_F:  # no room for another tile: keep the best k
                    row = tl.sum(tl.where(slot == i, rows, 0)).to(tl.int64)
                    kept = tl.load(keys_ptr + row * CAPACITY + c, c < mine, EMPTY)
                    kept = tl.sort(kept, descending=True)
                    tl.debug_barrier()
                    tl.store(keys_ptr + row * CAPACITY + c, kept, c < k)
                    last = tl.max(tl.where(c == k - 1, kept, EMPTY))
                    least = tl.where(slot == i, last, least)
                    count = tl.where(slot == i, k, count)
            tl.debug_barrier()
        tl.store(count_ptr + rows, count, valid)


@triton.jit
def pick_kernel(
    count_ptr, keys_ptr,
    values_ptr,  # [N, k] T
    indices_ptr,  # [N, k] int64
    k,
    RELU: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CAPACITY)
    key = tl.load(keys_ptr + n * CAPACITY + c, c < tl.load(count_ptr + n), EMPTY)
    key = tl.sort(key, descending=True)
    v = _score(key)
    if RELU:
        v = tl.where(v <= 0, 0.0, v)
    tl.store(values_ptr + n * k + c, v.to(values_ptr.dtype.element_ty), c < k)
    tl.store(indices_ptr + n * k + c, 0x7FFFFFFF - (key & 0xFFFFFFFF), c < k)


def _tile(x: Tensor) -> tuple[int, int, int, int, int]:
    if INTERPRETED.value:
        return INTERPRETED_TILE
    blackwell = torch.cuda.get_device_capability(x.device)[0] == 10
    return (BLACKWELL_TILES if blackwell else TILES)[x.element_size()]


def capacity_of(k: int, block_f: int) -> int:
    """Keys that a row's buffer holds: several times what is expected, and k plus a tile."""
    return triton.next_power_of_2(max(8 * k if k <= 64 else 4 * k, k + block_f, 256))


def topk_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    k: int,
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool
    *,
    activation: str = "relu",
    tau: Tensor | None = None,  # [N] float32: a guess of the caller's, in place of the sample's
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations a row -> values [N, k] T, indices [N, k] int64.

    `tau` and `capacity` (a power of two, at least k plus a tile of latents) change the way, never
    the result: any guess is verified by the count.
    """
    if k > MAX_K:
        raise ValueError(f"topk_encode: k must be at most {MAX_K} in this kernel, got {k}")
    (N, d), F = x.shape, W_enc.shape[0]
    values, indices = x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)
    if N == 0:
        return values, indices
    if b_dec is not None:
        x = x - b_dec
    block_n, block_f, block_d, warps, stages = _tile(x)
    blocks = {"BLOCK_N": block_n, "BLOCK_F": block_f, "BLOCK_D": block_d}
    product = {**blocks, "MASK": mask is not None, "num_warps": warps, "num_stages": stages}
    living = b_enc if mask is None else mask.view(torch.int8)
    inputs = (x, W_enc, b_enc, living)
    row_tiles, tiles = triton.cdiv(N, block_n), triton.cdiv(F, block_f)
    if capacity is None:
        capacity = capacity_of(k, block_f)

    if tau is None:
        stride = min(16, max(1, tiles // 16))
        sampled = triton.cdiv(tiles, stride)
        group = 4 if sampled * block_f > 2048 and stride > 1 else 1
        groups = sampled * block_f // group
        share = k / stride
        r = min(k, math.ceil(share + 4 * math.sqrt(share)))
        maxima = x.new_empty(N, groups, dtype=torch.float32)
        tau = x.new_empty(N, dtype=torch.float32)
        sample_kernel[row_tiles, sampled](
            *inputs, maxima, N, F, d, groups, stride, GROUP=group, **product
        )
        guess_kernel[(N,)](maxima, tau, groups, r, BLOCK=triton.next_power_of_2(groups))

    count = torch.zeros(N + 1, dtype=torch.int32, device=x.device)  # the last: rows to redo
    keys = x.new_empty(N, capacity, dtype=torch.int64)
    redo = x.new_empty(N, dtype=torch.int32)
    gate_kernel[row_tiles, tiles](*inputs, tau, count, keys, N, F, d, CAPACITY=capacity, **product)
    list_kernel[(triton.cdiv(N, 256),)](count, redo, count[N:], N, k, CAPACITY=capacity, BLOCK=256)
    redo_kernel[(min(REDO_PROGRAMS, row_tiles),)](
        *inputs, redo, count[N:], count, keys, F, d, k, CAPACITY=capacity, **product
    )
    pick_kernel[(N,)](count, keys, values, indices, k, RELU=activation == "relu", CAPACITY=capacity)
    return values, indices
