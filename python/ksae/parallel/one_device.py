# SPDX-License-Identifier: Apache-2.0
"""What the phases of a step exchange, for a coder that lies whole on one device: nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..coders.code import Code
from ..coders.coder import SparseCoder

# Values and indices [N, k] and, on one device, row offsets and pre-activations; of shards, by what
# was chosen: scores [N, k] float32, None being the values
Selected = tuple[Any, ...]


class OneDevice:
    """The communicator of a coder that lies whole on one device: every exchange is the identity.

    `Shards` replaces the methods; the phases of a step stay as they are. n tokens are a rank's own,
    N = R n those of all ranks.
    """

    rank, size = 0, 1  # this rank, R

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        """Raise an error on every rank if `facts` differ between ranks."""

    def refuse(self, what: str, error: Exception) -> None:
        """Let the other ranks know that this one raises an error instead of `agree`."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks [N, columns], from this one's [n, columns]."""
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """This rank's rows [n, columns] of [N, columns]."""
        return rows

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum over all ranks of a partial sum or count, of any shape."""
        return part

    def variance(self, y: Tensor) -> Tensor:
        """`total_variance` of the rows of all ranks: [], from this one's [n, d]."""
        return ops.total_variance(y)  # type: ignore[no-any-return]

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
        self, values: Tensor, indices: Tensor, offsets: Tensor | None, ks: Sequence[int]
    ) -> list[Code]:
        """From the best of this rank's latents, as `select` gives them [N, at least k], those of
        the best k of all ranks, for each k of ks; entries of value 0 fill the rows."""
        wide = Code(values, indices, offsets)  # sorted: the best are a prefix
        return [wide.first(k).contiguous() for k in ks]

    def residual(
        self,
        code: Code,
        W_dec: Tensor,
        bias: Tensor | None,
        target: Tensor,
        columns: int,
        sums: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sparse_residual` of the codes of all ranks, target being this rank's rows [n, d].

        Returns columns of the residual [N, columns], sums of its squares [any], and its products
        with this rank's chosen rows of W_dec [N, k].
        """
        return ops.sparse_residual(  # type: ignore[no-any-return]
            *code.matrices(), W_dec, bias, target, columns, sums, code.offsets
        )
