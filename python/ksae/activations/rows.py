# SPDX-License-Identifier: Apache-2.0
"""Copying rows and checking them, without torch's thread pool.

These run in the prefetching thread beside a training step. torch would start a second team of
OpenMP threads there, which then spins on the cores the step needs; NumPy stays on its own thread.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ksae.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Rows = NDArray[np.int64]


def _bits(x: Tensor) -> NDArray[np.generic]:
    """A CPU tensor as an array; 16-bit floats as bit patterns, since NumPy has no bfloat16."""
    sixteen = x.dtype in (torch.float16, torch.bfloat16)
    array: NDArray[np.generic] = (x.view(torch.int16) if sixteen else x).numpy()
    return array


def take(x: Tensor, rows: Rows) -> Tensor:
    """`x[rows]` as a new tensor."""
    if x.device.type != "cpu":
        return x[torch.from_numpy(rows).to(x.device)]
    return torch.from_numpy(_bits(x).take(rows, axis=0)).view(x.dtype)


def all_finite(x: Tensor) -> bool:
    """True if no element is NaN or infinite, in one read of `x`."""
    if x.device.type != "cpu":
        return bool(torch.isfinite(x).all())
    if x.dtype in (torch.float16, torch.bfloat16):
        # NaN and inf are the patterns whose exponent bits are all set.
        exponent = 0x7C00 if x.dtype == torch.float16 else 0x7F80
        patterns = _bits(x).view(np.uint16)
        return patterns.size == 0 or int((patterns & 0x7FFF).max()) < exponent
    with np.errstate(all="ignore"):
        # A NaN or inf always survives a sum; a sum of finite values may overflow, hence the retry.
        array = _bits(x)
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def check_finite(x: Tensor, rows: Rows, what: str) -> None:
    """Raise naming the first bad row. `rows` are the row numbers of `x`, [N]."""
    if all_finite(x):
        return
    bad = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
    raise UserError(
        f"{what}: row {int(rows[bad])} holds a non-finite activation; remove such rows, "
        "or harvest again in float32"
    )
