# SPDX-License-Identifier: Apache-2.0
"""The order of selection as 64-bit keys: larger score first, then smaller index; any NaN first.

Keys are unique, so the order in which candidates are appended never shows in a result.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))  # below every key
NOTHING = tl.constexpr(-(2**31))  # below every order


@triton.jit
def order_of(s):
    """int32 in the order of selection: any NaN largest, -0 equal to +0."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(s != s, 0x7FFFFFFF, ordered)


@triton.jit
def of_order(ordered):
    """The float32 of an order."""
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def key_of(s, f):
    """int64: the score's order, then the smaller index first."""
    return (order_of(s).to(tl.int64) << 32) | (0x7FFFFFFF - f).to(tl.int64)


@triton.jit
def score_of(key):
    return of_order((key >> 32).to(tl.int32))


@triton.jit
def index_of(key):
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def kth_largest(v, k, BITS: tl.constexpr):
    """The k-th largest of int64 numbers that fit in BITS bits, by bisection; the least number of
    that width if there are fewer."""
    zero = tl.full((), 0, tl.int64)
    least = zero - (1 << (BITS - 2)) - (1 << (BITS - 2))
    low = tl.where(tl.sum((v >= 0).to(tl.int32)) >= k, zero, least)
    for i in range(BITS - 1):
        trial = low + (tl.full((), 1, tl.int64) << (BITS - 2 - i))
        low = tl.where(tl.sum((v >= trial).to(tl.int32)) >= k, trial, low)
    return low


@triton.jit
def keep_best(
    keys_ptr,  # [CAPACITY]
    carried_ptr,  # [CAPACITY] or None: moves with the keys
    count, k,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Moves the k largest of `count` >= k keys to the front; returns the k-th."""
    c = tl.arange(0, CAPACITY)
    key = tl.load(keys_ptr + c, c < count, EMPTY)
    last = kth_largest(key, k, 64)
    stays = key >= last
    one = stays.to(tl.int32)
    place = tl.cumsum(one, axis=0) - one
    if carried_ptr is not None:
        carried = tl.load(carried_ptr + c, stays, 0.0)
        tl.debug_barrier()
        tl.store(carried_ptr + place, carried, stays)
    tl.debug_barrier()  # every thread has read what others overwrite
    tl.store(keys_ptr + place, key, stays)
    tl.debug_barrier()
    return last
