# SPDX-License-Identifier: Apache-2.0
"""Options of a launch."""

from __future__ import annotations

import torch


def registers(most: int) -> dict[str, int]:
    """Lets a thread have `most` registers.

    Left alone, ptxas aims at one more warp on a multiprocessor and spills a number or two for it.
    """
    return {} if torch.version.hip else {"maxnreg": most}


def warps_of(keys: int) -> int:
    """Warps of a program that holds so many keys: up to 16 warps, a thread has 16 of them."""
    return min(16, max(4, keys // 512))
