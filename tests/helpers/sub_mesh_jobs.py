# SPDX-License-Identifier: Apache-2.0
"""Jobs for `ranks.Pool`: coders on meshes that some of the processes are not in."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from rank_cases import CASES, make, rows
from torch import Tensor
from training import LR

import ksae


def train(
    group: Any, case: str, mesh: list[Any], replicas: int | None, steps: int
) -> tuple[list[float], dict[str, Tensor]] | None:
    """Losses, and what the whole coder holds then, on the first process of the mesh; None of one
    that is not in it."""
    made = dist.DeviceMesh("cpu", mesh)  # by all processes
    members = made.mesh.flatten().tolist()
    if dist.get_rank() not in members:
        return None
    part = ksae.shard(make(case), made, replicas=replicas)
    step, losses, place = ksae.TrainStep(part, LR, **CASES[case][2]), [], dist.get_rank()
    for t in range(steps):
        own = (b.chunk(len(members))[members.index(place)] for b in rows(case, t))
        losses.append(float(step(*own)["loss"]))
    whole = ksae.unshard(part)
    return losses, {} if whole is None else dict(whole.state_dict())
