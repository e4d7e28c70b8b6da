# SPDX-License-Identifier: Apache-2.0
"""What lies between an activation's pre-activations and the values of its code, in the fused step.

The values' gradients come from the residual; an activation that makes values of pre-activations by
more than selecting them, or has a penalty, passes them on through a graph of autograd over the
entries alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..coders.activation.base import Goal
from ..coders.code import Code, by_row
from ..coders.coder import SparseCoder


class Passed(NamedTuple):
    """What an activation adds to a step."""

    penalty: Tensor  # []
    grads: Tensor  # [E] of the pre-activations, before scaling
    more: dict[str, Tensor]  # [F] each, of its parameters; of b_enc, what goes past the entries
    norms: Tensor | None  # [F], the gradient for |W_dec[i]| times it, where the penalty has it


def pass_on(model: SparseCoder, goal: Goal, code: Code, grads: Tensor, scale: Tensor) -> Passed:
    """The gradients of pre-activations and parameters from those of the values [E], before `scale`
    [], of the training code of a batch."""
    activation, acc = model.activation, grads.dtype
    assert code.pre is not None
    own = {n: t.detach().to(acc).requires_grad_() for n, t in activation.all_of(model).items()}
    with torch.enable_grad():
        pre = code.pre.to(acc).requires_grad_()
        values = activation.values_of(own, pre, code.indices)
        made = Code(values, code.indices, code.offsets, pre)
        penalty = activation.penalty_of(own, model, goal, made)
        total = penalty + (values * (scale * grads)).sum()
        found = torch.autograd.grad(total, [pre, *own.values()], allow_unused=True)
    leaves = zip([pre, *own.values()], found, strict=True)
    of_pre, *of_own = (torch.zeros_like(t) if g is None else g for t, g in leaves)
    more = dict(zip(own, of_own, strict=True))
    norms = more.pop("norms", None)
    if norms is not None:
        norms = norms * own["norms"].detach()
    return Passed(penalty.detach(), of_pre / scale, more, norms)


def of_zeros(
    model: SparseCoder, code: Code, residual: Tensor, grads: Tensor, row_of: Tensor
) -> Tensor:
    """The values' gradients [E], those of entries with value 0 too, of which the ops leave it out.

    residual [rows, d_out]; row_of: the row of each entry, [E].
    """
    below = (code.values == 0).nonzero()[:, 0]
    full = grads.clone()
    full[below] = _products(residual, row_of[below], code.indices[below], model.W_dec)
    return full


def _products(residual: Tensor, rows: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """<residual[row], W_dec[index]> of entries in any order: [E]."""
    order, offsets = by_row(rows, len(residual))
    products = ops.sparse_decode_backward_values(residual, indices[order, None], W_dec, offsets)
    out = torch.empty_like(products[:, 0])
    out[order] = products[:, 0]
    return out
