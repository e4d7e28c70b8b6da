# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a test do: jobs for `ranks.Pool`, called on every rank with its group."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import CASES, make, rows
from torch import Tensor
from training import LR

import ksae
import ksae.parallel.shard
from ksae.parallel import checkpoint, cost
from ksae.parallel.shards import Shards


def own(group: Any, t: Tensor) -> Tensor:
    """This rank's part of the rows of all."""
    n = len(t) // dist.get_world_size(group)
    return t[dist.get_rank(group) * n :][:n]


def train(
    group: Any, case: str, steps: int, replicas: int = 1
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of each step, and on rank 0 what the whole coder holds then."""
    part = ksae.shard(make(case), group, replicas=replicas)
    step = ksae.TrainStep(part, LR, **CASES[case][2])
    metrics = []
    for t in range(steps):
        taken = step(*(own(group, b) for b in rows(case, t)))
        metrics.append({name: float(value) for name, value in taken.items()})
    whole = ksae.unshard(part)
    return metrics, {} if whole is None else dict(whole.state_dict())


def train_by_gradient(
    group: Any, steps: int, replicas: int = 1
) -> tuple[list[dict[str, float]], tuple[Tensor, Tensor]]:
    """Metrics of each step, and the running norm of gradients."""
    torch.manual_seed(0)
    part = ksae.shard(make("gradient"), group, replicas=replicas)
    step = ksae.TrainStep(part, LR, clip_norm=1.0)
    metrics = []
    for t in range(steps):
        x = own(group, rows("plain", t)[0])
        metrics.append({n: float(v) for n, v in step(x, grad=x.flip(1)).items()})
    return metrics, (part.get_buffer("grad_rows"), part.get_buffer("grad_square"))


def train_in(group: Any, kind: str, steps: int, replicas: int = 1) -> list[float]:
    """Losses of a coder with weights of 16 bits."""
    whole = make("more dead than k_aux").to(getattr(torch, kind))
    part = ksae.shard(whole, group, replicas=replicas)
    step = ksae.TrainStep(part, LR)
    return [float(step(own(group, rows("plain", t)[0]))["loss"]) for t in range(steps)]


def select(
    group: Any, k: int, x: Tensor, W: Tensor, b: Tensor, by: float | ksae.BatchTopK | None
) -> list[tuple[int, int, float]]:
    """Token, latent and value of each entry of value other than 0 that this rank's latents have;
    by: TopK, GradTopK of that beta, or BatchTopK."""
    torch.manual_seed(0)
    of: Any = (x.shape[1], len(W))
    if isinstance(by, float):
        sae: Any = ksae.GradTopKSAE(*of, k, dtype=x.dtype, beta=by)
    else:
        sae = ksae.SAE(*of, ksae.TopK(k) if by is None else by, dtype=x.dtype)
    with torch.no_grad():
        sae.W_enc.copy_(W)
        sae.W_dec.copy_(W.flip(1))
        sae.b_enc.copy_(b)
    part = ksae.shard(sae, group)
    ranks = part.ranks
    assert isinstance(ranks, Shards)
    every = ranks.gather(own(group, x))
    grad = x.flip(0) if isinstance(by, float) else None
    (chosen,) = ranks.select(part, every, min(k, len(part.W_enc)), 0, grad, ())
    (code,) = ranks.codes(*chosen, [k])
    at = code.values != 0
    latents = code.indices[at] * ranks.size + ranks.rank
    tokens, values = code.rows()[at].tolist(), code.values[at].tolist()
    return list(zip(tokens, latents.tolist(), values, strict=True))


def count_bytes(
    group: Any, s: cost.Sizes, prefixes: list[int] | None = None
) -> tuple[dict[str, int], int]:
    """What each exchange of one step has sent, and bytes of parameters, counters and state."""
    n, d, F, k = s.n, s.d, s.F, s.k
    torch.manual_seed(0)
    activation = ksae.BatchTopK(k) if s.batch else ksae.TopK(k)
    dtype = {4: "float32", 2: "bfloat16"}[s.itemsize]
    sae = ksae.SAE(d, F, activation, prefixes=prefixes, dtype=dtype)
    part = ksae.shard(sae, group, replicas=s.replicas)
    step = ksae.TrainStep(part)
    part.ranks.bytes.clear()
    torch.manual_seed(dist.get_rank(group))
    step(torch.randn(n, d))
    tensors = [*part.state_dict().values(), *step.state_dict().values()]
    return dict(part.ranks.bytes), sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------------------------------- bad input


def differ(group: Any, how: str) -> None:
    """Rank 1 differs from the others."""
    odd = dist.get_rank(group) == 1
    torch.manual_seed(odd and how == "seed")
    if odd and how == "version":
        ksae.parallel.shard.VERSION = "0.0"  # type: ignore[attr-defined]
    try:
        k = 6 if odd and how == "k" else 5
        part = ksae.shard(ksae.TopKSAE(8, 40, k), "world" if odd and how == "mesh" else group)
        lr = -1.0 if odd and how == "bad lr" else 1e-3
        betas = (0.5, 0.9) if odd and how == "betas" else (0.9, 0.999)
        step = ksae.TrainStep(part, lr, betas=betas)
        if odd and how == "lr":
            step.lr = 1e-4
        x = torch.randn(7 if odd and how == "rows" else 6, 9 if odd and how == "width" else 8)
        step(x, torch.zeros(6, 8) if odd and how == "y" else None)
    finally:
        ksae.parallel.shard.VERSION = ksae.__version__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class OtherTopK(ksae.TopK):
    """Whatever it selects."""


def refused(group: Any, how: str) -> None:
    """All ranks ask for what there is not."""
    torch.manual_seed(0)
    mesh: Any = group
    sae = ksae.TopKSAE(8, 2 if how == "few" else 40, 2)
    match how:
        case "float64":
            sae.double()
        case "activation":
            sae.activation = OtherTopK(2)
        case "relu":
            sae = ksae.SAE(8, 40, ksae.ReLU())
        case "tanh":
            sae = ksae.SAE(8, 40, ksae.JumpReLU(penalty="tanh"))
        case "batch":
            sae = ksae.SAE(8, 40, ksae.BatchTopK(2), dtype=torch.bfloat16)
        case "abs":
            sae = ksae.SAE(8, 40, ksae.AbsTopK(2), dtype=torch.bfloat16)
        case "norm":
            sae = ksae.SAE(8, 40, ksae.NormTopK(2))
        case "3-d":
            mesh = dist.init_device_mesh("cpu", (2, 2, 1))
        case "type":
            mesh = 4
    part = ksae.shard(sae, mesh, replicas=3 if how == "replicas" else None)
    match how:
        case "twice":
            ksae.shard(part, mesh)
        case "autograd":
            ksae.TrainStep(part, fused=False)
        case "forward":
            part(torch.zeros(3, 8))
        case "save":
            part.save("x.safetensors")


def on_a_mesh(group: Any) -> list[tuple[int, int]]:
    """Rank among the shards, and latents: of a mesh of one and of two dimensions."""
    torch.manual_seed(0)
    sae, found = ksae.TopKSAE(8, 41, 2), []
    for shape in ((4,), (2, 2)):
        part = ksae.shard(sae, dist.init_device_mesh("cpu", shape))
        found.append((part.ranks.rank, len(part.W_enc)))
    return found


def nothing(group: Any) -> None:
    """Once all processes have started."""


def odd_mesh(group: Any, how: str) -> None:
    """Rank 1 has another mesh than the others."""
    torch.manual_seed(0)
    odd, half = dist.get_rank(group) == 1, dist.new_group([0, 1])
    match how:
        case "no mesh":
            mesh = "world" if odd else None
        case "a part":
            mesh = half if odd else None
        case "not in it":
            others = dist.DeviceMesh("cpu", [0, 2])
            mesh = others if odd else group
        case _:
            mesh = None
    replicas = 3 if how == "replicas" and odd else 1
    ksae.shard(ksae.TopKSAE(8, 40, 2), mesh, replicas=replicas)


def from_meta(group: Any) -> tuple[list[int], float]:
    """The shapes of a part that was never whole, and its loss after some steps over the first."""
    with torch.device("meta"):
        sae = ksae.TopKSAE(8, 41, 5)
    torch.manual_seed(0)
    part = ksae.shard(sae, group)
    step = ksae.TrainStep(part, 1e-2)
    torch.manual_seed(dist.get_rank(group))
    x = torch.randn(30, 8)
    losses = [float(step(x)["loss"]) for _ in range(30)]
    return [*part.W_enc.shape, part.d_sae], losses[-1] / losses[0]


def silent(group: Any, how: str) -> None:
    """Rank 1 ends, or does not come, before a step."""
    torch.manual_seed(0)
    part = ksae.shard(ksae.TopKSAE(8, 40, 2), group)
    step = ksae.TrainStep(part)
    step(torch.randn(6, 8))
    if dist.get_rank(group) == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return
    step(torch.randn(6, 8))


# -------------------------------------------------------------------------------------- checkpoints


def save_half_way(group: Any, case: str, folder: str, replicas: int = 1) -> list[float]:
    """Four steps, a checkpoint, and the losses of four more."""
    part = ksae.shard(make(case), group, replicas=replicas)
    step = ksae.TrainStep(part, LR, **CASES[case][2])
    for t in range(4):
        step(*(own(group, b) for b in rows(case, t)))
    checkpoint.save_sharded(folder, part, step, {"t": 4})
    return [float(step(*(own(group, b) for b in rows(case, t)))["loss"]) for t in range(4, 8)]


def go_on(group: Any, case: str, folder: str, replicas: int = 1) -> list[float]:
    """The losses of four steps from a checkpoint on."""
    part = ksae.shard(make(case), group, replicas=replicas)
    step = ksae.TrainStep(part, LR, **CASES[case][2])
    assert checkpoint.load_sharded(folder, part, step) == {"t": 4}
    return [float(step(*(own(group, b) for b in rows(case, t)))["loss"]) for t in range(4, 8)]
