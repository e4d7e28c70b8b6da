# SPDX-License-Identifier: Apache-2.0
"""Batches and initial weights: functions of a seed, so every process makes the same ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]  # W_enc [F, d], b_enc [F], W_dec [F, d], b_dec [d], float32


def batches(kind: str, N: int, d: int, count: int, seed: int = 0) -> list[Tensor]:
    """`count` batches [N, d] float32.

    kind: "normal", iid N(0, 1); "planted", sums of 32 of 4d random directions, the first far more
    frequent than the last, plus noise and a mean; or the path of a .npy file [rows, d], of which
    random rows are taken. Never zeros: selection takes a time that depends on the data.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return [torch.randn(N, d, generator=generator) for _ in range(count)]
    if kind == "planted":
        return _planted(N, d, count, generator)
    stored = np.load(kind, mmap_mode="r")
    if stored.ndim != 2 or stored.shape[1] != d:
        raise SystemExit(f"{kind} must be of shape [rows, {d}], got {list(stored.shape)}")
    rows = torch.randint(len(stored), (count, N), generator=generator).numpy()
    return [torch.from_numpy(np.asarray(stored[i], dtype=np.float32)) for i in rows]


def _planted(N: int, d: int, count: int, generator: torch.Generator) -> list[Tensor]:
    directions = torch.randn(4 * d, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    mean = torch.randn(d, generator=generator)
    frequency = 1 / (10 + torch.arange(4 * d, dtype=torch.float32))
    made = []
    for _ in range(count):
        active = torch.multinomial(frequency.expand(N, -1), 32, generator=generator)  # [N, 32]
        size = 1 + torch.randn(N, 32, generator=generator).abs()
        code = torch.zeros(N, 4 * d).scatter_(1, active, size)
        noise = 0.1 * torch.randn(N, d, generator=generator)
        made.append(code @ directions + mean + noise)
    return made


def initial_weights(F: int, d: int, seed: int = 0) -> Weights:
    """Tied unit rows and zero biases, where all contestants start."""
    generator = torch.Generator().manual_seed(seed + 1)
    W = torch.randn(F, d, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    return {"W_enc": W, "b_enc": torch.zeros(F), "W_dec": W, "b_dec": torch.zeros(d)}


@torch.no_grad()
def fill(module: nn.Module, weights: Weights) -> None:
    """Copy weights into the parameters of these names."""
    for name, value in weights.items():
        module.get_parameter(name).copy_(value)


def total_variance(x: Tensor) -> float:
    x = x.double()
    return float((x - x.mean(0)).square().sum())
