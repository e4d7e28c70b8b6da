# SPDX-License-Identifier: Apache-2.0
"""AuxK with products of the dead latents' rows, where gathers would cost more.

The code of AuxK has up to d/2 entries a token, all of a few latents. As a sparse code it gathers a
row of W_dec, of the residual and of x for each entry; as a matrix of tokens and dead latents it
takes five products of the rows of those alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..coders.coder import SparseCoder
from ..coders.terms import Term
from ..ops import product
from .dead_latents import padded

# Bytes/s from L2, assumed; flop/s of products: bf16, measured on one H200, and float32, assumed.
L2, PRODUCT = 5.5e12, {2: 790e12, 4: 60e12}
# Bytes that are gathered in the time of a multiplication and addition of a product.
BYTES = {size: L2 * 2 / rate for size, rate in PRODUCT.items()}


def pays(term: Term, most: int | None, W: Tensor) -> bool:
    """Whether AuxK, of at most so many dead latents of weights like W [F, d], is cheaper as
    products. float16 overflows in what the encoder's rows are divided by."""
    if most is None or not term.of_residual or W.dtype not in (torch.float32, torch.bfloat16):
        return False
    return products_pay(term.k, padded(most, len(W)), W.element_size())


def products_pay(k_aux: int, dead: int, itemsize: int) -> bool:
    """Whether five products of `dead` latents, padded, cost less than gathers of k_aux entries: a
    token reads k_aux rows of W_dec and of x, and of the float32 residual; per column of d."""
    return 5 * dead * BYTES[itemsize] < min(k_aux, dead) * (2 * itemsize + 4)


class DenseAuxK(NamedTuple):
    """What a step needs of AuxK: its error, and the gradients of the dead latents' rows before the
    scale of the term. D of F latents, the dead ones and others that add nothing."""

    sq_error: Tensor  # [N] float64
    bias: Tensor  # [d_out] sum of the residual over the tokens
    slot: Tensor  # [F] int64: where a latent is among the D, if it is dead
    dead: Tensor  # [F] bool
    b_enc: Tensor  # [D] sum over the tokens of the values' gradients
    along: Tensor  # [D] product of a decoder row with its gradient
    W_dec: Tensor  # [D, d_out] of the decoder rows
    W_enc: Tensor  # [D, d_in] of the encoder rows, without the part of the centre

    def of_latents(self, numbers: Tensor) -> Tensor:
        """[D] -> [F], 0 where a latent is not dead."""
        return torch.where(self.dead, numbers[self.slot], 0)

    def decoder(self, T: torch.dtype) -> dict[str, list[Tensor]]:
        """As a group of the row pass: one entry of coefficient 1 a latent, whose row is the
        gradient."""
        ones = self.b_enc.new_ones(len(self.b_enc), 1, dtype=T)
        return self._group(ones, self.W_dec)

    def encoder(self, T: torch.dtype) -> dict[str, list[Tensor]]:
        """The same with coefficient s, the gradient of b_enc, so that s (row - centre) is the
        gradient. Rows of T narrower than float32 are two, the second what the first has lost.

        A sum s that has cancelled is held away from 0, by less than its own rounding.
        """
        s, G = self.b_enc, self.W_enc
        size = s.abs().clamp_min(torch.finfo(s.dtype).tiny)
        least = 2.0**-30 * G.abs().amax(1).clamp_min(torch.finfo(s.dtype).tiny ** 0.5)
        s = torch.where(s < 0, -1.0, 1.0).to(s.dtype) * torch.maximum(size, least)
        rows = G / s[:, None]
        if rows.dtype == T:
            return self._group(s[:, None], rows)
        high = rows.to(T)
        low = (rows - high.to(rows.dtype)).to(T)
        both = torch.stack([2 * high, 2 * low], 1).flatten(0, 1)  # [2 D, d_in]
        return self._group((s / 2).repeat_interleave(2)[:, None], both, 2)

    def _group(self, coefficients: Tensor, rows: Tensor, each: int = 1) -> dict[str, list[Tensor]]:
        F, E = len(self.dead), len(coefficients)
        offsets = coefficients.new_zeros(F + 1, dtype=torch.int32)
        offsets[1:] = each * self.dead.cumsum(0)
        order = torch.arange(E, dtype=torch.int32, device=coefficients.device)
        order = torch.where(order < offsets[-1], order, -1)
        group = {"coefficients": coefficients, "offsets": offsets, "order": order, "rows": rows}
        return {name: [t.contiguous()] for name, t in group.items()}


@torch.no_grad()
def dense_auxk(
    model: SparseCoder, x: Tensor, target: Tensor, term: Term, dead: Tensor, most: int
) -> DenseAuxK:
    """AuxK of x [N, d_in], whose detached target is the residual [N, d_out] float32 of the
    reconstruction, by the latents of dead [F], which are at most `most`."""
    assert term.aux is not None
    F, D, acc = len(dead), padded(most, len(dead)), target.dtype
    slot = dead.cumsum(0) - 1
    # the dead ones in order; what is left of the D is latent 0, and chosen by nobody
    latents = dead.new_zeros(D + 1, dtype=torch.int64)
    latents.scatter_(0, torch.where(dead, slot, D), torch.arange(F, device=dead.device))
    latents = latents[:D]
    real = torch.arange(D, device=dead.device) < dead.sum()
    W_enc, b_enc, W_dec = model.W_enc[latents], model.b_enc[latents], model.W_dec[latents]
    b_dec = model.b_dec if model.centred else None
    values, indices = ops.topk_encode(x, W_enc, b_enc, min(term.k, D), b_dec, real)
    code = values.new_zeros(len(x), D).scatter_(1, indices, values)
    if term.aux.signed:  # chosen ones as they are, without ReLU
        u = product(x if b_dec is None else x - b_dec, W_enc.T) + b_enc
        chosen = torch.zeros_like(code, dtype=torch.bool).scatter_(1, indices, real[indices])
        code = torch.where((code > 0) | ~chosen, code, u.to(code.dtype))
    residual = product(code, W_dec) - target
    if term.biases:
        residual += term.biases * model.b_dec
    narrow = residual.to(code.dtype)
    grads = torch.where(code == 0, 0, product(narrow, W_dec.T))
    return DenseAuxK(
        residual.double().square().sum(1),
        residual.sum(0),
        slot.clamp(min=0, max=D - 1),
        dead,
        grads.sum(0),
        (code.to(acc) * grads).sum(0),
        product(code.T, narrow),
        product(grads.to(code.dtype).T, x),
    )
