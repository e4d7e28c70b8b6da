# SPDX-License-Identifier: Apache-2.0
"""Certified screening of a product that lies in memory: the float32 encode of a library's bf16
product.

The scores s^ of a chunk of rows are there, in float32. With m of bound.py, what can be among the k
largest is found in two readings:

1. maxima, of the scores of each group of consecutive columns (topk.py), and once a call the largest
   norms and biases of each group, which bound the margin of any of its latents.
2. screened_select, a program a row: L, the k-th largest of maximum less margin, bounds the k-th
   score from below, for these are lower ends of k different latents. Groups whose maximum and
   margin reach L are read again; a latent of theirs whose upper end s^ + m reaches L is appended,
   and its lower end s^ - m travels along.

The rest is screen.py's: prove_kernel raises L to the k-th largest lower end of what was appended
and drops what is below it; the others are scored in float32; a row that did not fit its buffer is
scored in full. So no guess is made, and no row passes twice.

Bytes a row: the scores once and about k groups of them again, then 2 k rows of W_enc.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import margin, of_bias, of_row
from .gate import LOWEST, MAX_K, Candidates, capacity_of
from .keys import NOTHING, key_of, kth_largest, of_order, order_of
from .launch import registers, warps_of
from .screen import prove_kernel, rescored
from .topk import MODES, ROUND, TILE, group_of, order_maxima_kernel


@triton.jit
def groups_kernel(
    norms_ptr,  # [3, F] of W_enc
    bias_ptr,  # [F]
    groups_ptr,  # [3, groups]: the largest of what was lost, of the copies, of the biases' parts
    F, d, groups,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    f = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = f < F
    lost = tl.load(norms_ptr + F + f, inside, 0.0)
    rounded = tl.load(norms_ptr + 2 * F + f, inside, 0.0)
    bias = of_bias(tl.load(bias_ptr + f, inside, 0.0), d)
    tl.store(groups_ptr + g, tl.max(lost, axis=1), g < groups)
    tl.store(groups_ptr + groups + g, tl.max(rounded, axis=1), g < groups)
    tl.store(groups_ptr + 2 * groups + g, tl.max(bias, axis=1), g < groups)


@triton.jit
def _lower(s, m):
    """The order of what is certain; of nothing, that of -inf."""
    low = s - m
    return order_of(tl.where(low == low, low, float("-inf")))


@triton.jit(do_not_specialize=["n0"])
def screened_select_kernel(
    scores_ptr,  # [rows, F]
    bias_ptr,  # [F] float32
    mask_ptr,  # [F] int8 or None
    maxima_ptr,  # [rows, groups] int32; becomes the list of groups to read
    groups_ptr,  # [3, groups]
    norms_ptr,  # [3, F] of W_enc
    x_norms_ptr,  # [3, N]
    count_ptr,  # [N] how many were appended, or did not fit
    keys_ptr,  # [N, CAPACITY] of the upper ends
    low_ptr,  # [N, CAPACITY]
    n0, N, F, d, groups, k,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ROUND: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = row + n0
    of_lost, of_rounded = of_row(x_norms_ptr, n, N, d)
    g = tl.arange(0, GROUPS)
    own = maxima_ptr + row * groups
    best = of_order(tl.load(own + g, g < groups, 0))
    lost = tl.load(groups_ptr + g, g < groups, 0.0)
    rounded = tl.load(groups_ptr + groups + g, g < groups, 0.0)
    bias = tl.load(groups_ptr + 2 * groups + g, g < groups, 0.0)
    m = margin(lost, rounded, of_lost, of_rounded, bias)
    certain = tl.where(g < groups, _lower(best, m).to(tl.int64), NOTHING)
    bound = kth_largest(certain, k, 32)  # NOTHING, which all reach, if there are fewer than k
    reach = order_of(best + m)
    nothing = order_of(float("-inf") + tl.zeros((), tl.float32))
    wanted = ((reach >= bound) & (reach > nothing) & (g < groups)).to(tl.int32)
    listed = tl.sum(wanted)
    tl.debug_barrier()  # all of the maxima are read
    tl.store(own + tl.cumsum(wanted, axis=0) - wanted, g, wanted != 0)
    tl.debug_barrier()

    count = tl.full((), 0, tl.int32)
    PARTS: tl.constexpr = ROUND // GROUP
    for first in range(0, listed, PARTS):
        part = first + tl.arange(0, PARTS)
        group = tl.load(own + part, part < listed, groups)
        f = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (ROUND,))
        inside = f < F
        b = tl.load(bias_ptr + f, inside, 0.0)
        s = tl.load(scores_ptr + row * F + f, inside, 0.0) + b
        w_lost = tl.load(norms_ptr + F + f, inside, 0.0)
        w_rounded = tl.load(norms_ptr + 2 * F + f, inside, 0.0)
        own_m = margin(w_lost, w_rounded, of_lost, of_rounded, of_bias(b, d))
        top = s + own_m
        order = order_of(top)
        passed = inside & (order >= bound) & (order > nothing)
        if mask_ptr is not None:
            passed = passed & (tl.load(mask_ptr + f, inside, 0) != 0)
        one = passed.to(tl.int32)
        place = count + tl.cumsum(one, axis=0) - one
        fits = passed & (place < CAPACITY)
        tl.store(keys_ptr + n * CAPACITY + place, key_of(top, f), fits)
        tl.store(low_ptr + n * CAPACITY + place, of_order(_lower(s, own_m)), fits)
        count += tl.sum(one)
    tl.store(count_ptr + n, count)


class Screen:
    """The selection of a float32 encode whose bf16 product comes in chunks of rows.

    Args:
        x: [N, d] float32, centred.
        W_enc, b_enc: [F, d], [F] float32.
        x_norms, w_norms: [3, N], [3, F] float32 of `bound.norms`.
        k: at most MAX_K.
        mask: [F] bool: only latents with True are chosen.
        capacity: latents of a row that can be told from the k best by float32 alone; a power of
            two. A row with more is scored in full.
    """

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        x_norms: Tensor,
        w_norms: Tensor,
        k: int,
        mask: Tensor | None = None,
        capacity: int = 0,
    ) -> None:
        if k > MAX_K:
            raise ValueError(
                f"topk_encode: k must be at most {MAX_K} in the Triton kernel, got {k}"
            )
        self.x, self.W_enc, self.b_enc, self.k = x, W_enc, b_enc, k
        self.x_norms, self.w_norms = x_norms, w_norms
        self.living = None if mask is None else mask.contiguous().view(torch.int8)
        N, F = len(x), len(W_enc)
        self.group = group_of(F, k)
        self.groups = triton.cdiv(F, self.group)
        self.of_groups = x.new_empty(3, self.groups)
        parts = max(1, 1024 // self.group)
        groups_kernel[(triton.cdiv(self.groups, parts),)](
            w_norms, b_enc, self.of_groups, F, x.shape[1], self.groups, GROUP=self.group,
            PARTS=parts,
        )  # fmt: skip
        capacity = capacity or min(2 * capacity_of(k, 64), 4096)
        self.found = Candidates(
            torch.empty(N + 1, dtype=torch.int32, device=x.device),
            x.new_empty(N, capacity, dtype=torch.int64),
            x.new_empty(N, capacity),
        )

    def select(self, scores: Tensor, first: int) -> None:
        """What of scores [rows, F] float32 can win, those being of x's rows from `first` on."""
        (rows, F), groups, capacity = scores.shape, self.groups, self.found.keys.shape[1]
        tile = max(TILE, self.group)
        maxima = torch.empty(rows, groups, dtype=torch.int32, device=scores.device)
        mask = scores if self.living is None else self.living
        order_maxima_kernel[rows, triton.cdiv(F, tile)](
            scores, scores, scores, self.b_enc, mask, maxima, F, groups, 0.0,
            BIAS=True, MASK=self.living is not None, MODE=MODES["plain"], GROUP=self.group,
            TILE=tile, num_warps=4,
        )  # fmt: skip
        block = triton.next_power_of_2(groups)
        screened_select_kernel[(rows,)](
            scores, self.b_enc, self.living, maxima, self.of_groups, self.w_norms, self.x_norms,
            *self.found, first, len(self.x), F, self.x.shape[1], groups, self.k, GROUP=self.group,
            GROUPS=block, ROUND=max(ROUND, self.group), CAPACITY=capacity,
            num_warps=warps_of(block), **registers(128),
        )  # fmt: skip

    def redone(self) -> Tensor:
        """After `result`: the rows that were scored in full, in any order."""
        return self.rows[: int(self.rows[-1])]

    def result(self) -> tuple[Tensor, Tensor]:
        """Values [N, k] float32 and indices [N, k] int64, when all scores were taken in."""
        N, capacity = self.found.keys.shape
        redone = torch.zeros(N, dtype=torch.int8, device=self.x.device)
        self.rows = rows = torch.zeros(N + 1, dtype=torch.int32, device=self.x.device)
        tau = self.x.new_full((N,), LOWEST.value)  # what was not appended is below all lower ends
        unproven = rows[N:]
        prove_kernel[(N,)](
            tau, *self.found, redone, rows, unproven, self.k, CAPACITY=capacity,
            num_warps=warps_of(capacity),
        )  # fmt: skip
        return rescored(
            self.x, self.W_enc, self.b_enc, self.living, tau, self.found, redone, rows, unproven,
            self.k,
        )  # fmt: skip
