# SPDX-License-Identifier: Apache-2.0
"""How far a long piece of work is: a bar on a terminal, a line at each tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

# What fits in 80 columns with a bar that can be seen.
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def say(line: str) -> None:
    """Print a line on the standard error, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """The progress of `what` towards `total` units, on the standard error.

    Args:
        total: of the whole work.
        what: the work, as `harvest layers.9.resid_post`.
        done: units that were done before.
        unit: plural, for the lines.
        shown: False shows nothing.
    """

    def __init__(
        self, total: int, what: str, *, done: int = 0, unit: str = "tokens", shown: bool = True
    ) -> None:
        self._total, self._what, self._unit, self._shown = total, what, unit, shown
        self._done = done
        self._tenth = 10 * done // total if total else 10
        # disable=None: only on a terminal
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            unit_scale=True,
            bar_format=BAR,
            dynamic_ncols=True,
            disable=None if shown else True,
        )

    def update(self, units: int) -> None:
        """`units` more are done."""
        self._done += units
        self._bar.update(units)
        tenth = min(10, 10 * self._done // self._total) if self._total else 10
        if self._shown and self._bar.disable and tenth > self._tenth:
            self._tenth = tenth
            say(f"{self._what}: {self._done:,}/{self._total:,} {self._unit}")

    def over(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, each counted by the rows of its first tensor once the next is asked for."""
        for batch in batches:
            yield batch
            first = batch[0] if isinstance(batch, tuple) else batch
            self.update(len(first))

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
