# SPDX-License-Identifier: Apache-2.0
"""Storage types, the types in which sums are kept, modes of a gradient-aware score, and the most
entries of a code."""

from __future__ import annotations

import torch

__all__ = ["accumulator"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = ("additive", "multiplicative", "signed")  # of the score of grad_topk_encode
ENTRIES = 2**31 - 2**12  # flat positions are int32; loops step past the last by less than 2^12


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over tensors of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
