# SPDX-License-Identifier: Apache-2.0
"""Timing, memory and the description of the machine, shared by the scripts of this folder."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

MIN_SAMPLE = 0.005  # seconds; shorter calls are repeated within a sample

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt in glibc


@dataclass(frozen=True)
class Times:
    """Median and quartiles of `n` samples, in seconds."""

    median: float
    q1: float
    q3: float
    n: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        q1, median, q3 = (
            statistics.quantiles(samples, n=4, method="inclusive")
            if len(samples) > 1
            else samples * 3
        )
        return Times(median, q1, q3, len(samples))


def interleave(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Time each of `ways` once a round, in an order that rotates, after two idle calls.

    Calls shorter than MIN_SAMPLE are repeated: their inputs are hot in the cache if they fit.
    """
    repeats = {}
    for name, call in ways.items():
        call()
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        repeats[name] = max(1, round(MIN_SAMPLE / max(taken, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            call, repeat = ways[name], repeats[name]
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            samples[name].append((time.perf_counter() - start) / repeat)
    return {name: Times.of(taken) for name, taken in samples.items()}


def peak_extra(call: Callable[[], Any]) -> int | None:
    """Bytes by which `call` raises the resident memory of this process; None where not on Linux.

    Memory that the C library keeps after it was freed is handed back first, or it would hide what
    `call` needs.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    before = _high_water()
    call()
    return _high_water() - before


def map_each_block(on: bool) -> None:
    """Let the C library map every block from 128 KB on by itself, and unmap it when freed, or not.

    If so from the start, resident memory is what is held; else it depends on how the heap is
    fragmented, which differs from step to step. "Not" is where the library's own limits end up once
    large blocks have been freed.
    """
    with contextlib.suppress(OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024 if on else 32 * 1024**2)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024 if on else 64 * 1024**2)


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def machine(**conditions: Any) -> dict[str, Any]:
    """What a record of timings has to say: hardware, versions, revision, the run's `conditions`."""
    from ksae import native

    record = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ksae": _version("ksae"),
        "revision": revision(),
        "isa": None,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if native.available():
        from ksae import _cpu

        record["isa"] = _cpu.isa()
    return record | conditions


def revision() -> str:
    """Commit of this checkout, marked where files differ from it."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def describe(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.items())


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned text; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        first, *others = row
        cells = [
            first.ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def write_json(path: str | None, record: Mapping[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(record, indent=1, default=_plain) + "\n")
        print(f"written to {path}")


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)
