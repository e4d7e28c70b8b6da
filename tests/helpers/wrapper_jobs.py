# SPDX-License-Identifier: Apache-2.0
"""Jobs for `ranks.Pool`: modules in the wrappers of torch.distributed, trained by torch.optim."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from rank_cases import make, rows
from rank_jobs import own
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import ksae
from ksae.coders.coder import SparseCoder


def model_of(case: str) -> SparseCoder:
    torch.manual_seed(0)
    return make(case)


def batch_of(case: str, t: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    if case != "gradient":
        return rows(case, t), {}
    (x,) = rows("plain", t)
    return [x], {"grad": x.flip(1)}


def wrapped(
    group: Any, case: str, how: str, steps: int, variance: bool = True
) -> tuple[list[float], dict[str, Tensor]]:
    """This rank's losses, and buffers and whole parameters after the steps."""
    model = ksae.count_over_ranks(model_of(case), group, global_variance=variance)
    net: nn.Module = model
    if how == "ddp":
        net = DistributedDataParallel(model, process_group=group)
    elif how == "fsdp1":
        options: Any = {"process_group": group, "device_id": torch.device("cpu")}
        net = FullyShardedDataParallel(model, use_orig_params=True, **options)
    else:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.05), []
    for t in range(steps):
        inputs, more = batch_of(case, t)
        out = net(*(own(group, b) for b in inputs), **{n: own(group, g) for n, g in more.items()})
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    if how == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(net):
            return losses, {n: t.clone() for n, t in model.state_dict().items()}
    state = model.state_dict()
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    return losses, whole


def thresholds(group: Any, steps: int) -> list[float]:
    """BatchTopK's threshold after each step."""
    model = ksae.count_over_ranks(model_of("batch"), group)
    net = DistributedDataParallel(model, process_group=group)
    found = []
    for t in range(steps):
        net(own(group, rows("batch", t)[0]))
        found.append(float(model.get_buffer("threshold")))
    return found


def refused(group: Any, how: str) -> None:
    sae: Any = model_of("plain")
    match how:
        case "shard":
            sae = ksae.shard(sae, group)
        case "2-d":
            group = dist.init_device_mesh("cpu", (1, 2))
    ksae.count_over_ranks(sae, 3 if how == "type" else group)
