# SPDX-License-Identifier: Apache-2.0
"""One run of `ksae bench`: what a suite may use, its share of the time, and what it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .measure import interleave, slow_share
from .record import Record, Row, Suite

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
    suite: Suite = field(default_factory=Suite)
    name: str = ""
    _start: float = 0.0
    _budget: float = 0.0
    _saved: float = 0.0

    def begin(self, name: str, budget: float) -> None:
        self.name, self.suite = name, Suite()
        self.record.suites[name] = self.suite
        self._start, self._budget = time.perf_counter(), budget

    def end(self, state: str) -> None:
        self.suite.state = state
        self.suite.seconds = round(self.spent(), 1)
        self.record.save(self.path)

    def spent(self) -> float:
        return time.perf_counter() - self._start

    def left(self) -> float:
        """Seconds that this suite has left; it ends by itself soon after they are spent."""
        return self._budget - self.spent()

    def tick(self, text: str) -> None:
        """Between two measurements: show how far it is, keep what there is."""
        self.show(f"{self.name}: {text}", min(self.spent(), self._budget))
        if time.perf_counter() - self._saved > SAVE_EVERY:
            self.record.save(self.path)
            self._saved = time.perf_counter()

    def note(self, line: str) -> None:
        """A line of the report, such as how a shape was scaled."""
        self.suite.notes.append(line)

    def add(self, row: Row) -> Row:
        self.suite.rows.append(row)
        return row

    def block(
        self, rows: Mapping[str, Row], ways: Mapping[str, Callable[[], Any]], seconds: float
    ) -> None:
        """One block of interleaved samples of all `ways` into the rows of the same name."""
        slow = {name: slow_share(rows[name].op) for name in ways if rows[name].ours}
        with torch.no_grad():
            samples = interleave(ways, seconds, slow=slow)
        for name, taken in samples.items():
            rows[name].blocks.append(taken)
