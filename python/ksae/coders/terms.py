# SPDX-License-Identifier: Apache-2.0
"""The objective: a list of terms over one selection, evaluated by the forward pass and by the fused
step alike. Sums are in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops import accumulator

if TYPE_CHECKING:
    from .coder import SparseCoder

LOSSES = ("fvu", "mse")
PREFIX_WEIGHTS = ("mean", "sum", "dictionary_learning")


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
        prefixes, shares: widths that ascend to F, and the weight of each: the term is the weighted
            sum of those of the reconstructions by the first latents alone (Matryoshka, arXiv
            2503.17547), the last share 1. Empty: that of the whole code alone.
    """

    name: str
    weight: float
    k: int
    of_dead: bool = False
    of_residual: bool = False
    by_variance: bool = True
    prefixes: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    def denominator(self, target: Tensor, variance: Tensor, n_dead: Tensor | None) -> Tensor:
        """Of the target [N, d_out] with its total variance [] -> []; 0 switches the term off, as
        with no dead latent."""
        if self.of_dead:
            assert n_dead is not None
            return torch.where(n_dead > 0, variance, 0)
        return variance if self.by_variance else torch.full_like(variance, target.numel())

    def value(self, predictions: Sequence[Tensor], target: Tensor, denominator: Tensor) -> Tensor:
        """Before the weight, 0-d, differentiable in the predictions [N, d_out], one a prefix."""
        errors = [squared_error(prediction, target) for prediction in predictions]
        error = errors[-1]
        for share, part in zip(self.shares[:-1], errors[:-1], strict=True):
            error = error + share * part
        if self.of_dead:  # a perfect reconstruction leaves nothing to predict
            return error * torch.where(denominator > 0, 1 / denominator, 0)
        return error / denominator


def terms_of(model: SparseCoder, k_aux: int) -> list[Term]:
    """The terms of a model's loss; k_aux: entries a token of the code of dead latents, 0: none."""
    by_variance = model.loss == "fvu"
    terms = [Term("reconstruction", 1.0, model.k, by_variance=by_variance)]
    if model.prefixes:
        *_, whole = shares = shares_of(model.prefixes, model.prefix_weights)
        relative = tuple(share / whole for share in shares)
        terms[0] = replace(terms[0], weight=whole, prefixes=model.prefixes, shares=relative)
    if k_aux:
        terms.append(Term("auxk", model.auxk_alpha, k_aux, of_dead=True, of_residual=True))
    if model.multi_topk:
        terms.append(Term("multi_topk", 1 / 8, model.k_multi, by_variance=by_variance))
    return terms


def shares_of(prefixes: Sequence[int], weights: str | Sequence[float]) -> tuple[float, ...]:
    """What each prefix's loss counts: given, or by a name of PREFIX_WEIGHTS."""
    P = len(prefixes)
    if not isinstance(weights, str):
        return tuple(weights)
    return (1 / {"mean": P, "sum": 1, "dictionary_learning": P * P}[weights],) * P


def aux_width(model: SparseCoder, dead: Tensor, may_ask: bool) -> int:
    """Entries a token of AuxK's code, no more than latents are dead [F]; 0: none are, or no AuxK.

    may_ask: whether the number of dead latents may be read from their device. Otherwise the last
    entries may be of living latents, whose values are 0.
    """
    if model.auxk_alpha <= 0:
        return 0
    return min(model.k_aux, int(dead.sum()) if may_ask else dead.numel())


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """sum (recon - target)^2 over all elements, 0-d."""
    acc = accumulator(target.dtype)
    return (recon.to(acc) - target.to(acc)).square().sum()


def total_variance(y: Tensor) -> Tensor:  # [N, d] -> []
    """sum (y - mean over the batch of y)^2, 0-d: the denominator of the FVU, a constant."""
    variance: Tensor = ops.total_variance(y.detach())
    return variance
