# SPDX-License-Identifier: Apache-2.0
"""What makes codes sparse where no k does: thresholds that learn, gates, and penalties.

E entries of N tokens. Plain torch, differentiable; everything is in the accumulator's type. Where a
gradient is an estimate, the formula adds `estimate * (t - t.detach())`, which is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def jump_relu(
    u: Tensor,  # [E] pre-activations
    theta: Tensor,  # [E] thresholds of their latents, finite
    bandwidth: float,
) -> Tensor:
    """u 1[u > theta], whose gradient for theta is estimated as -theta / bandwidth K(t): [E].

    t = (u - theta) / bandwidth; K, a rectangle, is 1 on |t| < 1/2 (arXiv 2407.14435).
    """
    near = (u - theta).abs() < bandwidth / 2
    estimate = torch.where(near, -theta / bandwidth, 0).detach()
    return torch.where(u > theta, u, 0) + estimate * (theta - theta.detach())


def step(u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1[u > theta] of [E] each, whose gradient for theta is estimated as -1 / bandwidth K(t); u has
    none."""
    near = (u - theta).abs() < bandwidth / 2
    estimate = near.to(theta.dtype) * (-1 / bandwidth)
    return (u > theta).to(theta.dtype) + estimate * (theta - theta.detach())


def gated(
    gate: Tensor,  # [E] p + b_gate, above 0
    b_gate: Tensor,  # [E] of their latents, as the next two
    r_mag: Tensor,
    b_mag: Tensor,
) -> Tensor:
    """The magnitude relu(exp(r_mag) p + b_mag) of open gates (arXiv 2404.16014): [E]."""
    return (r_mag.exp() * (gate - b_gate) + b_mag).relu()


def l0_penalty(active: Tensor, coefficient: float, target: float | None) -> Tensor:
    """coefficient * L0, or coefficient * (L0 / target - 1)^2, of the mean number of active latents
    a token []: []."""
    if target is None:
        return coefficient * active
    return coefficient * (active / target - 1).square()


def tanh_penalty(values: Tensor, norms: Tensor, N: int, scale: float) -> Tensor:
    """The mean over N tokens of the sum of tanh(scale * value * norm) over entries [E]: []."""
    return (scale * values * norms).tanh().sum() / max(N, 1)


def power_penalty(
    values: Tensor,  # [E], > 0 where they count
    norms: Tensor | None,  # [E] of the decoder rows of their latents; None: 1
    rows: Tensor,  # [E] int64, their tokens
    N: int,
    p: float,  # in (0, 1]
    root: bool,
) -> Tensor:
    """The mean over N tokens of the sum of (value * norm)^p, or of its power 1/p: [].

    p = 1 is the L1 norm. An entry with value 0, where p < 1 has no derivative, passes none.
    """
    scaled = values if norms is None else values * norms
    positive = scaled > 0
    powers = torch.where(positive, torch.where(positive, scaled, 1) ** p, 0) if p < 1 else scaled
    if p == 1 or not root:
        return powers.sum() / max(N, 1)
    sums = powers.new_zeros(N).index_add(0, rows, powers)
    some = sums > 0
    roots = torch.where(some, torch.where(some, sums, 1) ** (1 / p), 0)
    return roots.sum() / max(N, 1)
