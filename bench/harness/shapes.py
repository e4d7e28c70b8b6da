# SPDX-License-Identifier: Apache-2.0
"""Named shapes of SAEs on well-known models, scaled to the memory and the time there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

TOKENS = 2048  # a batch, before scaling


@dataclass(frozen=True)
class Shape:
    """A training step's shape, and how it came about."""

    name: str
    N: int
    d: int
    F: int
    k: int
    scaling: str = ""

    def __str__(self) -> str:
        return f"{self.name}: N={self.N} d={self.d} F={self.F} k={self.k}"

    @property
    def flops(self) -> float:
        """Of one dense product."""
        return 2.0 * self.N * self.d * self.F

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.N, "d": self.d, "F": self.F, "k": self.k}


NAMED = (
    Shape("GPT-2 small", TOKENS, 768, 24576, 32),
    Shape("GPT-2 small, k=64", TOKENS, 768, 16384, 64),
    Shape("Pythia-410M", TOKENS, 1024, 65536, 32),
    Shape("Gemma-2-2B", TOKENS, 2304, 65536, 64),
    Shape("Llama-3.1-8B", TOKENS, 4096, 131072, 64),
)


def memory_of(shape: Shape, contestants: int) -> int:
    """Bytes of so many contestants at once: parameters, gradients and both moments of each in
    float32, and for the one that steps three N x F matrices of dense torch."""
    model = 4 * 2 * shape.F * shape.d * 4
    return contestants * model + 3 * 4 * shape.N * shape.F


def scaled(shape: Shape, contestants: int, memory: int, flops: float) -> Shape:
    """F halved until the contestants fit in `memory` bytes, then N halved until one product has at
    most `flops`; N stays at 64 or above, and F at or above 32 k, where it is halved on for time."""
    now = shape
    while memory_of(now, contestants) > memory and _halvable(now):
        now = _with(now, F=now.F // 2)
    why = [f"F {shape.F} -> {now.F} for {memory / 1e9:.1f} GB"] if now.F < shape.F else []
    for_memory = now.F
    while now.flops > flops:
        if now.N > 256 or (not _halvable(now) and now.N > 64):
            now = _with(now, N=now.N // 2)
        elif _halvable(now):
            now = _with(now, F=now.F // 2)
        else:
            break
    if now.N < shape.N:
        why.append(f"N {shape.N} -> {now.N} for time")
    if for_memory > now.F:
        why.append(f"F {for_memory} -> {now.F} for time")
    return _with(now, scaling=", ".join(why) or "as it is")


def _halvable(shape: Shape) -> bool:
    """Whether half the latents are still many beside k."""
    return 64 * shape.k <= shape.F


def _with(shape: Shape, *, N: int = 0, F: int = 0, scaling: str = "") -> Shape:
    return Shape(shape.name, N or shape.N, shape.d, F or shape.F, shape.k, scaling)


def available_memory(device: str) -> int:
    """Bytes that are free now; on Linux and CUDA, elsewhere 8 GB."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 * 10**9
