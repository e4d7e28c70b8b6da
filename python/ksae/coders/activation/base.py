# SPDX-License-Identifier: Apache-2.0
"""What an activation is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder


class Activation:
    """How the pre-activations of a coder become a sparse code.

    A value without state: what it has to remember are buffers that the coder holds for it.
    """

    k: int  # entries a token, on average or at most; 0: as many as there are
    ragged: ClassVar[bool] = False  # codes have row offsets: a number of entries of each row's own
    penalized: ClassVar[bool] = False  # a penalty beside the loss, of parameters of its own
    needs_gradient: ClassVar[bool] = False  # selects by the gradient of a downstream loss too
    observes: ClassVar[bool] = False  # notes something of the smallest value of a training batch

    def check(self, owner: str, F: int) -> None:
        """Refuse options that are out of range for a coder of F latents.

        Raises:
            ValueError: one is; the message names `owner`.
        """
        raise NotImplementedError

    def fields(self) -> dict[str, Any]:
        """Name and constructor arguments, plain values only: what `from_fields` takes."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    def options(self) -> dict[str, Any]:
        """Constructor arguments besides k, plain values only."""
        return {}

    def buffers(self, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What the coder saves for it, by name. They keep their dtype when the coder is cast."""
        return {}

    def parameters(self, F: int, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What a step updates for it beside the weights, by name: where these start."""
        return {}

    @property
    def fused_refuses(self) -> str | None:
        """The option that the fused step does not serve, if there is one."""
        return None

    def penalty_of(self, coder: SparseCoder, rows: Tensor, code: Code) -> Tensor | None:
        """What is added to the loss for the training code of rows [N, d_in], if anything is."""
        return None

    def gradients(
        self, coder: SparseCoder, x: Tensor, grad: Tensor | None, training: bool
    ) -> Tensor | None:
        """The rows [N, d_out] of a downstream gradient grad [..., d_out], as `select` takes it;
        most activations take none.

        Raises:
            ValueError: grad is missing, does not fit or is of no use.
        """
        if grad is not None:
            raise ValueError(
                f"{type(coder).__name__}: grad must be None, for it selects without one, got a"
                " tensor: see GradTopKSAE and GradTopKTranscoder"
            )
        return None

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """The fields of the `Code` that rows [N, d_in] get in training, of k latents a row; W_bf16:
        that of W_enc and its norms, where they are kept."""
        raise NotImplementedError

    def infer(self, coder: SparseCoder, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
        """The same for use: a row's code depends on that row alone."""
        return self.select(coder, rows, self.k, grad)

    def observe(self, coder: SparseCoder, values: Tensor) -> None:
        """Note the smallest positive one of the values [E] of a training batch's code."""

    def select_aux(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """What `select` returns, then values and indices [N, k_aux] of dead latents, for AuxK."""
        raise NotImplementedError
