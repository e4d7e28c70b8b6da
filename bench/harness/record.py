# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: rows of all suites in one JSON file, written as it goes.

{"schema": 1, "machine": {...}, "mode": "quick", "conditions": {...}, "state": "complete",
 "suites": {name: {"seconds": s, "state": ..., "facts": {...}, "notes": [...], "rows": [...]}}}
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .measure import Times, write_json

SCHEMA = 1
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
    blocks: list[list[float]] = field(default_factory=list)  # seconds
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
        return Times.of(self.samples) if self.samples and self.failure is None else None


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


@dataclass
class Record:
    machine: dict[str, Any]
    mode: str
    conditions: dict[str, Any] = field(default_factory=dict)
    state: str = "running"
    suites: dict[str, Suite] = field(default_factory=dict)
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

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
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema", "none") if isinstance(data, dict) else "no record"
        raise ValueError(f"bench: {path} must be of schema {SCHEMA}, got {found}")
    for name, suite in data["suites"].items():
        suite["rows"] = [Row(**row) for row in suite["rows"]]
        data["suites"][name] = Suite(**suite)
    return Record(**data)


def groups(rows: list[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows by what they do, in order."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found
