# SPDX-License-Identifier: Apache-2.0
"""Medians, memory and the description of the machine, shared by all suites.

KSAE_BENCH_SLOW=op:share makes every timed call of that op of ksae take (1 + share) times as long;
it exists for the test of `ksae bench --compare`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"  # the revision of a package that is installed
IDLE = 0.5  # load average that an idle machine may have

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


def slow_share(op: str) -> float:
    """By how much KSAE_BENCH_SLOW slows the calls of `op`."""
    named, _, share = os.environ.get("KSAE_BENCH_SLOW", "").partition(":")
    return float(share) if named == op and share else 0.0


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
    import torch

    from ksae.backends import cpu as native

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
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else of a repository around it
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def busy(threads: int) -> str | None:
    """A warning if other work already takes cores that the run would use."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on this system
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    if load + threads <= cores + IDLE:
        return None
    return (
        f"Busy: load average {load:.1f} on {cores} core{'s' * (cores != 1)} before the start, "
        f"with {threads} wanted: times are too long and less certain."
    )


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


def write_json(path: str | Path, record: Mapping[str, Any], expand: int = 2) -> None:
    """Whole or not at all: written to another name, then renamed.

    Each value below `expand` levels of objects and lists is on one line.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(_lines(record, expand) + "\n")
    partial.replace(path)


def _lines(value: Any, expand: int) -> str:
    if not expand or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, default=_plain)
    if isinstance(value, list):
        return "[\n" + ",\n".join(_lines(v, expand - 1) for v in value) + "\n]"
    named = (f"{json.dumps(str(k))}: {_lines(v, expand - 1)}" for k, v in value.items())
    return "{\n" + ",\n".join(named) + "\n}"


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)
