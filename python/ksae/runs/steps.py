# SPDX-License-Identifier: Apache-2.0
"""How a run takes its steps: eagerly, or as replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ksae.step.graph import StepGraph
from ksae.step.train_step import TrainStep


class Steps:
    """A run's `TrainStep`; graph: the setting train.graph."""

    def __init__(self, step: TrainStep, graph: str) -> None:
        self.step = step
        self.graph = StepGraph(step) if graph == "auto" else None
        self._said: str | None = None

    def __call__(self, x: Tensor, y: Tensor | None, *, grad: Tensor | None) -> dict[str, Tensor]:
        """As `TrainStep`."""
        return (self.step if self.graph is None else self.graph)(x, y, grad=grad)

    def tell(self, say: Callable[[str], None]) -> None:
        """Say once of a run on a GPU why its steps run eagerly, though they need not."""
        if self.graph is None or not self.step.model.W_enc.is_cuda:
            return
        if self.graph.why not in (None, self._said):
            say(f"train.graph: steps run eagerly: {self.graph.why}")
        self._said = self.graph.why
