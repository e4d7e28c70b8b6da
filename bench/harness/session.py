# SPDX-License-Identifier: Apache-2.0
"""One run of benchmarks: what a suite may use, its share of the time, and what it leaves.

What was measured is on disk at any time, so a process that dies loses only what it had not yet
measured, and another can go on (`resume`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .clock import interleave
from .measure import slow_share
from .record import Record, Row, Suite, load

SAVE_EVERY = 2.0  # seconds


@dataclass
class Session:
    """Settings of a run, and the suite that is running."""

    record: Record
    path: Path  # of the JSON file
    quick: bool = True
    tiny: bool = False  # shapes for the tests, which end in seconds
    threads: int = 1
    device: str = "cpu"
    data: str = "normal"
    cache: Path = Path("bench/cache")
    show: Callable[[str, float], None] = lambda text, seconds: None  # progress: what, seconds spent
    # Given, every number is written as it comes, and this beside them, with the suffix .md.
    report: Callable[[Record], str] | None = None
    suite: Suite = field(default_factory=Suite)
    name: str = ""
    _saved: float = 0.0

    def begin(self, name: str, budget: float) -> None:
        self.name, self.suite = name, Suite(start=time.time(), budget=budget)
        self.record.suites[name] = self.suite
        self.at_once()

    def resume(self) -> Record:
        """The record as it is on disk, whose last suite goes on; one process writes at a time."""
        self.record = load(self.path)
        self.name = list(self.record.suites)[-1]
        self.suite = self.record.suites[self.name]
        return self.record

    def end(self, state: str) -> None:
        self.suite.state = state
        self.save()

    def save(self) -> None:
        self.suite.seconds = round(self.spent(), 1)
        self.record.save(self.path)
        if self.report is not None:
            scratch = self.path.with_suffix(".md.partial")
            scratch.write_text(self.report(self.record))
            scratch.replace(self.path.with_suffix(".md"))

    def at_once(self) -> None:
        if self.report is not None:
            self.save()

    def spent(self) -> float:
        return time.time() - self.suite.start

    def left(self) -> float:
        """Seconds that this suite has left; it ends by itself soon after they are spent."""
        return self.suite.budget - self.spent()

    def tick(self, text: str) -> None:
        """Between two measurements: show how far it is, keep what there is."""
        self.show(f"{self.name}: {text}", min(self.spent(), self.suite.budget))
        if time.time() - self._saved > SAVE_EVERY:
            self.save()
            self._saved = time.time()

    def note(self, line: str) -> None:
        """A line of the report, such as how a shape was scaled."""
        self.suite.notes.append(line)
        self.at_once()

    def fact(self, name: str, **values: Any) -> None:
        """Numbers and words that belong to no row, by a name."""
        self.suite.facts.setdefault(name, {}).update(values)
        self.at_once()

    def problem(self, what: str) -> None:
        """What went wrong: a result that is not right, a part that could not be measured."""
        self.show(f"PROBLEM {what}", self.spent())
        self.suite.problems.append(what)
        self.at_once()

    def add(self, row: Row) -> Row:
        self.suite.rows.append(row)
        self.at_once()
        return row

    def block(
        self, rows: Mapping[str, Row], ways: Mapping[str, Callable[[], Any]], seconds: float
    ) -> None:
        """One block of interleaved samples of all `ways` into the rows of the same name."""
        import torch

        slow = {name: slow_share(rows[name].op) for name in ways if rows[name].ours}
        with torch.no_grad():
            samples = interleave(ways, seconds, slow=slow)
        for name, taken in samples.items():
            rows[name].blocks.append(taken)
