# SPDX-License-Identifier: Apache-2.0
"""What an activation is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ... import functional
from ...ops import accumulator

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder


class Goal(NamedTuple):
    """What a penalty may read beside a training code."""

    rows: Tensor  # [N, d_in]
    target: Tensor  # [N, d_out], less what a skip connection predicts
    unit: Tensor  # [], what the loss divides squared errors by
    tokens: int | None = None  # of the whole batch; None: N
    elsewhere: Tensor | float = 0.0  # entries other than 0 that other ranks have


class Activation:
    """How the pre-activations of a coder become a sparse code.

    A value without state: what it has to remember are buffers that the coder holds for it.
    """

    k: int  # entries a token, on average or at most; 0: as many as there are
    reads_copy: ClassVar[bool] = False  # `select` takes W_bf16
    ragged: ClassVar[bool] = False  # codes have row offsets: a number of entries of each row's own
    other_k: ClassVar[bool] = True  # a row's first entries are its code with a smaller k
    of_input: ClassVar[bool] = False  # predicts what it reads: no activation of a transcoder
    # training codes keep the entries' pre-activations, of which `values_of` makes the values and
    # `penalty_of` what is added to the loss
    penalized: ClassVar[bool] = False
    identity: ClassVar[bool] = True  # values are pre-activations, and have their gradient
    keeps_zeros: ClassVar[bool] = False  # values of 0 have a gradient that `values_of` passes on
    opens_more: ClassVar[bool] = False  # entries with value 0 may have a gradient beside that one
    needs_gradient: ClassVar[bool] = False  # selects by the gradient of a downstream loss too

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

    def at_least(self) -> dict[str, float]:
        """Of `parameters`, by name, those that a step keeps from falling below a number."""
        return {}

    @property
    def fused_refuses(self) -> str | None:
        """The option that the fused step does not serve, if there is one."""
        return None

    def own(self, coder: SparseCoder) -> dict[str, Tensor]:
        """What `values_of` and `penalty_of` have a gradient for besides the entries: vectors [F]
        among the coder's parameters, by name."""
        return {}

    @property
    def weighs_norms(self) -> bool:
        """Whether `penalty_of` also gets "norms" [F], those of the rows of W_dec."""
        return False

    def all_of(self, coder: SparseCoder) -> dict[str, Tensor]:
        """What `penalty_of` gets as `own`."""
        own = self.own(coder)
        if self.weighs_norms:
            own["norms"] = coder.W_dec.to(accumulator(coder.W_dec.dtype)).norm(dim=1)
        return own

    def values_of(self, own: Mapping[str, Tensor], pre: Tensor, indices: Tensor) -> Tensor:
        """The values [E] of entries with pre-activations [E], in the accumulator's type."""
        return pre

    def penalty_of(
        self, own: Mapping[str, Tensor], coder: SparseCoder, goal: Goal, code: Code
    ) -> Tensor:
        """What is added to the loss for a training code, 0-d; other parameters than `own` are
        constants in it, unless `fused_refuses` says so."""
        raise NotImplementedError

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

    def observe(self, coder: SparseCoder, code: Code) -> None:
        """Note the code of a training batch."""

    def scheduled(self, k: int | None, penalty: float) -> Activation:
        """The activation of one training step: with k latents a token instead of its own, unless
        None, and its penalty times `penalty`."""
        return self

    def is_dense(self, coder: SparseCoder) -> bool:
        """Whether so many latents were active in the last batch that dense products are faster."""
        return False

    def encoder(self, coder: SparseCoder) -> tuple[Tensor, Tensor]:
        """The rows [F, d_in] and the bias [F] that make pre-activations."""
        return coder.W_enc, coder.b_enc

    def encode_dead(self, coder: SparseCoder, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [N, k] of the k largest dead pre-activations: the code of AuxK."""
        b_dec = coder.b_dec if coder.centred else None
        return functional.topk_encode(rows, *self.encoder(coder), k, b_dec, coder.dead)

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
        return (*self.select(coder, rows, k, grad, W_bf16), *coder.encode_dead(rows, k_aux))
