# SPDX-License-Identifier: Apache-2.0
"""What the phases of the fused step hand to each other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..coders.code import Code
from ..coders.terms import Term


class Batch(NamedTuple):
    """The rows of a batch: of N tokens, n of which are this rank's own. On one device n = N."""

    x: Tensor  # [N, d_in]
    y: Tensor  # [n, d_out]
    target: Tensor  # [n, d_out] of the sparse part: y without what a skip connection predicts
    grad: Tensor | None  # [N, d_out], of a downstream loss


class Selection(NamedTuple):
    """What the encode phase chose."""

    terms: list[Term]  # those with a bias first
    codes: list[Code]  # one a term
    n_dead: Tensor  # [] int64


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

    def of_encoder(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients of the pre-activations, offsets and order, one a term."""
        if not self.through:
            return self.grads, self.offsets, self.order
        rest = zip(self.grads[1:], self.offsets[1:], self.order[1:], strict=True)
        grads, offsets, order = zip(*self.through, *rest, strict=True)
        return list(grads), list(offsets), list(order)


class Sums(NamedTuple):
    """What the sums phase leaves to the scalars and the update."""

    loss: Tensor  # []
    scales: Tensor  # [terms]: of each term's gradients
    grad_b_enc: Tensor  # [F], of the pre-activations; more has b_enc's own, if it is another
    grad_dot_w: Tensor | None  # [F], of the decoder rows, where it is projected out
    # gradients of other parameters of the activation
    more: dict[str, Tensor]
    small: dict[str, list[Tensor]]  # gradients whose sum, weighted by the scales, is a parameter's
