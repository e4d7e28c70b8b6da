# SPDX-License-Identifier: Apache-2.0
"""The objective: a list of terms over one selection, evaluated by the forward pass and by the fused
step alike. Sums are in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops import accumulator
from .auxk import AUXK, AuxK

if TYPE_CHECKING:
    from .coder import SparseCoder

LOSSES = ("fvu", "mse")
PREFIX_WEIGHTS = ("mean", "sum", "dictionary_learning")


@dataclass(frozen=True)
class Term:
    """weight * |prediction - target|^2 / denominator, where the prediction decodes one code.

    Args:
        name: "reconstruction", "auxk" or "multi_topk_k".
        weight: its share in the loss.
        k: entries a token of its code.
        aux: of AuxK, the code of dead latents predicts what the reconstruction leaves, y - recon;
            None: the first k entries of the selection predict y.
        by_variance: the denominator is the target's total variance; else its number of elements.
        prefixes, shares: widths that ascend to F, and the weight of each: the term is the weighted
            sum of those of the reconstructions by the first latents alone (Matryoshka, arXiv
            2503.17547), the last share 1. Empty: that of the whole code alone.
    """

    name: str
    weight: float
    k: int
    aux: AuxK | None = None
    by_variance: bool = True
    prefixes: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def of_residual(self) -> bool:
        """Whether the target is a constant that the reconstruction leaves.

        Where it is none, y - recon, the error is that of the entries of both codes together.
        """
        return self.aux is not None and self.aux.detached

    @property
    def biases(self) -> int:
        """How often b_dec is in the error."""
        return 1 if self.aux is None else self.aux.biases

    @property
    def bias_gradients(self) -> int:
        """How often the gradient of the prediction goes to b_dec."""
        return 1 if self.aux is None else self.aux.bias_gradients

    def denominator(
        self, N: int, d: int, variance: Tensor, of_residual: Tensor, n_dead: Tensor | None
    ) -> Tensor:
        """Of a target [N, d], its total variance [] and that of the residual -> []; 0 switches the
        term off, as with no dead latent. n_dead []: for AuxK."""
        if self.aux is None:
            return variance if self.by_variance else torch.full_like(variance, N * d)
        assert n_dead is not None
        elements = torch.full_like(variance, N * d)
        below = {"residual": of_residual, "target": variance, "elements": elements}[self.aux.unit]
        if self.aux.scaled:
            below = below / (n_dead / max(d // 2, 1)).clamp(max=1).to(below.dtype)
        return torch.where(n_dead > 0, below, 0)

    def value(self, predictions: Sequence[Tensor], target: Tensor, denominator: Tensor) -> Tensor:
        """Before the weight, 0-d, differentiable in the predictions [N, d_out], one a prefix."""
        errors = [squared_error(prediction, target) for prediction in predictions]
        error = errors[-1]
        for share, part in zip(self.shares[:-1], errors[:-1], strict=True):
            error = error + share * part
        if self.aux is not None:  # a perfect reconstruction leaves nothing to predict
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
        terms.append(Term("auxk", model.auxk_alpha, k_aux, aux=AUXK[model.auxk]))
    for k, weight in model.multi_k:
        terms.append(Term(f"multi_topk_{k}", weight, k, by_variance=by_variance))
    return terms


def shares_of(prefixes: Sequence[int], weights: str | Sequence[float]) -> tuple[float, ...]:
    """What each prefix's loss counts: given, or by a name of PREFIX_WEIGHTS."""
    P = len(prefixes)
    if not isinstance(weights, str):
        return tuple(weights)
    return (1 / {"mean": P, "sum": 1, "dictionary_learning": P * P}[weights],) * P


def aux_width(model: SparseCoder, n_dead: Tensor | int | None) -> int:
    """Entries a token of AuxK's code, no more than latents are dead; 0: none are, or no AuxK.

    n_dead: [], or a bound of it; None: it may not be read from its device. Then and by a bound the
    last entries may be of living latents, whose values are 0.
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


def multi_loss(model: SparseCoder, parts: Mapping[str, Tensor]) -> Tensor | None:
    """The weighted mean of the losses with other k, from the terms by name; None without any."""
    if not model.multi_k:
        return None
    total = sum(weight for _, weight in model.multi_k)
    return torch.stack([w / total * parts[f"multi_topk_{k}"] for k, w in model.multi_k]).sum()
