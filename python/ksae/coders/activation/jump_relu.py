# SPDX-License-Identifier: Apache-2.0
"""JumpReLU: pre-activations above a learned threshold of each latent (arXiv 2407.14435)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ... import functional
from ...ops import accumulator
from ...reference import sparsity
from .above import Above
from .base import Goal

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder

PENALTIES = ("l0", "target_l0", "tanh")
LEARNED = {"log": "log_threshold", "linear": "theta"}  # parametrization -> name of the parameter


@dataclass(frozen=True)
class JumpReLU(Above):
    """u where u > theta, theta [F] learned, beside the loss a penalty.

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
        parametrization: the parameter [F] that is learned, "log", log_threshold = log(theta), or
            "linear", theta itself (as SAELens and dictionary_learning), which `TrainStep` keeps at
            0 or above (as SAELens). Where a step of another optimizer leaves it below 0, it counts
            as 0, with the gradient as it is. Adam moves a parameter by about the learning rate at a
            step: thresholds by a share of themselves, or by the rate.

    A training code holds the entries below theta within half a bandwidth as well, with value 0.
    Where parameters are of 16 bits, training compares u rounded to that type. While a training code
    holds more than one in 16 latents, training has dense products.

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
    parametrization: str = "log"

    identity: ClassVar[bool] = False
    keeps_zeros: ClassVar[bool] = True

    def check(self, owner: str, F: int) -> None:
        if self.penalty not in PENALTIES:
            wanted = ", ".join(PENALTIES)
            raise ValueError(f"{owner}: penalty must be one of {wanted}, got {self.penalty!r}")
        if self.parametrization not in LEARNED:
            want, got = ", ".join(LEARNED), repr(self.parametrization)
            raise ValueError(f"{owner}: parametrization must be one of {want}, got {got}")
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
        start = math.log(self.theta) if self.parametrization == "log" else self.theta
        return {self.learned: torch.full((F,), start, dtype=acc, device=device)}

    def fields(self) -> dict[str, Any]:
        fields = super().fields()
        if self.parametrization == "log":  # as in files from before there was another
            del fields["parametrization"]
        return fields

    @property
    def learned(self) -> str:
        """The name of the parameter of thresholds."""
        return LEARNED[self.parametrization]

    def at_least(self) -> dict[str, float]:
        return {"theta": 0.0} if self.parametrization == "linear" else {}

    @property
    def fused_refuses(self) -> str | None:
        return "pre_act > 0" if self.pre_act else None

    def thresholds(self, coder: SparseCoder) -> Tensor:
        """theta [F] in the accumulator's type."""
        return self.theta_of(self.own(coder))

    def lowest(self, coder: SparseCoder) -> Tensor:
        return self.thresholds(coder).detach() - self.bandwidth / 2

    def scheduled(self, k: int | None, penalty: float) -> JumpReLU:
        return replace(self, coefficient=penalty * self.coefficient, pre_act=penalty * self.pre_act)

    def infer(self, coder: SparseCoder, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
        theta, b_dec = self.thresholds(coder).detach(), coder.b_dec if coder.centred else None
        return functional.threshold_encode(rows, coder.W_enc, coder.b_enc, theta, b_dec)

    def own(self, coder: SparseCoder) -> dict[str, Tensor]:
        return {self.learned: coder.get_parameter(self.learned)}

    @property
    def weighs_norms(self) -> bool:
        return self.penalty == "tanh"

    def values_of(self, own: Mapping[str, Tensor], pre: Tensor, indices: Tensor) -> Tensor:
        at = self.theta_of(own).index_select(0, indices)
        return sparsity.jump_relu(pre, at, self.bandwidth)

    def penalty_of(
        self, own: Mapping[str, Tensor], coder: SparseCoder, goal: Goal, code: Code
    ) -> Tensor:
        assert code.pre is not None
        N = len(goal.rows) if goal.tokens is None else goal.tokens
        theta = self.theta_of(own)
        if self.penalty == "tanh":
            norms, values = own["norms"].index_select(0, code.indices), code.values.to(theta.dtype)
            scaled = sparsity.tanh_penalty(values, norms, N, self.tanh_scale)
            total = self.coefficient * scaled
        else:
            at, pre = theta.index_select(0, code.indices), code.pre.to(theta.dtype)
            steps = sparsity.step(pre.detach(), at, self.bandwidth).sum()
            active = (steps + goal.elsewhere) / max(N, 1)
            target = self.target if self.penalty == "target_l0" else None
            total = sparsity.l0_penalty(active, self.coefficient, target)
        if self.pre_act and bool((dead := coder.dead).any()):
            total = total + self.pre_act * self._pre_act(coder, goal.rows, theta, dead) / max(N, 1)
        return total

    def _pre_act(self, coder: SparseCoder, rows: Tensor, theta: Tensor, dead: Tensor) -> Tensor:
        acc = theta.dtype
        centred = rows - coder.b_dec if coder.centred else rows
        u = centred.to(acc) @ coder.W_enc[dead].to(acc).T + coder.b_enc[dead].to(acc)
        norm = coder.W_dec[dead].to(acc).norm(dim=1)
        below: Tensor = ((theta[dead] - u).relu() * norm).sum()
        return below

    def theta_of(self, own: Mapping[str, Tensor]) -> Tensor:
        """theta [F] in the accumulator's type, of the parameter that is learned."""
        learned = own[self.learned]
        wide = learned.to(accumulator(learned.dtype))
        if self.parametrization == "log":
            return wide.exp()
        return wide + (wide.clamp(min=0) - wide).detach()  # wide where it is not below 0
