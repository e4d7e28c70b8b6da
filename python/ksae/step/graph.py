# SPDX-License-Identifier: Apache-2.0
"""Training steps as replays of a CUDA graph: what the host does for a step is done once.

A step of a small coder takes the GPU less time than the host needs to start its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .train_step import TrainStep
from .unfused import Metrics

WARM = 3  # steps of one kind that run eagerly before one is captured
Capture = Callable[[Callable[[], Metrics]], tuple[Metrics, Callable[[], None]]]


def why_not(step: TrainStep) -> str | None:
    """Why the steps of `step` cannot be captured; None if they can."""
    activation = step.model.activation
    if not step.model.W_enc.is_cuda:
        return f"the model is on {step.model.W_enc.device.type}"
    if not step.fused:
        return "the step is not fused"
    if step.model.ranks is not None:
        return "several processes share the coder"
    if activation.ragged:
        return f"the host has to know how many latents {type(activation).__name__} selects"
    return None


def capture(run: Callable[[], Metrics]) -> tuple[Metrics, Callable[[], None]]:
    """`run` as a CUDA graph: what it returned, and what takes it again. Other threads, as the one
    that pins batches, may allocate meanwhile."""
    graph = torch.cuda.CUDAGraph()
    stream = _stream(torch.cuda.current_device())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        metrics = run()
    return metrics, graph.replay


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """torch's own to capture on is of the device that was the first in use."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class StepGraph:
    """A `TrainStep`, called as one, that takes its steps by a CUDA graph where it can.

    After WARM steps of one kind (shapes, dtypes, k and penalty) the next is captured, and from then
    on a batch of that kind is copied to where the graph reads and the graph is replayed. A step of
    another kind drops the graph and begins anew. Steps for which a latent may be dead run eagerly,
    for what AuxK costs depends on how many are, and so does the first after a parameter was written
    from outside. The rate may
    change: the graph reads it from the device.

    Metrics of a replayed step are the graph's: the next step overwrites them.

    Args:
        step: takes the steps.
        by: makes a graph of a call.

    why: why no step is captured, from the start or since a capture has failed; None: they are.
    """

    def __init__(self, step: TrainStep, by: Capture = capture) -> None:
        self.step, self.by = step, by
        self.why = why_not(step)
        self._kind: Any = None
        self._warm = 0
        self._inputs: dict[str, Tensor] = {}
        self._metrics: Metrics = {}
        self._replay: Callable[[], None] | None = None

    def __call__(
        self, x: Tensor, y: Tensor | None = None, *, grad: Tensor | None = None
    ) -> Metrics:
        """As `TrainStep`."""
        given = {name: t for name, t in (("x", x), ("y", y), ("grad", grad)) if t is not None}
        if self.why is not None or not self._may_replay(given):
            return self._eagerly(given)
        if self._replay is None:
            self._capture(given)
        if self._replay is None:
            return self._eagerly(given)
        for name, t in given.items():
            self._inputs[name].copy_(t, non_blocking=True)
        self._replay()
        self._after(len(x.reshape(-1, x.shape[-1])))
        return dict(self._metrics)

    def _may_replay(self, given: dict[str, Tensor]) -> bool:
        """Whether this step is of a kind that was taken often enough, and AuxK idle in it."""
        step, dead = self.step, self._dead
        kind = (
            {name: (t.shape, t.dtype, t.device) for name, t in given.items()}, step.k, step.penalty,
            step.model.training,
        )  # fmt: skip
        if kind != self._kind:
            self._kind, self._warm, self._replay = kind, 0, None
        if self._warm < WARM or step.state.was_written():
            return False
        return dead is None or dead.most() == 0

    @property
    def _dead(self) -> Any:
        assert self.step._fused is not None
        return self.step._fused.dead_latents

    def _eagerly(self, given: dict[str, Tensor]) -> Metrics:
        self._warm += 1
        return self.step(**given)

    def _capture(self, given: dict[str, Tensor]) -> None:
        """Nothing runs meanwhile: the first replay takes this step."""
        self._inputs = {name: t.clone() for name, t in given.items()}
        dead = self._dead
        if dead is not None:
            dead.captured = True
        try:
            with torch.cuda.device_of(self.step.model.W_enc):  # type: ignore[no-untyped-call]
                self._metrics, self._replay = self.by(lambda: self.step(**self._inputs))
        except RuntimeError as error:
            self.why = f"the capture failed: {str(error).splitlines()[0]}"
        finally:
            if dead is not None:
                dead.captured = False

    def _after(self, N: int) -> None:
        """What the host does after a step, and a replay does not."""
        if self._dead is not None:
            self._dead.after_replay(N)
