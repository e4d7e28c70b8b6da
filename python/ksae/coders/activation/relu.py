# SPDX-License-Identifier: Apache-2.0
"""ReLU: every positive pre-activation, with a penalty on their sum (arXiv 2309.08600)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import functional
from ...reference import sparsity
from ..config import integer, integers
from .above import Above
from .base import Goal

if TYPE_CHECKING:
    from ..code import Code
    from ..coder import SparseCoder


@dataclass(frozen=True)
class ReLU(Above):
    """relu(u) of all pre-activations u; the loss has, beside the reconstruction's, l1 times the
    mean over tokens of sum f_i |W_dec[i]|.

    Args:
        l1: weight of the penalty, >= 0.
        decoder_norm: weigh values by the norms of decoder rows, so that small values with large
            rows are no way out (as SAELens); False: sum f_i (as dictionary_learning, whose rows are
            unit).
        p_end: anneal the penalty's power p from 1 to it, in (0, 1) (arXiv 2408.00113; as
            dictionary_learning's PAnneal): sum (f_i |W_dec[i]|)^p. None: p stays 1.
        p_steps: first and last batch of annealing, counted from 0. At each of `updates` batches
            evenly spaced between them p takes its next value, and l1 is multiplied by the mean of
            the penalty with the old p over that with the new, of the last `queue` batches.
        root: take the power 1/p of each token's sum, which is then a norm.

    While a training code holds more than one in 16 latents, training has dense products. The
    coder's buffer anneal [3] float64 (batches, updates done, l1's factor) and anneal_queue
    [queue, 2] float64 are saved with it where p_end is given.

    Raises:
        ValueError: by the coder, an argument out of range.
    """

    l1: float = 1e-3
    decoder_norm: bool = True
    p_end: float | None = None
    p_steps: Sequence[int] = (15_000, 100_000)
    updates: int = 10
    queue: int = 10
    root: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "p_steps", tuple(integers("ReLU", "p_steps", self.p_steps)))
        for name in ("updates", "queue"):
            object.__setattr__(self, name, integer("ReLU", name, getattr(self, name)))

    def check(self, owner: str, F: int) -> None:
        if not 0 <= self.l1 < math.inf:
            raise ValueError(f"{owner}: l1 must be a finite number >= 0, got {self.l1}")
        if self.p_end is None:
            return
        if not 0 < self.p_end < 1:
            raise ValueError(f"{owner}: p_end must be in (0, 1) or None, got {self.p_end}")
        steps = self.p_steps
        if len(steps) != 2 or not 0 <= steps[0] < steps[1]:
            want = "two batches that rise, from 0 on"
            raise ValueError(f"{owner}: p_steps must be {want}, got {list(steps)}")
        for name, least in (("updates", 2), ("queue", 1)):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise ValueError(f"{owner}: {name} must be at least {least}, got {got}")

    def fields(self) -> dict[str, Any]:
        fields = super().fields()
        return fields | {"p_steps": list(self.p_steps)}

    def buffers(self, acc: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        buffers = super().buffers(acc, device)
        if self.p_end is not None:
            kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
            buffers["anneal"] = torch.tensor([0.0, 0.0, 1.0], **kind)
            buffers["anneal_queue"] = torch.zeros(self.queue, 2, **kind)
        return buffers

    def scheduled(self, k: int | None, penalty: float) -> ReLU:
        return replace(self, l1=penalty * self.l1)

    def infer(self, coder: SparseCoder, rows: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
        b_dec = coder.b_dec if coder.centred else None
        return functional.threshold_encode(rows, coder.W_enc, coder.b_enc, 0.0, b_dec)

    @property
    def weighs_norms(self) -> bool:
        return self.decoder_norm

    def penalty_of(
        self, own: Mapping[str, Tensor], coder: SparseCoder, goal: Goal, code: Code
    ) -> Tensor:
        p, factor = 1.0, 1.0
        if self.p_end is not None:
            _, done, factor = coder.found("anneal").tolist()
            p = self._power(int(done))
        norms = own["norms"].index_select(0, code.indices) if self.decoder_norm else None
        return self.l1 * factor * self._norm(code, norms, len(goal.rows), p)

    def _norm(self, code: Code, norms: Tensor | None, N: int, p: float) -> Tensor:
        values = code.values if norms is None else code.values.to(norms.dtype)
        return sparsity.power_penalty(values, norms, code.rows(), N, p, self.root)

    def _power(self, done: int) -> float:
        """p after so many updates; the first one takes up the value 1 that it had."""
        assert self.p_end is not None
        at = min(max(done - 1, 0), self.updates - 1)
        return 1 + (self.p_end - 1) * at / (self.updates - 1)

    @torch.no_grad()
    def observe(self, coder: SparseCoder, code: Code) -> None:
        super().observe(coder, code)
        if self.p_end is None:
            return
        anneal, queue = coder.get_buffer("anneal"), coder.get_buffer("anneal_queue")
        batch, done, factor = anneal.tolist()
        if done:
            norms = self.all_of(coder)["norms"][code.indices] if self.decoder_norm else None
            assert code.offsets is not None
            N = len(code.offsets) - 1
            pair = [self._norm(code, norms, N, self._power(int(done) + i)) for i in (0, 1)]
            newest = coder.of_batch(torch.stack(pair).double())  # only their ratio counts
            queue.copy_(torch.cat([queue[1:], newest[None]]))
        first, last = self.p_steps
        due = first + int((last - first) * done / (self.updates - 1))
        if done < self.updates and batch >= due:
            if done:
                now, following = queue.sum(0).tolist()  # rows of zeros are not there yet
                factor *= now / following if following > 0 else 1.0
            done += 1
        anneal.copy_(torch.tensor([batch + 1, done, factor], dtype=anneal.dtype))
