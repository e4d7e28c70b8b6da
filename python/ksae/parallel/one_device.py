# SPDX-License-Identifier: Apache-2.0
"""What the phases of a step exchange, for a coder that lies whole on one device: nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..coders.code import Code
from ..coders.coder import SparseCoder

# Values and indices [N, k] or, of codes with row offsets, [E]; what `codes` needs besides: row
# offsets, or for shards by what was chosen, scores [N, k] float32, None being the values; and
# pre-activations [E], where values are more
Selected = tuple[Any, ...]
Pending = Callable[[], Tensor]  # waits for the end of an exchange, and returns what it brings


class OneDevice:
    """The communicator of a coder that lies whole on one device: every exchange is the identity.

    `Shards` and `Replicas` replace methods; the phases of a step stay as they are. n tokens are a
    rank's own, N those that its latents are scored for: of all ranks, or where the coder has
    replicas, of those that share one.
    """

    rank, size = 0, 1  # of the ranks that share the latents: this one, their number
    replicas = 1  # of the coder, each with tokens of its own
    leads = True  # one of all ranks, which writes what all have
    writes = True  # one of those that hold these latents, which writes them

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        """Raise an error on every rank if `facts` differ between ranks."""

    def refuse(self, what: str, error: Exception) -> None:
        """Let the other ranks know that this one raises an error instead of `agree`."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of the ranks that share the latents [N, columns], from this one's."""
        return rows

    def tokens(self, rows: Tensor) -> Tensor:
        """`gather`, which the next call overwrites."""
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """This rank's rows [n, columns] of [N, columns]."""
        return rows

    def totals(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each the sum over all ranks of a partial sum or count, of any shape."""
        return list(parts)

    def over_latents(self, part: Tensor) -> Tensor:
        """The sum over the ranks that share the latents."""
        return part

    def start_over_latents(self, part: Tensor) -> Pending:
        """`over_latents` that goes on beside other work: what waits for its end and returns it."""
        return lambda: part

    def over_replicas(self, part: Tensor) -> Tensor:
        """The sum over the ranks that hold the same latents for other tokens."""
        return part

    def variance(self, y: Tensor) -> Tensor:
        """`total_variance` of the rows of all ranks: [], from this one's [n, d]."""
        return self.start_variance(y)()

    def start_variance(self, y: Tensor) -> Pending:
        """`variance` that goes on beside other work."""
        return lambda: ops.total_variance(y)

    def select(
        self,
        model: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...],
    ) -> list[Selected]:
        """The selection of this rank's latents, and for k_aux > 0 that of AuxK."""
        if not k_aux:
            chosen = model.select(rows, k, grad, W_bf16)
            return [chosen if len(chosen) > 2 else (*chosen, None)]
        chosen = model.select_aux(rows, k, k_aux, grad, W_bf16)
        main, aux = chosen[:-2], chosen[-2:]
        return [main if len(main) > 2 else (*main, None), (*aux, None)]

    def codes(
        self, values: Tensor, indices: Tensor, by: Tensor | None, ks: Sequence[int]
    ) -> list[Code]:
        """From the best of this rank's latents, as `select` gives them, [N, at least k] or with row
        offsets, those of the best k of all ranks, for each k of ks; entries of value 0 fill the
        rows. With offsets k is an average, 0: all of them."""
        wide = Code(values, indices, by)  # sorted: the best are a prefix
        return [wide.first(k).contiguous() for k in ks]

    def residual(
        self,
        code: Code,
        W_dec: Tensor,
        bias: Tensor | None,
        target: Tensor,
        columns: int,
        sums: Tensor | None,
        rounded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sparse_residual` of the codes of all ranks, target being this rank's rows [n, d].

        Returns columns of the residual [N, columns], sums of squares of this rank's rows [any], and
        the residual's products with this rank's chosen rows of W_dec [N, k].
        """
        return ops.sparse_residual(  # type: ignore[no-any-return]
            *code.matrices(), W_dec, bias, target, columns, sums, code.offsets, rounded
        )

    def prefix_residual(
        self,
        code: Code,
        model: SparseCoder,
        target: Tensor,
        widths: Tensor,
        shares: Tensor,
        columns: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`prefix_residual` of the codes of all ranks; widths count this rank's latents.

        Returns the table [P N, columns], for each rank its P n rows one after the other, sums of
        squares of this rank's rows [P, any], and the values' gradients.
        """
        table, squares, grads = ops.prefix_residual(
            *code.matrices(),
            model.W_dec,
            model.b_dec,
            target,
            widths,
            shares,
            columns,
            code.offsets,
        )
        return table.flatten(0, 1), squares, grads
