# SPDX-License-Identifier: Apache-2.0
"""Exact TopK of rows of scores that lie in memory.

1. maxima: the largest order of each group of consecutive columns; one read, spread over the device.
2. select, one program a row: the k-th largest maximum bounds the k-th score from below, so only
   groups that reach it are read again. What passes is appended to a buffer of 64-bit keys (order,
   then smaller index). Where there is no room for another round, the buffer is cut to its best k,
   the last of which is the new bound. At the end it is sorted. Exact on any data, and the order of
   appending does not matter.

Bytes a row: the scores once, about k groups again, the maxima and the buffer, which stay in cache.
A larger k than MAX_K has no buffer: torch sorts the orders of whole rows.
Portable Triton: no inline assembly, no intrinsic of one vendor. Run on no AMD GPU, and so far on no
GPU: interpreted and compiled only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .keys import EMPTY, NOTHING, index_of, keep_best, kth_largest, order_of
from .launch import registers

MAX_K = 128 if triton.knobs.runtime.interpret else 2048
WIDEST = 4096  # groups a row, where F is not too large for that
INTERPRETED = triton.knobs.runtime.interpret
ROUND = 64 if INTERPRETED else 512  # columns that are appended at once
TILE = 64 if INTERPRETED else 4096  # columns of a program of maxima
# Chunks of rows begin anywhere in these; they need no second compilation, which takes seconds.
OF_CHUNKS = ["informed_ptr", "values_ptr", "indices_ptr"]
MODES = {"plain": 0, "additive": 1, "multiplicative": 2, "signed": 3}


@triton.jit
def _preactivation(
    scores_ptr,  # [rows, F]
    bias_ptr,  # [F], read with BIAS
    mask_ptr,  # [F] int8, read with MASK
    n,
    f,
    inside,
    F,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
):
    z = tl.load(scores_ptr + n * F + f, inside, 0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + f, inside, 0.0).to(tl.float32)
    if MASK:
        z = tl.where(tl.load(mask_ptr + f, inside, 0) != 0, z, float("-inf"))
    return z


@triton.jit
def _ordered(
    scores_ptr,  # [rows, F]
    second_ptr,  # [rows, F] float32, read with MODE
    informed_ptr,  # [rows] int8, read with MODE
    bias_ptr,
    mask_ptr,
    n,
    f,
    inside,
    F,
    beta,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    MODE: tl.constexpr,
):
    """The order of the scores of columns f of row n; NOTHING where not inside."""
    s = _preactivation(scores_ptr, bias_ptr, mask_ptr, n, f, inside, F, BIAS, MASK)
    if MODE != 0:
        a = tl.load(second_ptr + n * F + f, inside, 0.0)
        gain = tl.abs(a)
        if MODE == 3:
            gain = tl.where(a > 0, 0.0, gain)
        gained = s * gain if MODE == 2 else s * (1 + beta * gain)
        plain = (s <= 0) | (tl.load(informed_ptr + n) == 0)
        s = tl.where(plain, s, gained)
    return tl.where(inside, order_of(s), NOTHING)


@triton.jit(do_not_specialize_on_alignment=OF_CHUNKS)
def order_maxima_kernel(
    scores_ptr, second_ptr, informed_ptr, bias_ptr, mask_ptr,
    maxima_ptr,  # [rows, groups] int32
    F, groups, beta,
    BIAS: tl.constexpr, MASK: tl.constexpr, MODE: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = TILE // GROUP
    g = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    f = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    order = _ordered(
        scores_ptr, second_ptr, informed_ptr, bias_ptr, mask_ptr, n, f, f < F, F, beta,
        BIAS, MASK, MODE,
    )  # fmt: skip
    tl.store(maxima_ptr + n * groups + g, tl.max(order, axis=1), g < groups)


@triton.jit(do_not_specialize_on_alignment=OF_CHUNKS)
def select_kernel(
    scores_ptr, second_ptr, informed_ptr, bias_ptr, mask_ptr,
    maxima_ptr,  # [rows, groups] int32; becomes the list of groups to read
    keys_ptr,  # [rows, CAPACITY] int64
    values_ptr,  # [rows, k]
    indices_ptr,  # [rows, k] int64
    F, groups, k, beta,
    RELU: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, MODE: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ROUND: tl.constexpr, CAPACITY: tl.constexpr,
    SORTED: tl.constexpr,  # at least k
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, GROUPS)
    own = maxima_ptr + n * groups
    best = tl.load(own + g, g < groups, NOTHING).to(tl.int64)
    bound = kth_largest(best, k, 32)  # NOTHING, which all reach, if there are fewer than k
    wanted = ((best >= bound) & (g < groups)).to(tl.int32)
    listed = tl.sum(wanted)
    tl.debug_barrier()  # all of the maxima are read
    tl.store(own + tl.cumsum(wanted, axis=0) - wanted, g, wanted != 0)
    tl.debug_barrier()

    keys = keys_ptr + n * CAPACITY
    least = bound << 32  # keys below it have lost
    count = tl.full((), 0, tl.int32)
    PARTS: tl.constexpr = ROUND // GROUP
    for first in range(0, listed, PARTS):
        part = first + tl.arange(0, PARTS)
        group = tl.load(own + part, part < listed, groups)
        f = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (ROUND,))
        order = _ordered(
            scores_ptr, second_ptr, informed_ptr, bias_ptr, mask_ptr, n, f, f < F, F, beta,
            BIAS, MASK, MODE,
        )  # fmt: skip
        key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - f).to(tl.int64)
        passed = ((key >= least) & (f < F)).to(tl.int32)
        tl.store(keys + count + tl.cumsum(passed, axis=0) - passed, key, passed != 0)
        count += tl.sum(passed)
        tl.debug_barrier()  # other threads of the program read what was stored
        over = (first + PARTS >= listed) & (count > SORTED)
        if (count > CAPACITY - ROUND) | over:  # no room for another round, or to sort them
            least = keep_best(keys, None, count, k, CAPACITY) + 1  # keys are unique
            count = tl.minimum(count, k)

    c = tl.arange(0, SORTED)
    key = tl.sort(tl.load(keys + c, c < count, EMPTY), descending=True)
    f = index_of(key)
    z = _preactivation(scores_ptr, bias_ptr, mask_ptr, n, f, c < k, F, BIAS, MASK)
    if RELU:
        z = tl.where(z <= 0, 0.0, z)
    tl.store(values_ptr + n * k + c, z.to(values_ptr.dtype.element_ty), c < k)
    tl.store(indices_ptr + n * k + c, f, c < k)


def group_of(F: int, k: int) -> int:
    """Columns a group: some 4 k groups bound tightly; more than WIDEST are too many to compare."""
    group = 128
    while group > 8 and 4 * k * group > F and WIDEST * group >= 2 * F:
        group //= 4
    while WIDEST * group < F and group < ROUND:
        group *= 2
    return min(group, ROUND)


def select(
    scores: Tensor,  # [rows, F]
    k: int,
    values: Tensor,  # [rows, k], written
    indices: Tensor,  # [rows, k] int64, written
    *,
    bias: Tensor | None = None,  # [F]
    mask: Tensor | None = None,  # [F] bool: latents with False come last, as -inf
    relu: bool = False,
    second: Tensor | None = None,  # [rows, F] float32: <W_dec[i], grad[n]>
    informed: Tensor | None = None,  # [rows] bool: rows that are scored by `mode`; others by z
    mode: str = "plain",
    beta: float = 0.0,
) -> None:
    """The k largest scores z + bias a row, or scores made of them and of `second` by `mode`.

    All tensors contiguous. Selected by the score, written are z + bias, or their ReLU.
    """
    rows, F = scores.shape
    if rows == 0:
        return
    group = group_of(F, k) if k <= MAX_K else 1
    groups = triton.cdiv(F, group)
    tile = max(TILE, group)
    maxima = torch.empty(rows, groups, dtype=torch.int32, device=scores.device)
    inputs = (
        scores,
        scores if second is None else second,
        scores if informed is None else informed.view(torch.int8),
        scores if bias is None else bias,
        scores if mask is None else mask.view(torch.int8),
    )
    options = {"BIAS": bias is not None, "MASK": mask is not None, "MODE": MODES[mode]}
    order_maxima_kernel[rows, triton.cdiv(F, tile)](
        *inputs, maxima, F, groups, beta, **options, GROUP=group, TILE=tile, num_warps=4
    )
    if k > MAX_K:
        indices.copy_(maxima.sort(dim=1, descending=True, stable=True).indices[:, :k])
        z = scores.gather(1, indices).float()
        z = z if bias is None else z + bias[indices].float()
        z = z if mask is None else torch.where(mask[indices], z, -torch.inf)
        values.copy_(torch.where(z <= 0, 0, z) if relu else z)
        return
    capacity = triton.next_power_of_2(k + ROUND)
    # what passes is seldom a ninth more than k; a sort of more is slow, and takes long to compile
    ordered = max(16, triton.next_power_of_2(k + k // 8 if k <= 512 else k))
    keys = torch.empty(rows, capacity, dtype=torch.int64, device=scores.device)
    select_kernel[(rows,)](
        *inputs, maxima, keys, values, indices, F, groups, k, beta, RELU=relu, **options,
        GROUP=group, GROUPS=triton.next_power_of_2(groups), ROUND=ROUND, CAPACITY=capacity,
        SORTED=ordered,
        num_warps=4 if capacity <= 1024 else 8, **registers(128 if capacity <= 1024 else 255),
    )  # fmt: skip
