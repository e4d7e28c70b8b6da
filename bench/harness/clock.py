# SPDX-License-Identifier: Apache-2.0
"""How times are taken: the clock, the host's or a CUDA device's, and whose turn it is.

torch is imported where it is used: what only reads and writes records starts without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

LONG = 0.1  # seconds; one idle call is enough before such a one
Way = Callable[[], Any]


class Clock:
    """The host's, which waits for a GPU's work."""

    # Seconds; shorter calls are repeated within a sample. Well below a scheduler's time slice, so
    # that where the machine does other things as well most samples are whole.
    shortest = 0.0003
    far: float = 8  # times the fastest: slower ways are timed seldom

    def time(self, call: Way, repeat: int = 1, slow: float = 0.0) -> float:
        """Seconds of one call, the mean of `repeat`; slow: a share that is added, by waiting."""
        import torch

        wait = torch.cuda.synchronize if torch.cuda.is_available() else None
        if wait:
            wait()
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        if wait:
            wait()
        end = time.perf_counter()
        if slow:
            until = end + slow * (end - start)
            while end < until:  # busy, as a slower kernel would be
                end = time.perf_counter()
        return (end - start) / repeat


class CudaClock(Clock):
    """CUDA events around one call that was queued behind an idle kernel, so that the host's time to
    launch does not count; cold: L2, which is overwritten before, holds none of its inputs."""

    shortest = 0.0  # the second call would find its inputs in L2
    far = math.inf

    def __init__(self, cold: bool = True) -> None:
        import torch

        self.cold = cold
        self.hosts: dict[Way, float] = {}  # seconds that the host takes to queue a call
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def time(self, call: Way, repeat: int = 1, slow: float = 0.0) -> float:
        import torch

        if self.cold:
            self._flush.zero_()
        # Queued while the device idles for longer than the host takes: some 2e9 cycles/s.
        idle = min(1.5 * self.hosts.get(call, 0.0) + 5e-4, 0.1)
        torch.cuda._sleep(int(idle * 2e9))  # type: ignore[no-untyped-call]
        event: Any = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        before = time.perf_counter()
        for _ in range(repeat):
            call()
        self.hosts[call] = time.perf_counter() - before
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeat


HOST = Clock()
timed = HOST.time


def interleave(
    ways: Mapping[str, Way],
    seconds: float,
    *,
    most: int = 100,
    least: int = 3,
    slow: Mapping[str, float] | None = None,
    clock: Clock = HOST,
    idle: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each of `ways`, once a round in an order that rotates, after two idle calls, or
    `idle`, the seconds that such calls took.

    Rounds end after `seconds` (but not before `least`) or after `most`. Ways that take more than
    the clock's `far` times as long as the fastest take part in the first round and in every
    sixteenth; those of LONG calls in two rounds, and in more while there is time.
    Calls shorter than the clock's `shortest` are repeated: their inputs are hot in the cache if
    they fit.
    """
    end = time.perf_counter() + seconds
    slow = slow or {}
    taken = dict(idle or {})
    for name, call in ways.items() if idle is None else ():
        first = clock.time(call, slow=slow.get(name, 0.0))
        taken[name] = first if first > LONG else clock.time(call)
    far = clock.far * min(taken.values(), default=0)
    repeats = {name: max(1, round(clock.shortest / max(t, 1e-7))) for name, t in taken.items()}
    # Of a way that is both long and far behind, the idle call is the sample of the first round.
    samples = {name: [t] if t > max(LONG, far) else [] for name, t in taken.items()}
    names = list(ways)
    for round_ in range(most if names else 0):
        turn = round_ % len(names)
        late = time.perf_counter() > end
        for name in names[turn:] + names[:turn]:
            if late and round_ >= 2 and taken[name] > LONG:
                continue
            if taken[name] <= far or (round_ % 16 == 0 and (round_ or not samples[name])):
                samples[name].append(clock.time(ways[name], repeats[name], slow.get(name, 0.0)))
        if round_ + 1 >= least and time.perf_counter() > end:
            break
    return samples
