# SPDX-License-Identifier: Apache-2.0
"""How a class of ours is compared with a library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import assert_close
from torch import Tensor, nn

CODES = ("code", "codes", "acts", "f", "encode")  # dense [N, F]


def copies(module: nn.Module, ours: nn.Module) -> None:
    """The same state in both, moved off its symmetric start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    ours.load_state_dict(module.state_dict())


def data(N: int, d: int, seed: int = 0) -> Tensor:
    """Sums of a few fixed directions, so that a curve goes down: [N, d]."""
    generator = torch.Generator().manual_seed(100)
    directions = torch.randn(4 * d, d, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(N, 4 * d, generator=generator)
    return torch.where(weights > 0.95, weights, 0) @ directions


def assert_agree(
    what: str, got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """cases.py's rule for each named tensor; of codes, also the same entries."""
    assert got.keys() == plain.keys() == exact.keys(), what
    for name, value in got.items():
        assert_close(f"{what} {name}", value, plain[name], exact[name])
        if name in CODES:
            assert torch.equal(value != 0, plain[name] != 0), f"{what} {name}: other latents"


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter; zeros where nothing flowed."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


def assert_same_curve(curves: list[list[float]]) -> None:
    """Two losses that never differ by more than 1 %, over at least 50 steps, and go down."""
    theirs, ours = curves
    assert len(theirs) == len(ours) >= 50
    assert theirs[-1] < 0.9 * theirs[0]
    worst = max(abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True))
    assert worst < 0.01, f"curves differ by {worst:.3%}"


def dense(out: tuple[Tensor, Tensor], F: int) -> Tensor:
    """values, indices [N, k] -> [N, F], so that order and zeros do not count."""
    values, indices = out
    return values.new_zeros(*values.shape[:-1], F).scatter(-1, indices, values)


def build(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` returns from a fixed seed."""
    torch.manual_seed(seed)
    return make()
