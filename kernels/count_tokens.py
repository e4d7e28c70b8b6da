# SPDX-License-Identifier: Apache-2.0
"""The counters of a step: tokens since each latent fired, and how many of them are dead.

Each program counts its run of latents, and one more adds the counts. Bytes: 20 a latent.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16 if triton.knobs.runtime.interpret else 1024  # latents of a program
COUNTS = 4 if triton.knobs.runtime.interpret else 1024  # of programs, added at a time


@triton.jit
def count_kernel(
    taken_ptr,  # int8
    offsets_ptr,  # [F + 1] int32
    since_ptr,  # [F] int64
    counts_ptr,  # [2, programs] int64: dead before, soon dead
    F, tokens, dead_after, within,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < F
    taken = tl.load(taken_ptr) != 0
    before = tl.load(since_ptr + i, inside, 0)
    fired = tl.load(offsets_ptr + i, inside, 0) < tl.load(offsets_ptr + i + 1, inside, 0)
    after = tl.where(taken, tl.where(fired, 0, before + tokens), before)
    tl.store(since_ptr + i, after, inside)
    here = counts_ptr + tl.program_id(0)
    tl.store(here, tl.sum((inside & (before > dead_after)).to(tl.int64), axis=0))
    soon = inside & (after > dead_after - within)
    tl.store(here + tl.num_programs(0), tl.sum(soon.to(tl.int64), axis=0))


@triton.jit
def add_kernel(
    counts_ptr, taken_ptr, offsets_ptr,
    t_ptr,  # float64
    l0_ptr, dead_ptr,  # float32
    soon_ptr,  # int64
    F, tokens, programs,
    COUNTS: tl.constexpr,
):  # fmt: skip
    dead = tl.zeros((COUNTS,), tl.int64)
    soon = tl.zeros((COUNTS,), tl.int64)
    for first in range(0, programs, COUNTS):
        i = first + tl.arange(0, COUNTS)
        dead += tl.load(counts_ptr + i, i < programs, 0)
        soon += tl.load(counts_ptr + programs + i, i < programs, 0)
    entries = tl.load(offsets_ptr + F).to(tl.float32)
    tl.store(l0_ptr, tl.div_rn(entries, (tokens + tl.zeros_like(entries)).to(tl.float32)))
    share = tl.sum(dead, axis=0).to(tl.float32)
    tl.store(dead_ptr, tl.div_rn(share, (F + tl.zeros_like(share)).to(tl.float32)))
    tl.store(soon_ptr, tl.sum(soon, axis=0))
    tl.store(t_ptr, tl.load(t_ptr) + tl.load(taken_ptr))


def count_tokens(
    loss: Tensor,
    taken: Tensor,
    offsets: Tensor,
    since: Tensor,
    t: Tensor,
    tokens: int,
    dead_after: int,
    within: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    F = since.numel()
    programs = triton.cdiv(F, BLOCK)
    counts = since.new_empty(2, programs)
    l0, dead, soon = torch.empty_like(loss), torch.empty_like(loss), since.new_empty(())
    flag = taken.view(torch.int8)
    count_kernel[(programs,)](
        flag, offsets, since, counts, F, tokens, dead_after, within, BLOCK=BLOCK
    )
    add_kernel[(1,)](counts, flag, offsets, t, l0, dead, soon, F, tokens, programs, COUNTS=COUNTS)
    return l0, dead, soon
