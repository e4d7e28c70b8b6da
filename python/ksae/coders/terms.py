# SPDX-License-Identifier: Apache-2.0
"""The objective: a list of terms over one selection, evaluated by the forward pass and by the fused
step alike. Sums are in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops import accumulator

if TYPE_CHECKING:
    from .coder import SparseCoder

LOSSES = ("fvu", "mse")


@dataclass(frozen=True)
class Term:
    """weight * |prediction - target|^2 / denominator, where the prediction decodes one code.

    Args:
        name: "reconstruction", "multi_topk" or "auxk".
        weight: its share in the loss.
        k: entries a token of its code.
        of_dead: the code holds dead latents only; else it is the first k entries of the selection.
        of_residual: the target is what the reconstruction leaves, y - recon, detached, and the
            prediction has neither bias nor skip connection; else the target is y.
        by_variance: the denominator is the target's total variance; else its number of elements.
    """

    name: str
    weight: float
    k: int
    of_dead: bool = False
    of_residual: bool = False
    by_variance: bool = True

    def denominator(self, target: Tensor, variance: Tensor, n_dead: Tensor | None) -> Tensor:
        """Of the target [N, d_out] with its total variance [] -> []; 0 switches the term off, as
        with no dead latent."""
        if self.of_dead:
            assert n_dead is not None
            return torch.where(n_dead > 0, variance, 0)
        return variance if self.by_variance else torch.full_like(variance, target.numel())

    def value(self, prediction: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
        """Before the weight, 0-d, differentiable in the prediction [N, d_out]."""
        error = squared_error(prediction, target)
        if self.of_dead:  # a perfect reconstruction leaves nothing to predict
            return error * torch.where(denominator > 0, 1 / denominator, 0)
        return error / denominator


def terms_of(model: SparseCoder, k_aux: int) -> list[Term]:
    """The terms of a model's loss; k_aux: entries a token of the code of dead latents, 0: none."""
    by_variance = model.loss == "fvu"
    terms = [Term("reconstruction", 1.0, model.k, by_variance=by_variance)]
    if k_aux:
        terms.append(Term("auxk", model.auxk_alpha, k_aux, of_dead=True, of_residual=True))
    if model.multi_topk:
        terms.append(Term("multi_topk", 1 / 8, model.k_multi, by_variance=by_variance))
    return terms


def aux_width(model: SparseCoder, n_dead: Tensor | None) -> int:
    """Entries a token of AuxK's code, no more than latents are dead; 0: none are, or no AuxK.

    n_dead: []; None: it may not be read from its device. Then the last entries may be of living
    latents, whose values are 0.
    """
    if model.auxk_alpha <= 0:
        return 0
    return model.k_aux if n_dead is None else min(model.k_aux, int(n_dead))


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """sum (recon - target)^2 over all elements, 0-d."""
    acc = accumulator(target.dtype)
    return (recon.to(acc) - target.to(acc)).square().sum()


def total_variance(y: Tensor) -> Tensor:  # [N, d] -> []
    """sum (y - mean over the batch of y)^2, 0-d: the denominator of the FVU, a constant."""
    variance: Tensor = ops.total_variance(y.detach())
    return variance
