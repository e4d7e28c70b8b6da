# SPDX-License-Identifier: Apache-2.0
"""How gpu/run.py measures: shapes, data, timing on a device, ceilings, comparisons, rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..harness.clock import HOST, CudaClock, interleave
from ..harness.costs import Cost
from ..harness.measure import Times
from ..harness.record import Kept, Row
from ..harness.session import Session
from ..harness.shapes import Shape
from . import rivals
from .report import SUITE

CHUNK = 8192  # rows of scores that are held at once
Way = Callable[[], Any]


SHAPES = (
    Shape("B", 8192, 768, 24576, 32),
    Shape("A", 8192, 4096, 131072, 64),
    Shape("B-65536", 65536, 768, 24576, 32),
    Shape("A-65536", 65536, 4096, 131072, 64),
)
TINY = (Shape("B", 9, 16, 40, 4), Shape("A", 7, 24, 50, 3))


class Inputs:
    """A batch, weights and code of one shape, on the device; of plain torch."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        self.x = torch.randn(shape.N, shape.d, device=device).to(dtype)
        W = torch.randn(shape.F, shape.d, device=device)
        self.W = torch.nn.functional.normalize(W).to(dtype)
        self.b_enc, self.b_dec = (
            torch.zeros(n, device=device, dtype=dtype) for n in (shape.F, shape.d)
        )
        chosen = [(part @ self.W.T).topk(shape.k) for part in self.x.split(CHUNK)]
        self.values, self.indices = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        self.values = self.values.relu()

    def product(self) -> None:
        """The encoder's product and nothing else."""
        for part in self.x.split(CHUNK):
            part @ self.W.T


class Timer:
    """Takes times on the device: at most `rounds` of each way, in turns, in some `seconds`.

    A way that raises has no time: `failed` says why. An error that the device does not survive is
    raised.
    """

    def __init__(self, device: str, rounds: int, seconds: float = 4.0) -> None:
        self.device, self.rounds, self.seconds = device, rounds, seconds
        self.failed: dict[str, str] = {}
        self.extra: dict[str, int] = {}  # bytes that a call of a way has allocated at most
        self.clock = CudaClock() if device == "cuda" else HOST

    def __call__(self, ways: Mapping[str, Way], cold: bool = True) -> dict[str, Times]:
        """Times of each way; with `cold`, L2 holds none of its inputs."""
        idle: dict[str, float] = {}
        self.failed, self.extra = {}, {}
        cuda = isinstance(self.clock, CudaClock)
        if cuda:
            self.clock.cold = cold
        for name, way in ways.items():
            try:
                if cuda:
                    way()  # compiles, allocates
                self.wait()
                before = memory(reset=True)
                idle[name] = self.clock.time(way)
                self.extra[name] = memory() - before
            except Exception as error:
                self.wait()
                self.failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        if not cuda:  # a dry run, whose times say nothing
            return {name: Times.of([seconds]) for name, seconds in idle.items()}
        ways = {name: ways[name] for name in idle}
        samples = interleave(
            ways, self.seconds, most=self.rounds, least=1, clock=self.clock, idle=idle
        )
        self.clock.hosts.clear()  # they hold the ways, and what these hold of the device's memory
        return {name: Times.of(taken) for name, taken in samples.items()}

    def wall(self, way: Way) -> float:
        """Seconds a call among calls that are made one after the other, as in training."""
        one = HOST.time(way)
        calls = max(2, min(20, int(1 / one)))
        return HOST.time(way, repeat=calls) if self.device == "cuda" else one

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def memory(reset: bool = False) -> int:
    """Bytes allocated on the GPU: now, with `reset`; else the most since then."""
    if not torch.cuda.is_available():
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def copy_and_product(timer: Timer, tiny: bool) -> dict[str, float]:
    source = torch.randn(2**12 if tiny else 2**28, device=timer.device)
    target = torch.empty_like(source)
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=timer.device).bfloat16() for _ in range(2))
    times = timer({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {
        "copy": 2 * source.nbytes / times["copy"].median,
        "product": 2 * n**3 / times["product"].median,
    }


def measure_ceilings(session: Session, timer: Timer, tiny: bool) -> None:
    """Bytes/s of a copy, flop/s of a bf16 product, bytes/s of rows gathered from L2."""
    device = timer.device
    session.fact("ceilings", **copy_and_product(timer, tiny))
    best = 0.0
    dtype = torch.float32 if tiny else torch.bfloat16
    for megabytes in (8, 32):
        for d in (128, 512, 2048):
            rows = 64 if tiny else (megabytes << 20) // (2 * d)
            N, k = (2, 2) if tiny else (8192, 64)
            table = torch.randn(rows, d, device=device).to(dtype)
            indices = torch.randint(rows, (N, k), device=device)
            values = torch.randn(N, k, device=device).to(dtype)
            way = partial(rivals.decode, values, indices, table)
            taken = timer({"gather": way}, cold=False)["gather"]
            rate = N * k * d * table.element_size() / taken.median
            session.fact("ceilings", **{f"gather {megabytes} MB, d={d}": rate})
            best = max(best, rate)
    session.fact("ceilings", gather=best)


def add_rows(
    session: Session,
    timer: Timer,
    shape: Shape,
    op: str,
    ways: Mapping[str, Way],
    cost: Cost,
    gathered: float = 0,
) -> dict[str, Times]:
    """Measures ways, and adds a row of each, with the time that ceilings allow to have taken, by
    formula."""
    times = timer(ways)
    ceilings = session.suite.facts.get("ceilings", {})
    floor = None
    if {"copy", "product", "gather"} <= ceilings.keys():
        floor = max(cost.bytes / ceilings["copy"], cost.flops / ceilings["product"])
        floor = gathered / ceilings["gather"] if gathered else floor
    for way in ways:
        taken = times.get(way)
        session.add(
            Row(
                SUITE,
                shape.name,
                op,
                "step" if op == "step" else "forward",
                way,
                ours=way.startswith("ksae"),
                kept=Kept(taken, [taken.q1]) if taken else None,
                shape=shape.sizes,
                dtype="fp32" if "float32" in f"{op} {way}" else "bf16",
                bytes=cost.bytes,
                flops=cost.flops,
                floor=floor,
                peak=timer.extra.get(way),
                failure=timer.failed.get(way),
                extra={"gathered": gathered} if gathered else {},
            )
        )
    for way, why in timer.failed.items():
        if "OutOfMemory" not in why:
            session.problem(f"{op} {shape.name} by {way}: {why}")
    return times


def check(
    session: Session,
    timer: Timer,
    what: str,
    got: Callable[[], Tensor],
    want: Tensor | Callable[[], Tensor],
    most: float,
) -> None:
    """Notes a problem where the relative error is above `most`, or there is no result."""
    try:
        result = got().float()
        wanted = (want if isinstance(want, Tensor) else want()).float()
        error = float((result - wanted).norm() / wanted.norm().clamp_min(1e-30))
    except Exception as failure:
        session.problem(f"{what}: {type(failure).__name__}: {str(failure)[:300]}")
        timer.wait()  # raises where the device does not survive it
        return
    if not error <= most:
        session.problem(f"{what}: relative error {error:.3g}, at most {most} was expected")
