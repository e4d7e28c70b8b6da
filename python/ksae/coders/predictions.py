# SPDX-License-Identifier: Apache-2.0
"""What the terms of the objective predict besides the reconstruction, in the forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import functional, ops
from ..ops import accumulator
from .code import Code
from .terms import Term

if TYPE_CHECKING:
    from .coder import SparseCoder


def auxk_prediction(
    model: SparseCoder, rows: Tensor, target: Tensor, recon: Tensor, term: Term, dead: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prediction and target of AuxK [N, d_out], and the target's variance [].

    rows [N, d_in], target and recon [N, d_out]; dead [F]: the latents that may be active.
    """
    assert term.aux is not None
    values, indices = model.encode_dead(rows, term.k)
    if term.aux.signed:
        values = unrectified(model, rows, values, indices, dead)
    bias = model.b_dec if term.aux.biases and term.aux.bias else None
    prediction = functional.sparse_decode(values, indices, model.W_dec, bias)
    if term.aux.bias_in_target:
        prediction = prediction + (model.b_dec - model.b_dec.detach())
    acc = accumulator(model.W_dec.dtype)
    left = target.to(acc) - recon.to(acc)  # [N, d_out]
    left = left.detach() if term.aux.detached else left
    return [prediction], left, model.variance(left)


def unrectified(
    model: SparseCoder, rows: Tensor, values: Tensor, indices: Tensor, dead: Tensor
) -> Tensor:
    """Values [N, k] with the pre-activations of dead latents [F] in place of zeros."""
    x = rows - model.b_dec if model.centred else rows
    W, b = model.activation.encoder(model)
    u = ops.sparse_decode_backward_values(x, indices, W) + b[indices]
    return torch.where(values > 0, values, torch.where(dead[indices], u, 0))


def prefix_recons(model: SparseCoder, rows: Tensor, recon: Tensor, code: Code) -> list[Tensor]:
    """The reconstructions [N, d_out] by the latents of each prefix; the last one is recon."""
    recons = []
    for width in model.prefixes[:-1]:
        values = torch.where(code.indices < width, code.values, 0)
        recons.append(model.decode(values, code.indices, rows, code.offsets))
    return [*recons, recon]
