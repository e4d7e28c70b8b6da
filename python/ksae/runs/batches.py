# SPDX-License-Identifier: Apache-2.0
"""The batches of a run, as a function of its configuration and the step."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from ksae.activations import ActivationSource, prefetch
from ksae.activations.transfer import CopyStream, staged
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError
from ksae.runs.config import TrainConfig

Batch = tuple[Tensor, "Tensor | None", "Tensor | None"]  # x, y and the gradient, each [N, d]


class Batches:
    """What `source` gives a run of `model`, on the model's device."""

    def __init__(self, model: SparseCoder, source: ActivationSource, config: TrainConfig) -> None:
        self.source, self.config = source, config
        self.parameter = model.W_dec
        self.needs_gradient = model.needs_gradient
        self._copies = CopyStream(self.parameter.device)

    def stream(self, start: int) -> Generator[Batch, None, None]:
        """The batches from step `start` on, as a generator that can be closed."""
        config = self.config
        place = {"seed": config.seed, "start_step": start}
        batches: Iterator[Batch]
        if self.needs_gradient:
            batches = self.source.gradient_batches(config.batch_size, **place)
        else:
            plain = self.source.batches(config.batch_size, **place)
            batches = ((x, y, None) for x, y in plain)
        batches = (self._staged(batch) for batch in batches)
        if config.prefetch == 0:
            yield from batches
            return
        with prefetch(batches, config.prefetch) as ahead:
            yield from ahead

    def next(self, batches: Iterator[Batch], step: int) -> Batch:
        """The batch of `step`, in the dtype of the weights."""
        try:
            x, y, g = next(batches)
        except StopIteration:
            raise UserError(
                f"train: {self.source.name} ended before step {step + 1}: "
                "it must give batches without end"
            ) from None
        if len(x) == 0:
            raise UserError(f"train: {self.source.name} gave an empty batch at step {step + 1}")
        dtype = self.parameter.dtype
        placed, *rest = self._copies([x, y, g], [dtype, dtype, None])
        assert placed is not None
        return placed, rest[0], rest[1]

    def at(self, step: int) -> Batch:
        """The batch of a step, read again."""
        with contextlib.closing(self.stream(step)) as batches:
            return self.next(batches, step)

    def first(self, tokens: int) -> tuple[Tensor, Tensor | None]:
        """The first `tokens` rows and their targets."""
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        with contextlib.closing(self.stream(0)) as batches:
            while sum(map(len, xs)) < tokens:
                x, y, _ = self.next(batches, len(xs))
                xs.append(x)
                if y is not None:
                    ys.append(y)
        return torch.cat(xs)[:tokens], torch.cat(ys)[:tokens] if ys else None

    def _staged(self, batch: Batch) -> Batch:
        """In the thread that fetches batches ahead, if there is one."""
        x, y, g = batch
        device, dtype = self.parameter.device, self.parameter.dtype
        return (
            staged(x, device, dtype),
            None if y is None else staged(y, device, dtype),
            # a gradient is scaled before it is rounded to the parameters' dtype
            None if g is None else staged(g, device),
        )
