# SPDX-License-Identifier: Apache-2.0
"""BatchTopK: the N*k largest pre-activations of a whole batch (arXiv 2412.06410)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ... import functional
from .base import Activation
from .topk import TopK

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder

ESTIMATORS = ("running", "saelens", "dictionary_learning")


@dataclass(frozen=True)
class BatchTopK(TopK):
    """relu(u) at the N*k largest pre-activations u of the N tokens of a training batch: k a token
    on average. In use (eval mode, `encode`) a token's code does not depend on the others: it is u
    where u > theta, which is learned from the smallest positive values of training batches.

    Args:
        k: active latents a token on average, in [1, F].
        threshold: how theta is estimated from m, a batch's smallest positive value:
            "running", the mean of the m of up to 100 batches, then theta + (m - theta) / 100;
            "saelens", from 0, theta + (m - theta) / 100 at each batch that has a positive value;
            "dictionary_learning", from the m (0 where no value is positive) of batch 1002 on,
            theta + (m - theta) / 1000, in float32. Before there is a theta, codes in use are those
            of training.

    The coder's buffers threshold [] float64, -1 if there is none, and threshold_batches [] int64
    are saved with it.

    Raises:
        ValueError: an unknown estimator. TypeError: k is no integer. What is out of range is
            refused by the coder.
    """

    threshold: str = "running"

    ragged: ClassVar[bool] = True
    reads_copy: ClassVar[bool] = False
    select_aux = Activation.select_aux

    def check(self, owner: str, F: int) -> None:
        super().check(owner, F)
        if self.threshold not in ESTIMATORS:
            wanted = ", ".join(ESTIMATORS)
            raise ValueError(f"{owner}: threshold must be one of {wanted}, got {self.threshold!r}")

    def buffers(self, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        start = 0.0 if self.threshold == "saelens" else -1.0
        return {
            "threshold": torch.tensor(start, dtype=torch.float64, device=device),
            "threshold_batches": torch.zeros((), dtype=torch.int64, device=device),
        }

    def select(
        self,
        coder: SparseCoder,
        rows: Tensor,
        k: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        b_dec = coder.b_dec if coder.centred else None
        return functional.batch_topk_encode(rows, coder.W_enc, coder.b_enc, k, b_dec)

    def infer(self, coder: SparseCoder, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
        theta = float(coder.get_buffer("threshold"))
        if theta < 0:
            return self.select(coder, rows, self.k, grad)
        b_dec = coder.b_dec if coder.centred else None
        return functional.threshold_encode(rows, coder.W_enc, coder.b_enc, theta, b_dec)

    @torch.no_grad()
    def observe(self, coder: SparseCoder, code: Code) -> None:
        theta, batches = coder.get_buffer("threshold"), coder.get_buffer("threshold_batches")
        batches += 1
        values = coder.observed(code.values)
        positive = values > 0
        least = torch.where(positive, values, torch.inf).min() if len(values) else values.sum()
        some = positive.any()
        if self.threshold == "dictionary_learning":
            theta.copy_(_of_dictionary_learning(theta, batches, torch.where(some, least, 0)))
            return
        m = torch.where(some, least, 0).double()
        if self.threshold == "saelens":
            new = 0.99 * theta + 0.01 * m
        else:
            seen = batches.clamp(max=100)
            new = torch.where(theta < 0, m, theta + (m - theta) / seen)
        theta.copy_(torch.where(some, new, theta))


def _of_dictionary_learning(theta: Tensor, batches: Tensor, least: Tensor) -> Tensor:
    """Its update, in float32: nothing up to step 1000, counted from 0; then an average from the
    first value on."""
    old, m = theta.float(), least.float()
    new = torch.where(old < 0, m, 0.999 * old + (1 - 0.999) * m)
    return torch.where(batches > 1001, new, old)
