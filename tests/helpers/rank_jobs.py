# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a test do: jobs for `ranks.Pool`, called on every rank with its group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from training import CASES, LR, batch, build

import ksae
from ksae.coders.coder import SparseCoder
from ksae.parallel.shards import Shards


def make(case: str) -> SparseCoder:
    kind, settings, _ = CASES[case]
    settings = dict(settings)
    every = settings.pop("dead", None)
    model = build(kind, torch.float32, **settings)
    if every:
        model.tokens_since_fired[::every] = model.dead_after + 1
    return model


def rows(case: str, t: int) -> list[Tensor]:
    """The batch of step t: tokens that divide by 2, 3 and 4."""
    return [b[:60] for b in batch(CASES[case][0], seed=10 + 2 * t)]


def own(group: Any, t: Tensor) -> Tensor:
    """This rank's part of the rows of all."""
    n = len(t) // dist.get_world_size(group)
    return t[dist.get_rank(group) * n :][:n]


def train(group: Any, case: str, steps: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of each step, and on rank 0 what the whole coder holds then."""
    part = ksae.shard(make(case), group)
    step = ksae.TrainStep(part, LR, **CASES[case][2])
    metrics = []
    for t in range(steps):
        taken = step(*(own(group, b) for b in rows(case, t)))
        metrics.append({name: float(value) for name, value in taken.items()})
    whole = ksae.unshard(part)
    return metrics, {} if whole is None else dict(whole.state_dict())


def select(
    group: Any, F: int, k: int, x: Tensor, W: Tensor, b: Tensor, dtype: torch.dtype
) -> list[tuple[int, int, float]]:
    """Token, latent and value of each entry of value other than 0 that this rank's latents have."""
    torch.manual_seed(0)
    sae = ksae.TopKSAE(x.shape[1], F, k, dtype=dtype)
    with torch.no_grad():
        sae.W_enc.copy_(W)
        sae.b_enc.copy_(b)
    part = ksae.shard(sae, group)
    ranks = part.ranks
    assert isinstance(ranks, Shards)
    every = ranks.gather(own(group, x).to(dtype))
    chosen = part.select(every, min(k, len(part.W_enc)), None)
    (code,) = ranks.codes(*chosen, [k])
    n, j = (code.values != 0).nonzero(as_tuple=True)
    latents = code.indices[n, j] * ranks.size + ranks.rank
    return list(zip(n.tolist(), latents.tolist(), code.values[n, j].tolist(), strict=True))


def count_bytes(group: Any, sizes: tuple[int, ...], dtype: str) -> tuple[dict[str, int], int]:
    """What each exchange of one step has sent, and of how many tokens a rank."""
    n, d, F, k = sizes
    torch.manual_seed(0)
    part = ksae.shard(ksae.TopKSAE(d, F, k, dtype=dtype), group)
    step = ksae.TrainStep(part)
    part.ranks.bytes.clear()
    torch.manual_seed(dist.get_rank(group))
    step(torch.randn(n, d))
    return dict(part.ranks.bytes), n
