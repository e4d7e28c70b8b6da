# SPDX-License-Identifier: Apache-2.0
"""How many latents are dead, known on the host without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ..coders.coder import SparseCoder

LAG = 4  # steps between a count and its use
PADDED = 256


class _Count(NamedTuple):
    number: Tensor  # [] on the host, once the event has passed
    arrived: torch.cuda.Event | None
    within: int  # latents are counted that may be dead after so many more tokens


class DeadLatents:
    """An upper bound of the number of dead latents, from a count of some steps ago.

    A latent that is dead now was silent for more than dead_after - n tokens before the last n
    tokens. So those that were silent for that long then are no fewer than the dead ones now: they
    are counted LAG steps ahead, for an n of LAG times the largest batch so far, and the number is
    on its way to the host meanwhile. Where more tokens have come since, or the counters were
    written from outside, the device is asked, which waits for it; so it is at the first step.
    """

    def __init__(self, model: SparseCoder) -> None:
        self.model = model
        self._counts: deque[_Count] = deque()
        self._tokens: deque[int] = deque()  # of the step before each count
        self._version, self._largest = -1, 0
        self._unseen = False  # a CUDA graph may take steps of which nobody tells
        self.captured = False  # while one is captured that is replayed where none are dead alone
        self._of_graph: tuple[Tensor, int] | None = None  # where it leaves its count, and `within`

    def most(self) -> int | None:
        """At least as many as are dead now; 0 if none are; None if that cannot be said."""
        if self.captured:
            return 0
        since = self.model.tokens_since_fired
        if since.is_cuda and torch.cuda.is_current_stream_capturing():
            self._unseen = True
        if self._unseen:
            return None
        if since._version != self._version:
            self._counts.clear()
            self._tokens.clear()
        if self._counts:
            count, come = self._counts[0], sum(self._tokens)
            if len(self._counts) >= LAG:
                self._counts.popleft()
                self._tokens.popleft()
            if come <= count.within:
                if count.arrived is not None:
                    count.arrived.synchronize()  # of LAG steps ago, but for the first steps
                return int(count.number)
        return int(self.model.dead.sum())

    def within(self, N: int) -> int:
        """After a step of N tokens, latents are counted that may be dead after so many more."""
        return LAG * max(self._largest, N)

    def after_step(self, N: int, number: Tensor) -> None:
        """The counters are those after a step of N tokens; number: of the latents that may be dead
        after `within(N)` more, []."""
        if self.captured:
            self._of_graph = number, self.within(N)
            return
        self._note(N, number, self.within(N))

    def after_replay(self, N: int) -> None:
        """The same after a step that a graph has taken, which counts as when it was captured."""
        assert self._of_graph is not None
        self._note(N, *self._of_graph)

    def _note(self, N: int, number: Tensor, within: int) -> None:
        arrived = None
        self._largest = max(self._largest, N)
        self._version = self.model.tokens_since_fired._version
        if self._unseen:
            return
        if number.is_cuda:
            device = number.device
            number = number.to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream(device).record_event()
        self._tokens.append(N)
        self._counts.append(_Count(number, arrived, within))


def padded(number: int, F: int) -> int:
    """A number of latents, rounded up so that a kernel meets few sizes; at most F."""
    return min(-(-number // PADDED) * PADDED, F)
