# SPDX-License-Identifier: Apache-2.0
"""Rows that the gate of gate.py could not prove, done again: exact on any data.

A program takes a tile of rows, scores all latents, tile by tile, and appends what is above a
running threshold: the k-th best so far, once a buffer was full. The grid is fixed and leaves at
once with nothing to do. A redone row is slow: one program works on a tile of rows alone.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate import LOWEST, REDO_PROGRAMS, Candidates
from .keys import keep_best, key_of
from .product import Operands, Tile, scores


@triton.jit
def list_kernel(
    tau_ptr,  # [N]
    count_ptr,  # [N]
    list_ptr,  # [N]
    listed_ptr,  # [1] int32, zero
    short_ptr,  # [1] int8, zero: no row came short; or None
    N, k,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows whose count proves nothing. Their order in the list does not show in the result."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr + n, n < N, k)
    tau = tl.load(tau_ptr + n, n < N, 0.0)
    short = (count < k) & (tau > LOWEST)  # at the least number all have passed
    if short_ptr is not None:
        short = short & (tl.load(short_ptr) != 0)
    bad = (short | (count > CAPACITY)) & (n < N)
    place = tl.atomic_add(listed_ptr + tl.zeros((BLOCK,), tl.int32), 1, mask=bad, sem="relaxed")
    tl.store(list_ptr + place, n, bad)


@triton.jit
def redo_kernel(
    op,
    list_ptr, listed_ptr,
    count_ptr, keys_ptr, carried_ptr,
    k,
    SCORE: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    listed = tl.load(listed_ptr)
    slot = tl.arange(0, BLOCK_N)
    for first in range(tl.program_id(0) * BLOCK_N, listed, tl.num_programs(0) * BLOCK_N):
        valid = first + slot < listed
        rows = tl.load(list_ptr + first + slot, valid, 0)
        count = tl.zeros((BLOCK_N,), tl.int32)
        # keys at or below it have lost, and so has -inf
        least = key_of(tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.zeros_like(slot))
        for start in range(0, op.F, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            s, u = scores(op, rows, f, SCORE, BLOCK_N, BLOCK_F, BLOCK_D)
            key = key_of(s, f[None, :])
            passed = (key > least[:, None]) & valid[:, None] & (f < op.F)[None, :]
            one = passed.to(tl.int32)
            place = count[:, None] + tl.cumsum(one, axis=1) - one
            here = rows.to(tl.int64)[:, None] * CAPACITY + place
            tl.store(keys_ptr + here, key, passed)
            if carried_ptr is not None:
                tl.store(carried_ptr + here, u, passed)
            count += tl.sum(one, axis=1)
            tl.debug_barrier()  # other threads of the program read what was stored
            full = count > CAPACITY - BLOCK_F  # no room for another tile: keep the best k
            if tl.max(full.to(tl.int32)) > 0:
                for i in range(BLOCK_N):
                    mine = tl.sum(tl.where(slot == i, count, 0))
                    if mine > CAPACITY - BLOCK_F:
                        at = tl.sum(tl.where(slot == i, rows, 0)).to(tl.int64) * CAPACITY
                        if carried_ptr is not None:
                            last = keep_best(keys_ptr + at, carried_ptr + at, mine, k, CAPACITY)
                        else:
                            last = keep_best(keys_ptr + at, None, mine, k, CAPACITY)
                        least = tl.where(slot == i, last, least)
                        count = tl.where(slot == i, k, count)
        tl.store(count_ptr + rows, count, valid)


def redo(
    op: Operands,
    tau: Tensor,  # [N] float32
    found: Candidates,
    k: int,
    score: str,
    tile: Tile,
    short: Tensor | None = None,  # [1] int8: whether rows below k candidates count as short
) -> None:
    """Brings rows that came short or overflowed to their k best."""
    N, capacity = found.keys.shape
    rows = tau.new_empty(N, dtype=torch.int32)
    total = found.counts[N:]
    list_kernel[(triton.cdiv(N, 256),)](
        tau, found.counts, rows, total, short, N, k, CAPACITY=capacity, BLOCK=256
    )
    tile = tile._replace(f=tile.f // 2, warps=8)  # half, for what it keeps beside a tile
    redo_kernel[(min(REDO_PROGRAMS, triton.cdiv(N, tile.n)),)](
        op, rows, total, *found, k, SCORE=score, CAPACITY=capacity, **tile.meta()
    )
