# SPDX-License-Identifier: Apache-2.0
"""Tokens grouped by latent (CSC): keys, torch's stable sort, boundaries.

A stable sort of the latents keeps the entries of one latent in the order of tokens, so the result
is the same on every run; no atomics, and nothing waits for the device.

Bytes: the code once, torch's radix sort of N k pairs of (int32, int64), N k + F + 1 positions.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def keys_kernel(
    values_ptr,  # [entries] T
    indices_ptr,  # [entries] int64 or int32
    latent_ptr,  # [entries] int32
    entries, F,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The latent of each entry; F, past all of them, for a value of 0."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(values_ptr + e, e < entries, 0.0).to(tl.float32) != 0  # NaN counts
    latent = tl.load(indices_ptr + e, e < entries, 0).to(tl.int32)
    tl.store(latent_ptr + e, tl.where(used, latent, F), e < entries)


@triton.jit
def bounds_kernel(
    latent_ptr,  # [entries] int32, ascending
    offsets_ptr,  # [F + 1] int32
    entries, F, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """offsets[i]: the first entry whose latent is not below i, by bisection."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int64)  # entries before low are below i, those from high on are not
    high = low + entries
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(latent_ptr + middle, low < high, 0).to(tl.int64) < i
        below &= low < high
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(offsets_ptr + i, low.to(tl.int32), i <= F)


@triton.jit
def order_kernel(
    latent_ptr,  # [entries] int32, ascending
    position_ptr,  # [entries] int64
    order_ptr,  # [entries] int32
    entries, F,
    BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(latent_ptr + e, e < entries, 0) < F
    position = tl.load(position_ptr + e, e < entries, 0).to(tl.int32)
    tl.store(order_ptr + e, tl.where(used, position, -1), e < entries)


def group_by_latent(values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Entries [N, k] with value != 0 by latent -> offsets [F+1] int32, order [N*k] int32."""
    entries = values.numel()
    latent = torch.empty(entries, dtype=torch.int32, device=values.device)
    offsets = torch.empty(F + 1, dtype=torch.int32, device=values.device)
    order = torch.empty_like(latent)
    if entries == 0:
        return offsets.zero_(), order
    blocks = triton.cdiv(entries, BLOCK)
    keys_kernel[(blocks,)](values, indices, latent, entries, F, BLOCK=BLOCK)
    latent, position = latent.sort(stable=True)
    order_kernel[(blocks,)](latent, position, order, entries, F, BLOCK=BLOCK)
    bounds_kernel[(triton.cdiv(F + 1, BLOCK),)](
        latent, offsets, entries, F, entries.bit_length(), BLOCK=BLOCK
    )
    return offsets, order
