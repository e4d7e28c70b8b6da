# SPDX-License-Identifier: Apache-2.0
"""How gpu/run.py measures: shapes, data, timing on a device, ceilings, comparisons, rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..harness.costs import Cost
from ..harness.measure import Times
from ..harness.shapes import Shape
from . import rivals
from .report import Record

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
        if device == "cuda":
            self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def __call__(self, ways: Mapping[str, Way], cold: bool = True) -> dict[str, Times]:
        """Times of each way; with `cold`, L2 holds none of its inputs."""
        hosts, turn = {}, 0.0  # seconds that the host takes to queue a way; of all ways
        self.failed, self.extra = {}, {}
        for name, way in ways.items():
            try:
                if self.device == "cuda":
                    way()  # compiles, allocates
                self.wait()
                before = memory(reset=True)
                start = time.perf_counter()
                way()
                hosts[name] = time.perf_counter() - start
                self.wait()
                turn += time.perf_counter() - start + hosts[name] + 1e-3
                self.extra[name] = memory() - before
            except Exception as error:
                self.wait()
                self.failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        if self.device != "cuda":  # a dry run, whose times say nothing
            return {name: Times.of([seconds]) for name, seconds in hosts.items()}
        ways = {name: ways[name] for name in hosts}
        pairs: dict[str, list[Any]] = {name: [] for name in ways}
        names = list(ways)
        for n in range(max(1, min(self.rounds, int(self.seconds / turn))) if names else 0):
            shift = n % len(names)
            for name in names[shift:] + names[:shift]:
                if cold:
                    self.flush.zero_()
                # Queued while the device idles for longer than the host takes: some 2e9 cycles/s.
                torch.cuda._sleep(int(min(1.5 * hosts[name] + 5e-4, 0.1) * 2e9))
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                ways[name]()
                end.record()
                pairs[name].append((start, end))
            torch.cuda.synchronize()
        return {
            name: Times.of([a.elapsed_time(b) / 1e3 for a, b in taken])
            for name, taken in pairs.items()
        }

    def wall(self, way: Way) -> float:
        """Seconds a call among calls that are made one after the other, as in training."""

        def seconds(calls: int) -> float:
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                way()
            self.wait()
            return (time.perf_counter() - start) / calls

        one = seconds(1)
        return seconds(max(2, min(20, int(1 / one)))) if self.device == "cuda" else one

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


def measure_ceilings(record: Record, timer: Timer, tiny: bool) -> None:
    """Bytes/s of a copy, flop/s of a bf16 product, bytes/s of rows gathered from L2."""
    device = timer.device
    record.note("ceilings", **copy_and_product(timer, tiny))
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
            record.note("ceilings", **{f"gather {megabytes} MB, d={d}": rate})
            best = max(best, rate)
    record.note("ceilings", gather=best)


def add_rows(
    record: Record,
    timer: Timer,
    shape: Shape,
    op: str,
    ways: Mapping[str, Way],
    cost: Cost,
    gathered: float = 0,
) -> dict[str, Times]:
    """Measures ways, and adds a row of each. Fraction: of the time that ceilings allow to have
    taken, by formula."""
    times = timer(ways)
    ceilings = record.data["ceilings"]
    floor = 0.0
    if {"copy", "product", "gather"} <= ceilings.keys():
        floor = max(cost.bytes / ceilings["copy"], cost.flops / ceilings["product"])
        floor = gathered / ceilings["gather"] if gathered else floor
    for way, taken in times.items():
        record.row(
            shape=shape.name, op=op, way=way, **asdict(taken),
            bytes=cost.bytes, flops=cost.flops, gathered=gathered, fraction=floor / taken.median,
            extra_bytes=timer.extra[way],
        )  # fmt: skip
    for way, why in timer.failed.items():
        record.row(shape=shape.name, op=op, way=way, note=why)
        if "OutOfMemory" not in why:
            record.problem(f"{op} {shape.name} by {way}: {why}")
    return times


def check(
    record: Record,
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
        record.problem(f"{what}: {type(failure).__name__}: {str(failure)[:300]}")
        timer.wait()  # raises where the device does not survive it
        return
    if not error <= most:
        record.problem(f"{what}: relative error {error:.3g}, at most {most} was expected")
