# SPDX-License-Identifier: Apache-2.0
"""What the phases of the fused step hand to each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..coders.code import Code
from ..coders.coder import SparseCoder
from ..coders.terms import Term
from ..parallel.one_device import Pending
from .dense_auxk import DenseAuxK


class Batch(NamedTuple):
    """The rows of a batch: of the N tokens that this rank's latents are scored for, n of which are
    its own. On one device n = N."""

    x: Tensor  # [N, d_in]
    y: Tensor  # [n, d_out]
    target: Tensor  # [n, d_out] of the sparse part: y without what a skip connection predicts
    grad: Tensor | None  # [N, d_out], of a downstream loss
    variance: Pending  # [], of the y of all ranks, once they have exchanged it


class Selection(NamedTuple):
    """What the encode phase chose."""

    terms: list[Term]  # those with a bias first
    codes: list[Code]  # one a term, but for AuxK that is dense
    n_dead: Tensor | None  # [] int64; of one device where a term needs it
    most_dead: int = 0  # of AuxK that is dense; 0: it is not


class Groups:
    """The terms' codes grouped by latent and their residuals; lists of one entry a term, as the ops
    take them."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []  # [N, k]
        self.grads: list[Tensor] = []  # [N, k] of the values, before scaling
        self.offsets: list[Tensor] = []  # [F+1]
        self.order: list[Tensor] = []  # [N*k]
        # what the encoder's gradients are of, where that is not the values
        self.through: list[tuple[Tensor, Tensor, Tensor]] = []
        self.residuals: list[Tensor] = []  # [N, columns], or [P*N, columns] of P prefixes
        self.sq_errors: list[Tensor] = []  # sums of squares of all columns, [N] or one a rank
        self.sums: list[Tensor | None] = []  # [d] of all columns, where the kernel forms them
        self.denominators: list[Tensor] = []  # []
        self.variance: Tensor  # [], of y
        self.row_of: list[Tensor] | None = None  # [N*k]: entries' rows of the residuals
        self.token_of: list[Tensor] | None = None  # [E]: their tokens, of codes with row offsets
        self.start = 0  # the first column of the residuals
        # [N, d] of terms after the first, where columns come in parts
        self.whole: list[Tensor] = []
        self.prefix_errors: Tensor | None = None  # [P]: sums of squares of each prefix
        self.dense: DenseAuxK | None = None  # the last term, in place of the lists' entry

    def of_encoder(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients of the pre-activations, offsets and order, one a term."""
        if not self.through:
            return self.grads, self.offsets, self.order
        rest = zip(self.grads[1:], self.offsets[1:], self.order[1:], strict=True)
        grads, offsets, order = zip(*self.through, *rest, strict=True)
        return list(grads), list(offsets), list(order)

    def encoder(self, x: Tensor) -> dict[str, Any]:
        """What the row pass over W_enc takes; x [N, d_in]."""
        coefficients, offsets, order = self.of_encoder()
        lists = {"coefficients": coefficients, "offsets": offsets, "order": order}
        lists |= {"rows": [x] * len(coefficients)}
        dense = None if self.dense is None else self.dense.encoder(x.dtype)
        return _with(lists, self.token_of, dense)

    def decoder(self) -> dict[str, Any]:
        """What the row pass over W_dec takes."""
        lists = {"coefficients": self.values, "offsets": self.offsets, "order": self.order}
        lists |= {"rows": self.residuals}
        dense = None if self.dense is None else self.dense.decoder(self.values[0].dtype)
        return _with(lists, self.row_of, dense)


def _with(
    lists: dict[str, list[Tensor]],
    row_of: list[Tensor] | None,
    dense: dict[str, list[Tensor]] | None,
) -> dict[str, Any]:
    if dense is None:
        return {**lists, "row_of": row_of}
    if row_of is not None:
        E = dense["order"][0].numel()
        row_of = [*row_of, torch.arange(E, dtype=torch.int32, device=row_of[0].device)]
    return {**{name: [*own, *dense[name]] for name, own in lists.items()}, "row_of": row_of}


class Sums(NamedTuple):
    """What the sums phase leaves to the scalars and the update."""

    loss: Tensor  # []
    scales: Tensor  # [terms]: of each term's gradients
    grad_b_enc: Tensor  # [F], of the pre-activations; more has b_enc's own, if it is another
    grad_dot_w: Tensor | None  # [F], of the decoder rows, where it is projected out
    # gradients of other parameters of the activation
    more: dict[str, Tensor]
    small: dict[str, list[Tensor]]  # gradients whose sum, weighted by the scales, is a parameter's
    reduced: RowGradients | None  # of the matrices, where the coder has replicas


class RowGradients(NamedTuple):
    """Gradients of the rows that have any, of the tokens of all replicas: of U of F latents."""

    encoder: Tensor  # [U, d_in] float32
    decoder: Tensor  # [U, d_out] float32
    offsets: Tensor  # [F+1] int32: as of `group_by_latent`, an entry each
    order: Tensor  # [U] int32
    terms: int  # of the loss
    fired: Tensor  # [F] bool: has a value that is not 0 in the first term

    def rows(self, gradients: Tensor, W: Tensor, scales: Tensor) -> dict[str, Any]:
        """As the row pass takes them: each the coefficient 1 times its row. The scale is 1, or with
        the terms' scales after a step's scalars the last."""
        ones = torch.ones(len(gradients), 1, dtype=W.dtype, device=W.device)
        scale = scales[-1:] if len(scales) > self.terms else torch.ones_like(scales[:1])
        return {
            "coefficients": [ones], "offsets": [self.offsets], "order": [self.order],
            "rows": [gradients], "scales": scale, "centre": None, "row_of": None,
        }  # fmt: skip


def columns_at_a_time(model: SparseCoder, whole: bool, of_ranks: bool, masters: bool) -> int:
    """How many columns of the residual exist at a time; whole: all, but of prefixes.

    The residual [N, d] is a CPU's largest temporary. Where it is not small beside [N, F], or a
    16-bit copy of the batch is there as well, half of it exists at a time. On a GPU chunks of
    scores are larger, and the other half would cost gathers again. P prefixes have P residuals, of
    which as many columns less exist at a time.
    """
    d, tables, on_gpu = model.d_out, max(len(model.prefixes), 1), model.W_enc.is_cuda
    has_room = on_gpu or (64 if masters else 32) * d <= model.d_sae
    whole = whole or model.skip or has_room
    if on_gpu or model.activation.penalized or (tables == 1 and whole) or of_ranks:
        return d
    parts = tables * (1 if has_room else 2)
    return min(d, (d + 4 * parts - 1) // (4 * parts) * 4)  # a multiple of 4


def weighted_rows(W: Tensor, g: Tensor) -> Tensor:
    """W.T @ g [d], of W [F, d] and g [F] in the accumulator's type; on a GPU without a copy of W in
    that type."""
    if not W.is_cuda:
        return W.to(g.dtype).T @ g
    if W.dtype != torch.bfloat16:
        return ops.product(g[None], W)[0]
    total: Tensor = ops.product(in_parts(g, W.dtype), W).sum(0)
    return total


def in_parts(g: Tensor, T: torch.dtype) -> Tensor:
    """[3, F] of a narrower type whose sum is g [F] float32, but for what underflows."""
    parts = []
    for _ in range(3):
        parts.append(g.to(T))
        g = g - parts[-1]
    return torch.stack(parts)
