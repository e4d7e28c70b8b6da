# SPDX-License-Identifier: Apache-2.0
"""Sparse coders whose selection knows what each latent does to a downstream loss."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import functional, ops
from ..ops import accumulator
from .coder import SparseCoder, TopKSAE, Transcoder

GRAD_NORMS = ("none", "unit", "rms", "sqrt_d")


class GradSelection(SparseCoder):
    """Selection by `ksae.grad_topk_encode` for a SparseCoder: the base of `GradTopKSAE` and
    `GradTopKTranscoder`.
    """

    beta: float
    mode: str
    grad_norm: str
    grad_square: Tensor  # 0-d, mean of |grad[n]|^2 over all training rows; with grad_norm="rms"
    grad_rows: Tensor  # 0-d int64, how many rows those were

    def _select_by(self, beta: float, mode: str, grad_norm: str) -> None:
        name = type(self).__name__
        ops.score(name, beta, mode)
        if grad_norm not in GRAD_NORMS:
            raise ops.fail(name, "grad_norm", f"one of {', '.join(GRAD_NORMS)}", repr(grad_norm))
        self.beta, self.mode, self.grad_norm = float(beta), mode, grad_norm
        self._seen_gradient = False
        if grad_norm == "rms":
            like, device = accumulator(self.W_enc.dtype), self.W_enc.device
            self.register_buffer("grad_square", torch.zeros((), dtype=like, device=device))
            self.register_buffer("grad_rows", torch.zeros((), dtype=torch.int64, device=device))

    def config(self) -> dict[str, Any]:
        own = {"beta": self.beta, "mode": self.mode, "grad_norm": self.grad_norm}
        return {**super().config(), **own}

    # ------------------------------------------------------------------------------------- the code

    def gradients(self, x: Tensor, grad: Tensor | None, training: bool) -> Tensor | None:
        """grad [..., d_out] checked, scaled by `grad_norm` and in the parameters' dtype [N, d_out].

        In training a gradient is required, and counts in the running norm.
        """
        name = type(self).__name__
        want = [*x.shape[:-1], self.d_out]
        if grad is None:
            if training:
                raise ValueError(
                    f"{name}: grad must be given in training, the gradient {want} of the downstream"
                    " loss, got None; eval() selects without one"
                )
            return None
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
        if grad.device != self.W_enc.device:
            raise ValueError(f"{name}: grad must be on {self.W_enc.device}, got {grad.device}")
        if training:
            self._warn_of_zeros(grad)
        if (
            self.grad_norm != "none"
        ):  # before the cast: a float16 may not hold the gradient as it is
            grad = self._scaled(grad.reshape(-1, self.d_out), training)
        return self.rows("grad", grad.reshape(want), self.d_out)

    @torch.no_grad()
    def _scaled(self, grad: Tensor, training: bool) -> Tensor:
        """The rows of grad [N, d_out] over their norms, or over the running norm; zero rows stay.

        A row with an entry that is not finite keeps one.
        """
        acc = accumulator(grad.dtype)
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True, dtype=torch.float64)  # [N, 1]
        if self.grad_norm == "rms":
            if training:
                counted = norm.isfinite() & (norm > 0)
                rows = counted.sum()
                self.grad_rows += rows
                mean = self.grad_square.double()
                more = torch.where(counted, norm.square() - mean, 0).sum()
                self.grad_square.copy_(mean + more / self.grad_rows.clamp(min=1))
            norm = self.grad_square.double().sqrt()
        scale = torch.where(norm > 0, 1 / norm, 1)
        if self.grad_norm == "sqrt_d":
            scale = scale * self.d_out**0.5
        return grad.to(acc) * scale.to(acc)

    def _warn_of_zeros(self, grad: Tensor) -> None:
        """Once, for the first batch: later ones are not looked at, for that would stop a stream."""
        if self._seen_gradient or torch.compiler.is_compiling():
            return
        self._seen_gradient = True
        if grad.numel() and not bool(grad.any()):
            warnings.warn(
                f"{type(self).__name__}: grad is zero everywhere, so selection is that of TopK;"
                " does the loss depend on what the hook sees?",
                stacklevel=2,
            )

    def select(
        self, rows: Tensor, k: int, grad: Tensor | None, W_bf16: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        if grad is None:
            return super().select(rows, k, grad, W_bf16)
        b_dec = self.b_dec if self.centred else None
        return functional.grad_topk_encode(
            rows, grad, self.W_enc, self.b_enc, self.W_dec, k, self.beta, self.mode, b_dec
        )

    def _score(self, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return super()._score(grad)
        return grad, self.W_dec, self.beta, self.mode

    def encode(self, x: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sparse code of x [..., d_in] -> values [..., k], indices [..., k] int64.

        Selected by u, which needs no labels, or with grad [..., d_out] by the score.
        """
        scaled = self.gradients(x, grad, training=False)
        values, indices = self.select(self.rows("x", x, self.d_in), self.k, scaled)
        shape = (*x.shape[:-1], self.k)
        return values.reshape(shape), indices.reshape(shape)


class GradTopKSAE(GradSelection, TopKSAE):
    """TopK sparse autoencoder whose k latents are chosen by their effect on a downstream loss too
    (gradient SAE, arXiv 2411.10397).

    `sae(x, grad=g)` and `TrainStep(sae)(x, grad=g)` select by `ksae.grad_topk_encode`. Training
    needs g; in eval mode `sae(x)` selects by u, and with g what it reports has used the labels.
    AuxK ranks the dead latents by u.

    Args:
        d_in, d_sae, k: as `TopKSAE`, and so are the other options.
        beta: weight of the gradient, a finite number >= 0.
        mode: "additive", "multiplicative" or "signed".
        grad_norm: what a gradient [d_in] is divided by: "none"; "unit", its norm; "sqrt_d", its
            norm / sqrt(d_in), so that its product with a unit row is about 1; "rms", the root mean
            square norm of all training rows so far, which leaves tokens their relative weight and
            is saved with the module.

    Raises:
        ValueError: an option out of range; grad missing in training, not detached, or not of the
            shape of x. A first batch whose gradient is zero everywhere gives a warning.

    Example:
        >>> import torch, ksae
        >>> sae = ksae.GradTopKSAE(d_in=8, d_sae=32, k=4, beta=0.5)
        >>> x, grad = torch.randn(5, 8), torch.randn(5, 8)
        >>> sae(x, grad=grad).recon.shape, sae.eval()(x).recon.shape
        (torch.Size([5, 8]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        beta: float = 1.0,
        mode: str = "additive",
        grad_norm: str = "sqrt_d",
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_sae, k, **options)
        self._select_by(beta, mode, grad_norm)


class GradTopKTranscoder(GradSelection, Transcoder):
    """`Transcoder` with the selection of `GradTopKSAE`: grad [..., d_out] is the gradient of the
    downstream loss at the output that it predicts. Options as those two.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        k: int,
        *,
        beta: float = 1.0,
        mode: str = "additive",
        grad_norm: str = "sqrt_d",
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_out, d_sae, k, **options)
        self._select_by(beta, mode, grad_norm)
