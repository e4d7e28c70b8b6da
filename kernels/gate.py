# SPDX-License-Identifier: Apache-2.0
"""The k largest scores of a row while the product runs: N x F scores are never stored.

1. maxima: the product on tiles of latents spread over F; maxima of groups of columns are stored.
2. guess: per row the r-th largest maximum, r = k p + 4 sqrt(k p), p the sampled share.
3. gate: the whole product; each score that is not below the guess is appended to the row's
   buffer as a 64-bit key (keys.py), at the place that the row's counter gives. A tile has few of
   them: its epilogue makes bits of all comparisons and touches memory for what has passed alone.
4. redo (redo.py): a row whose count is below k or above the capacity is done again, exactly.
5. pick: sorts the buffer of each row by key and writes the first k.

The count is the proof: at least k scores reach the guess, so none below it wins. A score of -inf
is never appended: rows with fewer than k others are filled with the first latents not chosen.

Cost: 1 + p products. Memory beyond inputs and outputs: the buffers, N * capacity * 8 bytes (12
where values are not the scores), and the sampled maxima, N * F * p / group * 4 bytes. Nothing
synchronises with the host. Of 4096 rows of layer 9 of SmolLM2-135M (d = 576, k = 32, F = 4608 and
24576) none would be redone.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .keys import (
    EMPTY,
    NOTHING,
    index_of,
    keep_best,
    key_of,
    kth_largest,
    of_order,
    order_of,
    score_of,
)
from .launch import warps_of
from .product import Operands, Tile, scores

MAX_K = 1024
REDO_PROGRAMS = 132
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least score above -inf
# Row tiles that run side by side, so that a tile of weights is used by all of them from L2.
ABREAST = tl.constexpr(16)


@triton.jit
def _place(op, tiles, BLOCK_N: tl.constexpr):
    """Tile of rows and tile of latents of this program."""
    row_tiles = tl.cdiv(op.N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (ABREAST * tiles) * ABREAST
    within = pid % (ABREAST * tiles)
    abreast = tl.minimum(row_tiles - first, ABREAST)
    return first + within % abreast, within // abreast


@triton.jit
def maxima_kernel(
    op,
    maxima_ptr,  # [N, groups] float32
    values_ptr,  # [N, F] or None
    tiles, groups, stride,
    SCORE: tl.constexpr, RELU: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Maxima of GROUP columns each, of every stride-th tile of latents."""
    row_tile, tile = _place(op, tiles, BLOCK_N)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tile * stride * BLOCK_F + tl.arange(0, BLOCK_F)
    s, u = scores(op, rows, f, SCORE, BLOCK_N, BLOCK_F, BLOCK_D)
    inside = (rows < op.N)[:, None] & (f < op.F)[None, :]
    if values_ptr is not None:
        v = tl.where(s == float("-inf"), 0.0, u)
        if RELU:
            v = tl.where(v <= 0, 0.0, v)
        here = values_ptr + rows.to(tl.int64)[:, None] * op.F + f[None, :]
        tl.store(here, v.to(values_ptr.dtype.element_ty), inside)
    if SCORE == "screen":
        s = u  # what is certain
    ordered = order_of(tl.where((f < op.F)[None, :], s, float("-inf")))
    PARTS: tl.constexpr = BLOCK_F // GROUP
    best = of_order(tl.max(tl.reshape(ordered, (BLOCK_N, PARTS, GROUP)), axis=2))
    g = tile * PARTS + tl.arange(0, PARTS)
    here = maxima_ptr + rows.to(tl.int64)[:, None] * groups + g[None, :]
    tl.store(here, best, (rows < op.N)[:, None] & (g < groups)[None, :])


@triton.jit
def guess_kernel(
    maxima_ptr,  # [N, groups]
    tau_ptr,  # [N]
    groups, r,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The r-th largest of a row, or the least number if there are fewer."""
    n = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK)
    m = tl.load(maxima_ptr + n * groups + g, g < groups, float("-inf"))
    ordered = tl.where(g < groups, order_of(m).to(tl.int64), NOTHING)
    best = kth_largest(ordered, r, 32)
    tau = tl.where(best == NOTHING, LOWEST, of_order(best.to(tl.int32)))
    tl.store(tau_ptr + n, tl.where(tau < LOWEST, LOWEST, tau))


@triton.jit
def _of_word(v):
    """[*, 4, WORDS, 8] int32 -> [*, WORDS]: the sum of what belongs to a word."""
    return tl.sum(tl.sum(v, axis=1), axis=2)


@triton.jit
def _only(v, taken):
    """The number of each word that is taken, bit for bit."""
    return _of_word(tl.where(taken, v.to(tl.int32, bitcast=True), 0)).to(tl.float32, bitcast=True)


@triton.jit
def _gate_tile(
    op,
    tau_ptr, count_ptr, keys_ptr, carried_ptr,
    rows,  # [BLOCK_N]
    wanted,  # [BLOCK_N]
    tile,
    SCORE: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Appends what is not below tau.

    Few scores are: a pass over the tile makes words of bits, and as long as there is one, another
    takes a score of every word. A word is 32 latents, eight consecutive ones of four places, which
    one warp holds; so no number of the tile goes through shared memory.
    """
    f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    s, u = scores(op, rows, f, SCORE, BLOCK_N, BLOCK_F, BLOCK_D)
    tau = tl.maximum(tl.load(tau_ptr + rows, wanted, 0.0), LOWEST)  # -inf never passes
    WORDS: tl.constexpr = BLOCK_F // 32
    four, word, eight = tl.arange(0, 4), tl.arange(0, WORDS), tl.arange(0, 8)
    bit = tl.full((4, 8), 1, tl.int32) << (four[:, None] * 8 + eight[None, :])
    bit = bit[None, :, None, :]
    s = tl.reshape(s, (BLOCK_N, 4, WORDS, 8))
    below = s < tau[:, None, None, None]  # a NaN is not below
    passed = _of_word(tl.where(below, 0, bit))
    first = tile * BLOCK_F + word * 8
    eights = first[None, None, :, None] + four[None, :, None, None] * (WORDS * 8)
    exists = _of_word(tl.where(eights + eight[None, None, None, :] < op.F, bit, 0))
    passed = tl.where(wanted[:, None], passed & exists, 0)
    counter = count_ptr + rows[:, None] + tl.zeros((BLOCK_N, WORDS), tl.int32)
    base = rows.to(tl.int64)[:, None] * CAPACITY
    while tl.max((passed != 0).to(tl.int32)) != 0:
        lowest = passed & -passed
        taken = bit == lowest[:, None, :, None]
        power = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
        latent = first[None, :] + (power >> 3) * (WORDS * 8) + (power & 7)
        place = tl.atomic_add(counter, 1, mask=lowest != 0, sem="relaxed")
        fits = (lowest != 0) & (place < CAPACITY)
        tl.store(keys_ptr + base + place, key_of(_only(s, taken), latent), fits)
        if carried_ptr is not None:
            carried = _only(tl.reshape(u, (BLOCK_N, 4, WORDS, 8)), taken)
            tl.store(carried_ptr + base + place, carried, fits)
        passed ^= lowest


@triton.jit
def gate_kernel(
    op,
    tau_ptr,  # [N]
    count_ptr,  # [N] int32, zero
    keys_ptr,  # [N, CAPACITY] int64
    carried_ptr,  # [N, CAPACITY] float32 or None
    tiles,
    SCORE: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row_tile, tile = _place(op, tiles, BLOCK_N)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    _gate_tile(
        op, tau_ptr, count_ptr, keys_ptr, carried_ptr, rows, rows < op.N, tile,
        SCORE, CAPACITY, BLOCK_N, BLOCK_F, BLOCK_D,
    )  # fmt: skip


@triton.jit
def gate_listed_kernel(
    op,
    tau_ptr, count_ptr, keys_ptr, carried_ptr,
    list_ptr,  # [N] int32: the rows that are wanted
    listed_ptr,  # [1] int32: how many they are
    tiles,
    SCORE: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program walks many tiles: one for each would take its time even if none is wanted."""
    listed = tl.load(listed_ptr)
    row_tiles = tl.cdiv(listed, BLOCK_N)
    for t in range(tl.program_id(0), row_tiles * tiles, tl.num_programs(0)):
        slot = t % row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        wanted = slot < listed
        rows = tl.load(list_ptr + slot, wanted, 0)
        _gate_tile(
            op, tau_ptr, count_ptr, keys_ptr, carried_ptr, rows, wanted, t // row_tiles,
            SCORE, CAPACITY, BLOCK_N, BLOCK_F, BLOCK_D,
        )  # fmt: skip


@triton.jit
def pick_kernel(
    count_ptr, keys_ptr,
    carried_ptr,  # [N, CAPACITY] float32, or None: the scores are the values
    values_ptr,  # [N, k] T
    indices_ptr,  # [N, k] int64
    k,
    RELU: tl.constexpr, CAPACITY: tl.constexpr,
    SORTED: tl.constexpr, LOG: tl.constexpr,  # 2 ** LOG, at least k, are sorted
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + n)
    if SORTED < CAPACITY and count > SORTED:
        if carried_ptr is None:
            keep_best(keys_ptr + n * CAPACITY, None, count, k, CAPACITY)
        else:
            keep_best(keys_ptr + n * CAPACITY, carried_ptr + n * CAPACITY, count, k, CAPACITY)
        count = tl.minimum(count, k)
    c = tl.arange(0, SORTED)
    held = tl.load(keys_ptr + n * CAPACITY + c, c < count, EMPTY)
    key = tl.sort(held, descending=True)
    f = index_of(key)
    found = (c < count) & (c < k)
    if carried_ptr is None:
        v, place, out = score_of(key), c, found
    else:
        v = tl.load(carried_ptr + n * CAPACITY + c, c < count, 0.0)
        place = tl.zeros((SORTED,), tl.int32)  # how many keys are larger, by bisection
        for i in tl.static_range(LOG):
            larger = tl.gather(key, place + ((SORTED >> (i + 1)) - 1), 0) > held
            place = tl.where(larger, place + (SORTED >> (i + 1)), place)
        out = (c < count) & (place < k)
    if RELU:
        v = tl.where(v <= 0, 0.0, v)
    tl.store(values_ptr + n * k + place, v.to(values_ptr.dtype.element_ty), out)
    tl.store(indices_ptr + n * k + c, f, found)
    if count < k:  # the first latents not chosen; at least k - count of the first k are free
        flags = keys_ptr + n * CAPACITY
        tl.debug_barrier()
        tl.store(flags + c, tl.zeros_like(key), c < k)
        tl.debug_barrier()
        tl.store(flags + f, tl.zeros_like(key) + 1, found & (f < k))
        tl.debug_barrier()
        free = tl.load(flags + c, c < k, 1) == 0
        one = free.to(tl.int32)
        place = count + tl.cumsum(one, axis=0) - one
        out = free & (place < k)
        none = tl.zeros((SORTED,), tl.float32)
        tl.store(values_ptr + n * k + place, none.to(values_ptr.dtype.element_ty), out)
        tl.store(indices_ptr + n * k + place, c.to(tl.int64), out)


class Candidates(NamedTuple):
    """What passed the gate; a count above the capacity says that keys are missing."""

    counts: Tensor  # [N + 1] int32, the last one free for a total
    keys: Tensor  # [N, capacity] int64
    carried: Tensor | None  # [N, capacity] float32, where values are not the scores


def capacity_of(k: int, block_f: int) -> int:
    """Keys that a row's buffer holds: many times what is expected, for the guess is made from few
    numbers where k is small. 256 for k = 32 overflowed in 3 of the 4096 rows above, 512 in none."""
    return int(triton.next_power_of_2(max(8 * k if k <= 128 else 4 * k, k + block_f, 512)))


def guess(op: Operands, k: int, score: str, tile: Tile) -> Tensor:
    """A threshold [N] float32 that about the k largest scores of each row reach."""
    tiles = triton.cdiv(op.F, tile.f)
    stride = min(16, max(1, tiles // 16))
    sampled = triton.cdiv(tiles, stride)
    group = 4 if sampled * tile.f > 2048 and stride > 1 else 1
    groups = sampled * tile.f // group
    share = k / stride
    r = min(k, math.ceil(share + 4 * math.sqrt(share)))
    maxima = op.x.new_empty(op.N, groups, dtype=torch.float32)
    tau = op.x.new_empty(op.N, dtype=torch.float32)
    maxima_kernel[(triton.cdiv(op.N, tile.n) * sampled,)](
        op, maxima, None, sampled, groups, stride,
        SCORE=score, RELU=False, GROUP=group, **tile.meta(),
    )  # fmt: skip
    block = triton.next_power_of_2(groups)
    guess_kernel[(op.N,)](maxima, tau, groups, r, BLOCK=block, num_warps=warps_of(block))
    return tau


def gated(op: Operands, tau: Tensor, score: str, tile: Tile, capacity: int) -> Candidates:
    """All scores that are not below tau [N] float32."""
    x, N = op.x, op.N
    count = torch.zeros(N + 1, dtype=torch.int32, device=x.device)
    keys = x.new_empty(N, capacity, dtype=torch.int64)
    carried = None if score == "plain" else x.new_empty(N, capacity, dtype=torch.float32)
    found = Candidates(count, keys, carried)
    tiles = triton.cdiv(op.F, tile.f)
    gate_kernel[(triton.cdiv(N, tile.n) * tiles,)](
        op, tau, *found, tiles, SCORE=score, CAPACITY=capacity, **tile.meta()
    )
    return found


def gate_listed(
    op: Operands,
    tau: Tensor,  # [N] float32
    found: Candidates,
    score: str,
    tile: Tile,
    rows: Tensor,  # [N] int32: those that are wanted
    listed: Tensor,  # [1] int32: how many they are
) -> None:
    """Appends the scores of some rows that are not below tau. Programs without a row leave."""
    tiles, capacity = triton.cdiv(op.F, tile.f), found.keys.shape[1]
    gate_listed_kernel[(min(REDO_PROGRAMS, triton.cdiv(op.N, tile.n) * tiles),)](
        op, tau, *found, rows, listed, tiles, SCORE=score, CAPACITY=capacity, **tile.meta()
    )


def pick(found: Candidates, k: int, dtype: torch.dtype, relu: bool) -> tuple[Tensor, Tensor]:
    """The k first candidates of each row -> values [N, k] dtype, indices [N, k] int64."""
    N, capacity = found.keys.shape
    values = found.keys.new_empty(N, k, dtype=dtype)
    indices = found.keys.new_empty(N, k)
    # a sort of many takes long to compile, and to run: the k best are found by bisection first
    ordered = capacity if capacity <= 1024 else max(16, triton.next_power_of_2(k))
    pick_kernel[(N,)](
        *found, values, indices, k, RELU=relu, CAPACITY=capacity, SORTED=ordered,
        LOG=ordered.bit_length() - 1, num_warps=warps_of(capacity),
    )  # fmt: skip
    return values, indices
