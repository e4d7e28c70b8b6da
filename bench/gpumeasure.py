# SPDX-License-Identifier: Apache-2.0
"""How gpu.py measures: shapes, data, timing on a device, ceilings, comparisons, rows of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksae import ops

from . import gpurivals, measure
from .costs import Cost
from .gpureport import Record
from .measure import Times
from .shapes import Shape

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
    """A batch, weights and code of one shape, on the device."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        self.x = torch.randn(shape.N, shape.d, device=device).to(dtype)
        W = torch.randn(shape.F, shape.d, device=device)
        self.W = torch.nn.functional.normalize(W).to(dtype)
        self.b_enc, self.b_dec = (
            torch.zeros(n, device=device, dtype=dtype) for n in (shape.F, shape.d)
        )
        self.values, self.indices = ops.topk_encode(self.x, self.W, self.b_enc, shape.k)

    def product(self) -> None:
        """The encoder's product and nothing else."""
        for part in self.x.split(CHUNK):
            part @ self.W.T


class Timer:
    """Takes times on the device: `rounds` of each way, in turns."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        if device == "cuda":
            self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def __call__(self, ways: Mapping[str, Way], cold: bool = True) -> dict[str, Times]:
        """Times of each way; with `cold`, L2 holds none of its inputs."""

        if self.device != "cuda":
            taken = measure.interleave(ways, 0.0, least=2)
            return {name: Times.of(samples) for name, samples in taken.items()}
        for way in ways.values():
            way()
            way()
        torch.cuda.synchronize()
        pairs: dict[str, list[Any]] = {name: [] for name in ways}
        names = list(ways)
        for turn in range(self.rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if cold:
                    self.flush.zero_()
                torch.cuda._sleep(2_000_000)
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
            way = partial(gpurivals.decode, values, indices, table)
            taken = timer({"gather": way}, cold=False)["gather"]
            rate = N * k * d * table.element_size() / taken.median
            record.note("ceilings", **{f"gather {megabytes} MB, d={d}": rate})
            best = max(best, rate)
    record.note("ceilings", gather=best)


def add_rows(
    record: Record,
    shape: Shape,
    op: str,
    times: Mapping[str, Times],
    cost: Cost,
    gathered: float = 0,
) -> None:
    """A row a way. Fraction: of the time that ceilings allow to have taken, by formula."""
    ceilings = record.data["ceilings"]
    floor = max(cost.bytes / ceilings["copy"], cost.flops / ceilings["product"])
    floor = gathered / ceilings["gather"] if gathered else floor
    for way, taken in times.items():
        record.row(
            shape=shape.name, op=op, way=way, **asdict(taken),
            bytes=cost.bytes, flops=cost.flops, gathered=gathered, fraction=floor / taken.median,
        )  # fmt: skip


def check(record: Record, what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))
    if not error <= tolerance:
        record.problem(f"{what}: relative error {error:.3g}, at most {tolerance} was expected")
