# SPDX-License-Identifier: Apache-2.0
"""Certified screening: the float32 encode at about the price of a bf16 product.

1. Copies of x and W_enc in bf16, and the norms that bound what they lost (bound.py).
2. The gate of gate.py over the bf16 product: each latent has an interval [s^ - m, s^ + m] that
   holds its score. The threshold is guessed from the lower ends; a latent passes by its upper end,
   and its lower end travels along.
3. prove, a program a row: L = the k-th largest lower end bounds the k-th score from below. With
   tau <= L and no overflow, what the gate dropped cannot win, nor what has its upper end below L.
4. rescore, a program a row: the others, about 2 k, are scored in float32.
5. pick, as in gate.py.

Between 2 and 3 rows without proof pass the gate once more: even of the latents that an overflowing
row has kept, the k-th largest lower end bounds the k-th score from below, and more tightly than the
guess did. That gate is a product of these rows alone.

A row without proof even then is scored in full, in the launch of step 4: its latents are cut into
so many parts that PROGRAMS programs have work, each keeps the k best of its part above L and a
running threshold, and merge brings them together. So nothing can overflow, whatever the data.

Every float32 score comes from one loop of one kernel, so the result is that of scoring each latent
with it: which path a row took does not show. Cost: 1 + p bf16 products and the reading of about
2 k rows of W_enc a row of x, 2 k d 4 bytes. A row that is scored in full reads all of W_enc, F d 4
bytes, spread over the device; many such rows read it from L2 at best, each for itself: where x has
entries that dwarf the others (and b_dec does not remove them) the plain encode is the faster one.
Its parts take PROGRAMS * capacity * 8 bytes of memory, 2 MB for k up to 64. Of 4096 rows of layer 9
of SmolLM2-135M (d = 576, k = 32, SAEs after 120 and 300 steps), these steps in torch let 2 pass
twice and score none in full for F = 24576, and 19 and 7 for F = 4608.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import norms
from .gate import LOWEST, MAX_K, Candidates, capacity_of, gate_listed, gated, guess, pick
from .keys import (
    EMPTY,
    NOTHING,
    index_of,
    keep_best,
    key_of,
    kth_largest,
    of_order,
    order_of,
)
from .launch import registers, warps_of
from .product import Operands, tile_of

BLOCK_C = 32  # latents scored at a time
# of rows that are scored in full: two for each multiprocessor of an H100
PROGRAMS = 3 if triton.knobs.runtime.interpret else 264


class Bf16Copy(NamedTuple):
    """bf16 copy of float32 weights, with the norms that bound what it lost."""

    rounded: Tensor  # [F, d] bfloat16
    norms: Tensor  # [3, F] float32


def bf16_copy(W: Tensor, rounded: Tensor | None = None) -> Bf16Copy:
    """The bf16 copy of W [F, d] float32; of the given copy, if there is one already."""
    W = W.contiguous()
    rounded = W.bfloat16() if rounded is None else rounded.contiguous()
    return Bf16Copy(rounded, norms(W, rounded))


@triton.jit
def _bound(certain, count, tau, k, CAPACITY: tl.constexpr):
    """Order of the k-th largest lower end, and whether what the gate dropped is proven to lose."""
    bound = kth_largest(certain, k, 32)
    return bound, (count <= CAPACITY) & ((bound >= order_of(tau)) | (tau <= LOWEST))


@triton.jit
def tighten_kernel(
    tau_ptr,  # [N], raised or lowered to what is certain where that proves nothing
    count_ptr,  # [N], zero there
    low_ptr,  # [N, CAPACITY]
    redone_ptr,  # [N] int8: 1 there
    list_ptr,  # [N] int32: those rows, in an order that does not show in the result
    listed_ptr,  # [1] int32, zero
    unproven_ptr,  # [1] int32, made zero for prove_kernel
    k,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    tl.store(unproven_ptr, 0, n == 0)
    count = tl.load(count_ptr + n)
    tau = tl.load(tau_ptr + n)
    c = tl.arange(0, CAPACITY)
    low = tl.load(low_ptr + n * CAPACITY + c, c < count, float("-inf"))
    certain = tl.where(c < count, order_of(low).to(tl.int64), NOTHING)
    bound, proven = _bound(certain, count, tau, k, CAPACITY)
    tl.store(redone_ptr + n, (proven == 0).to(tl.int8))
    if proven == 0:
        certain_tau = tl.where(bound == NOTHING, LOWEST, of_order(bound.to(tl.int32)))
        tl.store(tau_ptr + n, tl.where(certain_tau < LOWEST, LOWEST, certain_tau))
        tl.store(count_ptr + n, 0)
        place = tl.atomic_add(listed_ptr, 1, sem="relaxed")
        tl.store(list_ptr + place, n.to(tl.int32))


@triton.jit
def prove_kernel(
    tau_ptr,  # [N]; out, where nothing is proven: what is certain
    count_ptr,  # [N] in: what passed the gate; out: what can win
    keys_ptr,  # [N, CAPACITY] of the upper ends; out: those of the latents that can win first
    low_ptr,  # [N, CAPACITY]
    redone_ptr,  # [N] int8: 2 where nothing is proven
    list_ptr,  # [N] int32: those rows, in an order that does not show in the result
    listed_ptr,  # [1] int32, zero
    k,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    keys = keys_ptr + n * CAPACITY
    count = tl.load(count_ptr + n)
    tau = tl.load(tau_ptr + n)
    c = tl.arange(0, CAPACITY)
    held = tl.load(keys + c, c < count, EMPTY)
    low = tl.load(low_ptr + n * CAPACITY + c, c < count, float("-inf"))
    certain = tl.where(c < count, order_of(low).to(tl.int64), NOTHING)
    bound, proven = _bound(certain, count, tau, k, CAPACITY)
    if proven:
        survives = (c < count) & ((held >> 32) >= bound)
        one = survives.to(tl.int32)
        tl.debug_barrier()  # every thread has read what others overwrite
        tl.store(keys + tl.cumsum(one, axis=0) - one, held, survives)
        tl.store(count_ptr + n, tl.sum(one))
    else:
        certain_tau = tl.where(bound == NOTHING, float("-inf"), of_order(bound.to(tl.int32)))
        tl.store(tau_ptr + n, certain_tau)
        tl.store(redone_ptr + n, 2)
        place = tl.atomic_add(listed_ptr, 1, sem="relaxed")
        tl.store(list_ptr + place, n.to(tl.int32))


@triton.jit
def _parts(listed, PROGRAMS: tl.constexpr):
    """Into how many parts W_enc is cut for each of the rows that are scored in full."""
    return tl.maximum(PROGRAMS // tl.maximum(listed, 1), 1)


@triton.jit
def rescore_kernel(
    x_ptr,  # [N, d] float32
    w_ptr,  # [F, d] float32
    b_ptr,  # [F] float32
    mask_ptr,  # [F] int8 or None
    tau_ptr,  # [N] what is certain of rows that are scored in full
    count_ptr,  # [N] in: how many can win; out: scored keys
    keys_ptr,  # [N, CAPACITY] in: of the upper ends; out: of the scores
    redone_ptr,  # [N] int8: 2 where the row is scored in full
    list_ptr,  # [N] int32: those rows
    listed_ptr,  # [1] int32: how many they are
    parts_ptr,  # [PROGRAMS, CAPACITY] out: k keys of a part, EMPTY if there are fewer
    F, d, k,
    PROGRAMS: tl.constexpr,
    CAPACITY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first PROGRAMS programs walk the parts of listed rows, the others have a row each."""
    pid = tl.program_id(0)
    listed = tl.load(listed_ptr)
    parts = _parts(listed, PROGRAMS)
    full = pid < PROGRAMS
    if full:
        stop = listed * parts
    else:
        stop = pid + (tl.load(redone_ptr + pid - PROGRAMS) != 2).to(tl.int32)
    split = full & (parts > 1)
    size = tl.cdiv(F, parts * BLOCK_C) * BLOCK_C
    c = tl.arange(0, CAPACITY)
    of_block = tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_D)
    nothing = key_of(float("-inf") + tl.zeros((), tl.float32), tl.zeros((), tl.int32))
    for item in range(pid, stop, PROGRAMS):
        n = (pid - PROGRAMS).to(tl.int64)
        first_i = 0
        total = 0
        least = nothing  # keys at or below it have lost
        if full:
            n = tl.load(list_ptr + item // parts).to(tl.int64)
            first_i = item % parts * size
            total = tl.minimum(first_i + size, F)
            certain = order_of(tl.load(tau_ptr + n)).to(tl.int64)
            least = tl.maximum(least, (certain << 32) - 1)
        else:
            total = tl.load(count_ptr + n)
        keys = keys_ptr + n * CAPACITY
        if split:
            keys = parts_ptr + item * CAPACITY
        kept = 0
        for start in range(first_i, total, BLOCK_C):
            i = start + of_block
            listed_key = tl.load(keys + i, (i < total) & (full == 0), 0)
            f = tl.where(full, i, index_of(listed_key).to(tl.int32))
            f = tl.where(i < total, f, 0)
            acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
            w_rows = w_ptr + f.to(tl.int64)[:, None] * d
            for first in tl.range(0, d, BLOCK_D, num_stages=3):
                inside = first + column < d
                x = tl.load(x_ptr + n * d + first + column, inside, 0.0)
                w = tl.load(w_rows + (first + column)[None, :], inside[None, :], 0.0)
                acc += w * x[None, :]
            s = tl.sum(acc, axis=1) + tl.load(b_ptr + f)
            if mask_ptr is not None:
                s = tl.where(tl.load(mask_ptr + f) != 0, s, float("-inf"))
            key = key_of(s, f)
            wins = (i < total) & (key > least)
            one = wins.to(tl.int32)
            at = kept + tl.cumsum(one, axis=0) - one
            tl.debug_barrier()  # the list is read before scores take its place
            tl.store(keys + at, key, wins)
            kept += tl.sum(one)
            tl.debug_barrier()
            over = split & (start + BLOCK_C >= total) & (kept > k)
            if (kept > CAPACITY - BLOCK_C) | over:
                least = keep_best(keys, None, kept, k, CAPACITY)
                kept = tl.minimum(kept, k)
        tl.store(keys + c, EMPTY, split & (c >= kept) & (c < k))
        tl.store(count_ptr + n, kept, split == 0)
        tl.debug_barrier()  # before the next item takes the place


@triton.jit
def merge_kernel(
    count_ptr,  # [N] out: scored keys of rows in parts
    keys_ptr,  # [N, CAPACITY] out
    list_ptr,  # [N] int32: rows that were scored in full
    listed_ptr,  # [1] int32: how many they are
    parts_ptr,  # [PROGRAMS, CAPACITY], of which k are read
    k,
    PROGRAMS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The k best of all parts of a row."""
    row = tl.program_id(0)
    listed = tl.load(listed_ptr)
    parts = _parts(listed, PROGRAMS)
    if (row < listed) & (parts > 1):
        n = tl.load(list_ptr + row).to(tl.int64)
        keys = keys_ptr + n * CAPACITY
        own = parts_ptr + row * parts * CAPACITY
        least = tl.full((), EMPTY, tl.int64)
        kept = 0
        for first in range(0, parts * k, CHUNK):
            e = first + tl.arange(0, CHUNK)
            part = e // k
            key = tl.load(own + part * CAPACITY + e % k, part < parts, EMPTY)
            wins = key > least
            one = wins.to(tl.int32)
            tl.store(keys + kept + tl.cumsum(one, axis=0) - one, key, wins)
            kept += tl.sum(one)
            tl.debug_barrier()  # other threads of the program read what was stored
            if kept > CAPACITY - CHUNK:
                least = keep_best(keys, None, kept, k, CAPACITY)
                kept = tl.minimum(kept, k)
        tl.store(count_ptr + n, kept)


def screened_topk_encode(
    x: Tensor,  # [N, d] float32
    W_enc: Tensor,  # [F, d] float32
    b_enc: Tensor,  # [F] float32
    k: int,
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool
    *,
    of_W: Bf16Copy | None = None,
    tau: Tensor | None = None,  # [N] float32: a guess of the caller's, in place of the sample's
    capacity: int | None = None,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of float32 tensors -> values [N, k] float32, indices [N, k] int64.

    Selection and values are those of float32 arithmetic, whatever the data.

    Args:
        k: at most 1024; ValueError above it.
        of_W: the bf16 copy of W_enc, where it outlives the call; else it is made here.
        tau, capacity: as in `topk_encode`. A slack below 1 breaks the proof: tests want to see it.
    """
    return screened_and_redone(
        x, W_enc, b_enc, k, b_dec, mask, of_W=of_W, tau=tau, capacity=capacity, slack=slack
    )[:2]


def screened_and_redone(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    of_W: Bf16Copy | None = None,
    tau: Tensor | None = None,
    capacity: int | None = None,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`screened_topk_encode`, and [N] int8 which rows passed the gate once (0) and twice (1), and
    which had no proof then and were scored in full (2)."""
    if k > MAX_K:
        raise ValueError(f"topk_encode: k must be at most {MAX_K} in the Triton kernel, got {k}")
    (N, d), F = x.shape, W_enc.shape[0]
    redone = torch.empty(N, dtype=torch.int8, device=x.device)
    if N == 0:
        return x.new_empty(0, k), x.new_empty(0, k, dtype=torch.int64), redone
    x = (x if b_dec is None else x - b_dec).contiguous()
    W_enc, b_enc = W_enc.contiguous(), b_enc.contiguous()
    of_W = bf16_copy(W_enc) if of_W is None else of_W
    rounded = x.bfloat16()
    living = None if mask is None else mask.contiguous().view(torch.int8)
    op = Operands(
        rounded,
        of_W.rounded,
        b_enc,
        N,
        F,
        d,
        mask=living,
        x_norms=norms(x, rounded, slack),
        w_norms=of_W.norms,
    )
    tile = tile_of(rounded, carries=True)
    tau = guess(op, k, "screen", tile) if tau is None else tau.clone()  # it is written
    # twice the room of the plain gate: latents that cannot be told apart pass as well; but no more
    # than the registers of a program can hold
    room = min(2 * capacity_of(k, tile.f), 4096)
    found = gated(op, tau, "screen", tile, capacity or room)
    assert found.carried is not None
    capacity = found.keys.shape[1]
    rows, listed = tau.new_empty(N + 1, dtype=torch.int32), found.counts[N:]
    unproven = rows[N:]
    warps = warps_of(capacity)
    tighten_kernel[(N,)](
        tau, found.counts, found.carried, redone, rows, listed, unproven, k, CAPACITY=capacity,
        num_warps=warps,
    )  # fmt: skip
    gate_listed(op, tau, found, "screen", tile, rows, listed)
    prove_kernel[(N,)](
        tau, *found, redone, rows, unproven, k, CAPACITY=capacity, num_warps=warps
    )  # fmt: skip
    values, indices = rescored(x, W_enc, b_enc, living, tau, found, redone, rows, unproven, k)
    return values, indices, redone


def rescored(
    x: Tensor,  # [N, d] float32, centred
    W_enc: Tensor,  # [F, d] float32
    b_enc: Tensor,  # [F] float32
    living: Tensor | None,  # [F] int8
    tau: Tensor,  # [N] float32: what is certain of rows without proof
    found: Candidates,  # as prove_kernel leaves them
    redone: Tensor,  # [N] int8: 2 in rows without proof
    rows: Tensor,  # [N + 1] int32: those rows
    unproven: Tensor,  # [1] int32: how many they are
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k best of what can win, by their float32 scores; rows without proof are scored in
    full."""
    (N, d), F, capacity = x.shape, W_enc.shape[0], found.keys.shape[1]
    warps = warps_of(capacity)
    parts = found.keys.new_empty(PROGRAMS, capacity)
    block_d = min(128, int(triton.next_power_of_2(d)))
    rescore_kernel[(PROGRAMS + N,)](
        x, W_enc, b_enc, living, tau, found.counts, found.keys, redone, rows, unproven, parts,
        F, d, k, PROGRAMS=PROGRAMS, CAPACITY=capacity, BLOCK_C=BLOCK_C, BLOCK_D=block_d,
        num_warps=warps, **(registers(160) if warps == 4 else {}),
    )  # fmt: skip
    merge_kernel[(min(N, PROGRAMS // 2),)](
        found.counts, found.keys, rows, unproven, parts, k, PROGRAMS=PROGRAMS, CAPACITY=capacity,
        CHUNK=1 << (capacity - k).bit_length() - 1, num_warps=warps,
    )  # fmt: skip
    return pick(Candidates(found.counts, found.keys, None), k, x.dtype, relu=True)
