# SPDX-License-Identifier: Apache-2.0
"""GradTopK: the k latents with the largest score, which knows what each latent does to a downstream
loss (gradient SAE, arXiv 2411.10397).
"""

from __future__ import annotations

import numbers
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ... import functional, ops
from ...ops import accumulator
from ..code import has_numbers, recomputes
from .topk import TopK

if TYPE_CHECKING:
    from ..coder import SparseCoder

GRAD_NORMS = ("none", "unit", "rms", "sqrt_d")


@dataclass(frozen=True)
class GradTopK(TopK):
    """relu(u) at the k latents of the largest score of `ksae.grad_topk_encode`; without a gradient,
    as in eval mode, `TopK`.

    Args:
        k: active latents a token, in [1, F].
        beta: weight of the gradient, a finite number >= 0.
        mode: "additive", "multiplicative" or "signed".
        grad_norm: what a gradient [d_out] is divided by: "none"; "unit", its norm; "sqrt_d", its
            norm / sqrt(d_out), so that its product with a unit row is about 1; "rms", the root mean
            square norm of all training rows so far, which leaves tokens their relative weight and
            is saved with the module.

    Raises:
        TypeError: k is no integer. What is out of range is refused by the coder.
    """

    beta: float = 1.0
    mode: str = "additive"
    grad_norm: str = "sqrt_d"

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, numbers.Real):  # those of numpy too
            object.__setattr__(self, "beta", float(self.beta))

    def check(self, owner: str, F: int) -> None:
        super().check(owner, F)
        ops.score(owner, self.beta, self.mode)
        if self.grad_norm not in GRAD_NORMS:
            wanted = f"one of {', '.join(GRAD_NORMS)}"
            raise ops.fail(owner, "grad_norm", wanted, repr(self.grad_norm))

    def options(self) -> dict[str, Any]:
        return {"beta": self.beta, "mode": self.mode, "grad_norm": self.grad_norm}

    def buffers(self, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """grad_square [], mean of |grad[n]|^2 over all training rows, and grad_rows [] int64, how
        many rows those were; with grad_norm="rms"."""
        if self.grad_norm != "rms":
            return {}
        return {
            "grad_square": torch.zeros((), dtype=acc, device=device),
            "grad_rows": torch.zeros((), dtype=torch.int64, device=device),
        }

    def gradients(
        self, coder: SparseCoder, x: Tensor, grad: Tensor | None, training: bool
    ) -> Tensor | None:
        """grad [..., d_out] checked, scaled by `grad_norm` and in the parameters' dtype [N, d_out].

        In training a gradient is required, and counts in the running norm.
        """
        name = type(coder).__name__
        want = [*x.shape[:-1], coder.d_out]
        if grad is None:
            if training:
                raise ValueError(
                    f"{name}: grad must be given in training, the gradient {want} of the downstream"
                    " loss, got None; eval() selects without one"
                )
            return None
        coder.require_tensor("grad", grad)
        if list(grad.shape) != want:
            given = f"of shape {want} for x of shape {list(x.shape)}"
            raise ValueError(f"{name}: grad must be {given}, got {list(grad.shape)}")
        if grad.requires_grad:
            raise ValueError(
                f"{name}: grad must be detached, for nothing flows through the selection,"
                " got a tensor that requires grad"
            )
        if not grad.is_floating_point():
            raise TypeError(f"{name}: grad must be floating, got {grad.dtype}")
        if grad.device != coder.W_enc.device:
            raise ValueError(f"{name}: grad must be on {coder.W_enc.device}, got {grad.device}")
        if training:
            _warn_of_zeros(coder, grad)
        if self.grad_norm != "none":  # before the cast: float16 may not hold the gradient as it is
            grad = self._scaled(coder, grad.reshape(-1, coder.d_out), training)
        return coder.rows("grad", grad.reshape(want), coder.d_out)

    def _scaled(self, coder: SparseCoder, grad: Tensor, training: bool) -> Tensor:
        """The rows of grad [N, d_out] over their norms, or over the running norm; zero rows stay.

        A row with an entry that is not finite keeps one.
        """
        acc = accumulator(grad.dtype)
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True, dtype=torch.float64)  # [N, 1]
        if self.grad_norm == "rms":
            square, seen = coder.get_buffer("grad_square"), coder.get_buffer("grad_rows")
            if training and not recomputes():
                counted = norm.isfinite() & (norm > 0)
                mean = square.double()
                more = torch.where(counted, norm.square() - mean, 0).sum()
                rows, more = coder.of_batch(torch.stack([counted.sum().double(), more])).unbind()
                seen += rows.long()
                square.copy_(mean + more / seen.clamp(min=1))
            norm = square.double().sqrt()
        scale = torch.where(norm > 0, 1 / norm, 1)
        if self.grad_norm == "sqrt_d":
            scale = scale * coder.d_out**0.5
        return grad.to(acc) * scale.to(acc)

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        if grad is None:
            return super().select(coder, rows, k, grad, W_bf16)
        b_dec = coder.b_dec if coder.centred else None
        weights = (coder.W_enc, coder.b_enc, coder.W_dec)
        return functional.grad_topk_encode(rows, grad, *weights, k, self.beta, self.mode, b_dec)

    def score(self, coder: SparseCoder, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return super().score(coder, grad)
        return grad, coder.W_dec, self.beta, self.mode


def _warn_of_zeros(coder: SparseCoder, grad: Tensor) -> None:
    """Once, for the first batch: later ones are not looked at, for that would stop a stream."""
    if coder.seen_gradient or not has_numbers(grad):
        return
    coder.seen_gradient = True
    if grad.numel() and not bool(grad.any()):
        warnings.warn(
            f"{type(coder).__name__}: grad is zero everywhere, so selection is that of TopK;"
            " does the loss depend on what the hook sees?",
            stacklevel=2,
        )


class GradOptions:
    """beta, mode and grad_norm of a coder whose activation is `GradTopK`, by their own names."""

    activation: Any  # GradTopK

    @property
    def beta(self) -> float:
        """Weight of the gradient in the score."""
        return float(self.activation.beta)

    @property
    def mode(self) -> str:
        """Of the score: additive, multiplicative or signed."""
        return str(self.activation.mode)

    @property
    def grad_norm(self) -> str:
        """What a gradient is divided by: none, unit, rms or sqrt_d."""
        return str(self.activation.grad_norm)
