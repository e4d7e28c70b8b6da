# SPDX-License-Identifier: Apache-2.0
"""A code grouped by latent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bridge import DTYPES, pointer
from .calls import _cpu, _Workspace


def group_by_latent(values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    N, k = values.shape
    offsets = values.new_empty(F + 1, dtype=torch.int32)
    order = values.new_empty(N * k, dtype=torch.int32)
    _cpu.group_by_latent(
        N, F, k, DTYPES[values.dtype], pointer(values), pointer(indices), indices.element_size(),
        pointer(offsets), pointer(order), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return offsets, order
