# SPDX-License-Identifier: Apache-2.0
"""What an activation is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..coder import SparseCoder


class Activation:
    """How the pre-activations of a coder become a sparse code.

    A value without state: what it has to remember are buffers that the coder holds for it.
    """

    k: int  # entries a token
    needs_gradient: ClassVar[bool] = False  # selects by the gradient of a downstream loss too

    def check(self, owner: str, F: int) -> None:
        """Refuse options that are out of range for a coder of F latents.

        Raises:
            ValueError: one is; the message names `owner`.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Constructor arguments besides k, plain values only."""
        return {}

    def buffers(self, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What the coder saves for it, by name. They keep their dtype when the coder is cast."""
        return {}

    def gradients(
        self, coder: SparseCoder, x: Tensor, grad: Tensor | None, training: bool
    ) -> Tensor | None:
        """The rows [N, d_out] of a downstream gradient grad [..., d_out], as `select` takes it.

        Raises:
            ValueError: grad is missing, does not fit or is of no use.
        """
        raise NotImplementedError

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Values and indices [N, k] of the k latents that rows [N, d_in] choose; W_bf16: that of
        W_enc and its norms, where they are kept."""
        raise NotImplementedError

    def select_aux(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `select` returns, then the code [N, k_aux] of AuxK, of dead latents alone."""
        raise NotImplementedError
