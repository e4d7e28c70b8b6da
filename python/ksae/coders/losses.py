# SPDX-License-Identifier: Apache-2.0
"""The loss of a forward pass: the terms of the objective, and what an activation adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as nnf

from .activation.base import Goal
from .code import Code, has_numbers
from .predictions import auxk_prediction, prefix_recons
from .terms import aux_width, squared_error, terms_of

if TYPE_CHECKING:
    from .coder import SparseCoder


def losses(
    model: SparseCoder, rows: Tensor, target: Tensor, recon: Tensor, wide: Code
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, FVU of each prefix [P] and the terms by name; wide: the whole selection."""
    dead = model.dead
    n_dead = dead.sum() if has_numbers(dead) else None
    terms = terms_of(model, aux_width(model, n_dead))
    variance = model.variance(target)
    size = target.shape[0], model.d_out  # len() would fix it in an exported graph
    loss, parts = torch.zeros_like(variance), {}
    nested = prefix_recons(model, rows, recon, wide.first(model.k))
    for term in terms:
        predictions, goal, spread = nested, target, variance
        if term.aux is not None:
            predictions, goal, spread = auxk_prediction(model, rows, target, recon, term, dead)
        elif term.name != "reconstruction":
            code = wide.first(term.k)
            predictions = [model.decode(code.values, code.indices, rows)]
        denominator = term.denominator(*size, variance, spread, dead.sum())
        parts[term.name] = term.value(predictions, goal, denominator)
        loss = loss + term.weight * parts[term.name]
    if model.activation.penalized and model.training:
        unit = terms[0].denominator(*size, variance, variance, dead.sum())
        loss = loss + _penalty(model, rows, target, unit, wide)
    if model.loss == "fvu" and not model.prefixes:
        return loss, parts["reconstruction"].detach()[None], parts
    fvus = [squared_error(p.detach(), target) / variance for p in nested]
    return loss, torch.stack(fvus).detach(), parts


def _penalty(model: SparseCoder, rows: Tensor, target: Tensor, unit: Tensor, code: Code) -> Tensor:
    if model.W_skip is not None:
        target = target - nnf.linear(rows, model.W_skip).detach()
    activation = model.activation
    return activation.penalty_of(activation.all_of(model), model, Goal(rows, target, unit), code)
