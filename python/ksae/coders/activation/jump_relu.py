# SPDX-License-Identifier: Apache-2.0
"""JumpReLU: pre-activations above a learned threshold of each latent (arXiv 2407.14435)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ... import functional
from ...ops import accumulator
from .base import Activation

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder

PENALTIES = ("l0", "target_l0", "tanh")


@dataclass(frozen=True)
class JumpReLU(Activation):
    """u where u > theta, theta = exp(log_threshold) a parameter [F], beside the loss a penalty.

    Gradients of theta are straight-through estimates with the rectangle kernel K(t) = 1 on
    |t| < 1/2, t = (u - theta) / bandwidth: of u 1[u > theta] it is -theta / bandwidth K(t), and of
    the step 1[u > theta], which has no gradient for u, -1 / bandwidth K(t).

    Args:
        coefficient: lambda, >= 0, the weight of the penalty.
        penalty: "l0", lambda L0, with L0 the mean number of active latents a token; "target_l0",
            lambda (L0 / target - 1)^2 (as dictionary_learning); "tanh", lambda times the mean over
            tokens of sum tanh(tanh_scale f |W_dec[i]|) (as SAELens).
        target: L0 that "target_l0" aims at.
        bandwidth: of the kernel. theta: all thresholds at the start. Both above 0.
        tanh_scale: of "tanh".
        pre_act: weight >= 0 of the mean over tokens of sum relu(theta - u) |W_dec[i]| over dead
            latents (as SAELens, 3e-6 there): dense over these.

    A training code holds the entries below theta within half a bandwidth as well, with value 0.
    Where parameters are of 16 bits, training compares u rounded to that type.

    Raises:
        ValueError: by the coder, an argument out of range.
    """

    coefficient: float = 1e-3
    penalty: str = "l0"
    target: float | None = None
    bandwidth: float = 1e-3
    theta: float = 1e-3
    tanh_scale: float = 4.0
    pre_act: float = 0.0

    k: ClassVar[int] = 0  # type: ignore[misc]
    ragged: ClassVar[bool] = True
    penalized: ClassVar[bool] = True

    def check(self, owner: str, F: int) -> None:
        if self.penalty not in PENALTIES:
            wanted = ", ".join(PENALTIES)
            raise ValueError(f"{owner}: penalty must be one of {wanted}, got {self.penalty!r}")
        for name in ("coefficient", "pre_act"):
            if not 0 <= getattr(self, name) < math.inf:
                got = getattr(self, name)
                raise ValueError(f"{owner}: {name} must be a finite number >= 0, got {got}")
        above = ["bandwidth", "theta", "tanh_scale"]
        above += ["target"] if self.penalty == "target_l0" else []
        for name in above:
            value = getattr(self, name)
            if value is None or not 0 < value < math.inf:
                raise ValueError(f"{owner}: {name} must be a finite number > 0, got {value}")

    def parameters(self, F: int, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        start = torch.full((F,), math.log(self.theta), dtype=acc, device=device)
        return {"log_threshold": start}

    @property
    def fused_refuses(self) -> str | None:
        if self.penalty == "tanh":
            return "penalty='tanh'"
        return "pre_act > 0" if self.pre_act else None

    def thresholds(self, coder: SparseCoder) -> Tensor:
        """theta [F] in the accumulator's type."""
        log: Tensor = coder.get_parameter("log_threshold")
        return log.to(accumulator(log.dtype)).exp()

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        theta = self.thresholds(coder)
        low = theta.detach() - self.bandwidth / 2
        b_dec = coder.b_dec if coder.centred else None
        u, indices, offsets = functional.threshold_encode(
            rows, coder.W_enc, coder.b_enc, low, b_dec
        )
        values: Tensor = _Jump.apply(u, theta[indices], self.bandwidth)  # type: ignore[no-untyped-call]
        return values, indices, offsets

    def select_aux(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        return (*self.select(coder, rows, k, grad), *coder.encode_dead(rows, k_aux))

    def infer(self, coder: SparseCoder, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
        theta, b_dec = self.thresholds(coder).detach(), coder.b_dec if coder.centred else None
        return functional.threshold_encode(rows, coder.W_enc, coder.b_enc, theta, b_dec)

    def in_band(self, values: Tensor, theta: Tensor) -> Tensor:
        """Entries of a training code whose u is within half a bandwidth of theta [E]: all that are
        below it are."""
        return (values == 0) | (values.to(theta.dtype) - theta < self.bandwidth / 2)

    def penalty_of(self, coder: SparseCoder, rows: Tensor, code: Code) -> Tensor:
        """Beside the loss, 0-d, differentiable: of the training code of rows [N, d_in]."""
        N = max(len(rows), 1)
        theta = self.thresholds(coder)
        if self.penalty == "tanh":
            norm = coder.W_dec.to(theta.dtype).norm(dim=1)[code.indices]
            scaled = self.tanh_scale * code.values.to(theta.dtype) * norm
            total: Tensor = self.coefficient * scaled.tanh().sum() / N
        else:
            at = theta[code.indices]
            steps = _Step.apply(  # type: ignore[no-untyped-call]
                code.values.detach(), at, self.in_band(code.values.detach(), at.detach()),
                self.bandwidth,
            )  # fmt: skip
            total = self.weigh(steps.sum() / N)[0]
        if self.pre_act and bool((dead := coder.dead).any()):
            total = total + self.pre_act * self._pre_act(coder, rows, theta, dead) / N
        return total

    def weigh(self, l0: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty of a mean number of active latents [], and its derivative []."""
        if self.penalty == "l0":
            return self.coefficient * l0, torch.full_like(l0, self.coefficient)
        assert self.target is not None
        off = l0 / self.target - 1
        return self.coefficient * off.square(), 2 * self.coefficient / self.target * off

    def _pre_act(self, coder: SparseCoder, rows: Tensor, theta: Tensor, dead: Tensor) -> Tensor:
        acc = theta.dtype
        centred = rows - coder.b_dec if coder.centred else rows
        u = centred.to(acc) @ coder.W_enc[dead].to(acc).T + coder.b_enc[dead].to(acc)
        norm = coder.W_dec[dead].to(acc).norm(dim=1)
        below: Tensor = ((theta[dead] - u).relu() * norm).sum()
        return below


class _Jump(torch.autograd.Function):
    """u 1[u > theta] of entries [E], with the estimate for theta."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        active = u.to(theta.dtype) > theta
        ctx.save_for_backward(u, theta, active)
        ctx.bandwidth = bandwidth
        return torch.where(active, u, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, theta, active = ctx.saved_tensors
        near = ~active | (u.to(theta.dtype) - theta < ctx.bandwidth / 2)  # no entry is below
        of_theta = torch.where(near, -theta / ctx.bandwidth * grad.to(theta.dtype), 0)
        return torch.where(active, grad, 0), of_theta, None


class _Step(torch.autograd.Function):
    """1[u > theta] of entries [E], with the estimate for theta and none for u."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, theta: Tensor, near: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(near)
        ctx.bandwidth = bandwidth
        return (values > 0).to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (near,) = ctx.saved_tensors
        return None, torch.where(near, -grad / ctx.bandwidth, 0), None, None
