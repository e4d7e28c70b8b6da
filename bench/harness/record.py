# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: rows of all suites in one JSON file, written as it goes.

{"schema": 2, "machine": {...}, "mode": "quick", "conditions": {...}, "state": "complete",
 "suites": {name: {"seconds": s, "state": ..., "facts": {...}, "notes": [...], "rows": [...],
                   "start": t, "budget": s, "problems": [...]}}}

A row is a line. Of its samples the file keeps what is read again: "times", median, quartiles and
number of all, and "lows", the lower quartile of each block. Fields at their default are left out.
Files of schema 1 hold every sample in "blocks", and are read as well, as are those without the last
three of a suite.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from .measure import Times, write_json

SCHEMA, READ = 2, (1, 2)
DIGITS = 9  # of a time in the file
Key = tuple[str, str, str, str, str]


@dataclass
class Row:
    """One way of doing one thing at one shape.

    Times are in blocks: the ways of a group (all fields of the key but `way`) are timed in turn
    within a block, and blocks lie far apart in time. `anchor` names the way of the same group
    that ksae does not change, against which a run is compared with another.
    """

    suite: str
    case: str
    op: str
    mode: str
    way: str
    ours: bool = False
    anchor: str | None = None
    blocks: list[list[float]] = field(default_factory=list)  # seconds; empty in a loaded row
    kept: Kept | None = None  # what a loaded row has of its blocks
    shape: dict[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    bytes: float | None = None  # by formula, costs.py
    flops: float | None = None
    floor: float | None = None  # seconds at the ceilings measured in this run
    peak: int | None = None  # bytes that one call needs at its peak
    failure: str | None = None  # why there is no time, or why it counts for nothing
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return (self.suite, self.case, self.op, self.mode, self.way)

    @property
    def group(self) -> tuple[str, str, str, str]:
        return self.key[:4]

    @property
    def samples(self) -> list[float]:
        return [t for block in self.blocks for t in block]

    @property
    def times(self) -> Times | None:
        """Median and quartiles; None if there is no time that counts."""
        if self.failure is not None:
            return None
        if self.kept is not None:
            return self.kept.times
        return Times.of(self.samples) if self.samples else None

    @property
    def lows(self) -> list[float]:
        """The lower quartile of each block."""
        return self.kept.lows if self.kept is not None else [low(block) for block in self.blocks]

    def plain(self) -> dict[str, Any]:
        """What the file has of it; the name of the suite stands above all its rows."""
        found = {}
        for f in fields(self):
            empty = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name not in ("suite", "blocks", "kept") and getattr(self, f.name) != empty:
                found[f.name] = getattr(self, f.name)
        kept = self.kept or (Kept(Times.of(self.samples), self.lows) if self.samples else None)
        return found | (kept.plain() if kept else {})

    @staticmethod
    def of(plain: dict[str, Any], suite: str) -> Row:
        """From `plain`, or from a row of schema 1."""
        rest = {k: v for k, v in plain.items() if k not in ("suite", "times", "lows")}
        times = plain.get("times")
        kept = Kept(Times(*times), plain["lows"]) if times else None
        return Row(suite=suite, kept=kept, **rest)


@dataclass(frozen=True)
class Kept:
    """What the file keeps of a row's blocks."""

    times: Times
    lows: list[float]

    def plain(self) -> dict[str, Any]:
        t = self.times
        times = [*map(_rounded, (t.median, t.q1, t.q3)), t.n]
        return {"times": times, "lows": list(map(_rounded, self.lows))}


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS}g}")


def low(block: list[float]) -> float:
    """The lower quartile: other load on the machine only ever adds to a time."""
    if len(block) < 2:
        return block[0]
    return statistics.quantiles(block, n=4, method="inclusive")[0]


@dataclass
class Suite:
    """The part of a record that one suite fills."""

    state: str = "running"  # then complete, interrupted, or failed: why
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    start: float = 0.0  # seconds since 1970
    budget: float = 0.0  # seconds that it may take
    problems: list[str] = field(default_factory=list)  # what went wrong


@dataclass
class Record:
    machine: dict[str, Any]
    mode: str
    conditions: dict[str, Any] = field(default_factory=dict)
    state: str = "running"
    suites: dict[str, Suite] = field(default_factory=dict)
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """One line a row."""
        suites = {}
        for name, suite in self.suites.items():
            suites[name] = vars(suite) | {"rows": [row.plain() for row in suite.rows]}
        write_json(path, vars(self) | {"suites": suites}, expand=4)

    @property
    def rows(self) -> list[Row]:
        return [row for suite in self.suites.values() for row in suite.rows]


def load(path: str | Path) -> Record:
    """A record from its file.

    Raises:
        ValueError: the file is not one.
    """
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"bench: {path} must be JSON, got {error}") from error
    if not isinstance(data, dict) or data.get("schema") not in READ:
        found = data.get("schema", "none") if isinstance(data, dict) else "no record"
        raise ValueError(f"bench: {path} must be of schema {SCHEMA}, got {found}")
    for name, suite in data["suites"].items():
        suite["rows"] = [Row.of(row, name) for row in suite["rows"]]
        data["suites"][name] = Suite(**suite)
    return Record(**data | {"schema": SCHEMA})


def groups(rows: list[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows by what they do, in order."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found
