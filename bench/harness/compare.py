# SPDX-License-Identifier: Apache-2.0
"""`ksae bench --compare OLD NEW`: what became slower or faster, as far as both runs can tell.

A row has blocks of samples that lie far apart in time. The lower quartile of a block is its value
(other load on the machine only adds to a time), the median of the blocks the row's, and their range
its spread. Each block is also divided by that of its anchor, torch's way of the same thing timed in
turn with it, so that a slower machine is not taken for slower code.

A row is slower (faster) only if, both in time and relative to its anchor, it moved by more than
MIN_EFFECT and its spread together, and its blocks do not overlap with those of the other run: with
four blocks a side that happens by chance, for rows that did not move, in 1 of 70 (the exact rank
test), before the size of the move and the second measure, which must agree. On a shared machine a
move beyond the larger of the two alone was two of 37 rows in one of two pairs of equal quick runs.
A row whose blocks differ among themselves by so much that a slow-down of TELL could hide is not
called equal but "noisy".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import record
from .measure import table
from .record import Key, Record, Row

MIN_EFFECT = 0.10
TELL = 0.20


@dataclass(frozen=True)
class Estimate:
    """A row's value in one run: median over blocks, lowest and highest block.

    Of four blocks and more the one farthest from the median is left out: a burst of other load
    hits one.
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of(blocks: Sequence[float]) -> Estimate:
        middle = statistics.median(blocks)
        kept = sorted(blocks, key=lambda b: abs(b - middle))[: max(3, len(blocks) - 1)]
        return Estimate(statistics.median(kept), min(kept), max(kept))

    @property
    def spread(self) -> float:
        """Half the range of the blocks, relative."""
        return (self.high - self.low) / (2 * self.value)


@dataclass(frozen=True)
class Verdict:
    key: Key
    kind: str  # slower, faster, same, noisy
    raw: float  # new / old
    anchored: float  # the same of the quotients with the anchor
    spread: float  # the larger of both runs

    @property
    def change(self) -> float:
        """The smaller of the two moves, as a factor: what both measures agree on."""
        up = self.raw > 1 and self.anchored > 1
        down = self.raw < 1 and self.anchored < 1
        return min(self.raw, self.anchored) if up else max(self.raw, self.anchored) if down else 1.0


def estimates(row: Row, anchor: Row) -> tuple[Estimate, Estimate]:
    """In seconds, and relative to the anchor, block by block."""
    ratios = [a / b for a, b in zip(row.lows, anchor.lows, strict=False)]
    return Estimate.of(row.lows), Estimate.of(ratios)


def judge(old: tuple[Row, Row], new: tuple[Row, Row]) -> Verdict:
    """Two runs of a row, each with its anchor."""
    (a, a_rel), (b, b_rel) = estimates(*old), estimates(*new)
    raw, anchored = b.value / a.value, b_rel.value / a_rel.value
    spread = max(a.spread, b.spread, a_rel.spread, b_rel.spread)
    up = b.low > a.high and b_rel.low > a_rel.high
    down = b.high < a.low and b_rel.high < a_rel.low
    bar = 1 + MIN_EFFECT + spread
    if up and min(raw, anchored) > bar:
        kind = "slower"
    elif down and max(raw, anchored) < 1 / bar:
        kind = "faster"
    else:
        kind = "noisy" if _hides(a, b) or _hides(a_rel, b_rel) else "same"
    return Verdict(new[0].key, kind, raw, anchored, spread)


def _hides(a: Estimate, b: Estimate) -> bool:
    """Whether blocks as wide as these would overlap after a slow-down of TELL."""
    return (a.high / a.value) / (b.low / b.value) > 1 + TELL


@dataclass(frozen=True)
class Comparison:
    verdicts: list[Verdict]
    gone: list[Key]  # rows that one of the runs has no time for
    drift: float  # of the anchors, new / old: the machine, or torch
    fits: list[str]  # sweeps whose exponent grew

    @property
    def slower(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.kind == "slower"]


def compare(old: Record, new: Record) -> Comparison:
    """Every row of ksae that both runs timed."""
    before, after = _timed(old), _timed(new)
    verdicts, drifts = [], []
    for key, row in after.items():
        anchor = (*key[:4], row.anchor or "")
        if not row.ours or row.anchor is None or key not in before:
            continue
        if anchor in before and anchor in after:
            verdicts.append(judge((before[key], before[anchor]), (row, after[anchor])))
            drifts.append(estimates(after[anchor], after[anchor])[0].value)
            drifts[-1] /= estimates(before[anchor], before[anchor])[0].value
    mine = {k for k, r in before.items() if r.ours} ^ {k for k, r in after.items() if r.ours}
    drift = math.exp(statistics.fmean(map(math.log, drifts))) if drifts else 1.0
    return Comparison(verdicts, sorted(mine), drift, _fits(old, new))


def _timed(run: Record) -> dict[Key, Row]:
    return {row.key: row for row in run.rows if row.times}


def _fits(old: Record, new: Record) -> list[str]:
    """Sweeps that grow faster than before, beyond two standard errors of the difference."""
    from ..suites.scaling import MARGIN

    def exponents(run: Record) -> dict[tuple[str, str], tuple[float, float]]:
        found = run.suites["scaling"].facts.get("fits", []) if "scaling" in run.suites else []
        return {(f["op"], f["size"]): (f["exponent"], f["error"]) for f in found}

    before, lines = exponents(old), []
    for key, (exponent, error) in exponents(new).items():
        if key in before:
            was, had = before[key]
            if exponent - was > MARGIN + 2 * math.hypot(error, had):
                lines.append(f"{key[0]} grows with {key[1]}^{exponent:.2f}, before ^{was:.2f}")
    return lines


def text(result: Comparison, old: Path, new: Path) -> str:
    """The table and the verdict."""
    marked = sorted(result.verdicts, key=lambda v: -v.change)
    rows = []
    for v in marked:
        suite, case, op, mode, way = v.key
        rows.append(
            [
                f"{suite}: {op} {mode}",
                way,
                case,
                f"{v.raw:.2f}x",
                f"{v.anchored:.2f}x",
                f"+-{v.spread:.0%}",
                "" if v.kind == "same" else v.kind.upper() if v.kind == "slower" else v.kind,
            ]
        )
    counts = {k: sum(v.kind == k for v in marked) for k in ("slower", "faster", "same", "noisy")}
    lines = [f"{old} -> {new}"]
    if rows:
        header = ["what", "way", "case", "time", "against its anchor", "spread", "verdict"]
        lines.append(table(header, rows))
    lines.append(f"anchors (torch's ways): {result.drift:.2f}x the time of before")
    if result.gone:
        lines.append(f"timed in one of the two only: {len(result.gone)} rows")
    lines += result.fits
    lines.append(
        f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same within "
        f"{MIN_EFFECT:.0%} or their spread, {counts['noisy']} too noisy to see {TELL:.0%}"
    )
    return "\n".join(lines)


def main(old: Path, new: Path) -> int:
    """Print the comparison; 1 if anything became slower, or grows faster."""
    result = compare(record.load(old), record.load(new))
    print(text(result, old, new))
    return 1 if result.slower or result.fits else 0
