# SPDX-License-Identifier: Apache-2.0
"""What harness/report.py writes of the suite that gpu/run.py fills: notes, tables, goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..harness.record import Row, Suite

SUITE = "gpu"
Table = tuple[str, list[str], list[list[str]]]  # title, header, cells


def goals(rows: Sequence[Row]) -> list[tuple[str, float, str, float, bool]]:
    """(what, measured, relation, wanted, reached) for what was measured."""
    found = {(r.case, r.op, r.way): r for r in rows if r.times}

    def ratio(shape: str, op: str, a: str, b: str) -> float | None:
        pair = [found[shape, op, way].times for way in (a, b) if (shape, op, way) in found]
        return pair[0].median / pair[1].median if len(pair) == 2 and all(pair) else None  # type: ignore[union-attr]

    def of_ceiling(shape: str, op: str) -> float | None:
        row = found.get((shape, op, "ksae"))
        return None if row is None else fraction(row)

    def products(shape: str) -> float | None:
        row = found.get((shape, "step", "ksae"))
        return None if row is None else row.extra.get("products")

    wanted: list[tuple[str, float | None, str, float]] = []
    for shape, encode, step in (("A", 1.12, 2.3), ("B", 1.5, 2.9)):
        for op in ("select", "select float32"):
            wanted.append((f"{shape} {op}: of copy", of_ceiling(shape, op), ">=", 0.7))
            faster = ratio(shape, op, "torch.topk", "ksae")
            wanted.append((f"{shape} {op}: torch.topk / ksae", faster, ">=", 5))
        wanted.append((f"{shape} decode: of gather", of_ceiling(shape, "decode"), ">=", 0.7))
        part = of_ceiling(shape, "latent pass")
        wanted.append((f"{shape} latent pass: of bytes", part, ">=", 0.65))
        share = ratio(shape, "encode + select", "ksae", "product alone")
        wanted.append((f"{shape} encode + select / product", share, "<=", encode))
        wanted.append((f"{shape} step / product", products(shape), "<=", step))
        faster = ratio(shape, "step", "dense torch", "ksae")
        wanted.append((f"{shape} dense torch step / ksae's", faster, ">=", 3))
    # of the fused Triton kernels
    way = "fused Triton"
    for shape, encode, screened in (("A", 1.12, 1.5), ("B", 1.25, 1.8)):
        share = ratio(shape, "encode + select", way, "product alone")
        wanted.append((f"{shape} fused encode / product", share, "<=", encode))
        share = ratio(shape, "grad encode + select", way, "products alone")
        wanted.append((f"{shape} fused grad encode / both products", share, "<=", 1.15))
        for of in ("ksae", way):
            share = ratio(shape, "encode float32", of, "bf16 product alone")
            wanted.append((f"{shape} float32 by {of} / bf16 product", share, "<=", screened))
    row = found.get(("A", "encode + select", way))
    gigabytes = None if row is None or row.peak is None else row.peak / 1e9
    wanted.append(("A fused encode: GB of its own", gigabytes, "<=", 0.2))
    return [
        (what, got, relation, want, got >= want if relation == ">=" else got <= want)
        for what, got, relation, want in wanted
        if got is not None
    ]


def fraction(row: Row) -> float | None:
    """Of the time taken, what the ceilings allow."""
    return row.floor / row.times.median if row.floor is not None and row.times else None


def notes(suite: Suite) -> list[str]:
    """Ceilings, what was built and tested, rows for the table of ways to encode."""
    facts = suite.facts
    lines = [f"ceiling, {name}: {value:.4g}/s" for name, value in facts.get("ceilings", {}).items()]
    built, tests = facts.get("build", {}).get("status", "not run"), facts.get("tests", {})
    ran = "not run"
    if "pytest" in tests:
        ran = f"{tests['pytest']} ({tests['passed']} passed, {len(tests['failed'])} failed)"
    lines += [f"build: {built}; tests marked gpu: {ran}"]
    lines += [f"failed: {name}" for name in tests.get("failed", [])]
    found = (choice["row"] for choice in facts.get("choice", {}).values() if "row" in choice)
    return [*lines, *(f"for the table in ksae/backends/serving.py: {row}" for row in found)]


def tables(suite: Suite) -> list[Table]:
    """What was measured, the goals, and the kernels of each step that was profiled."""
    header = ["shape", "op", "way", "ms", "quartiles", "of ceiling", "products", "wall", "extra MB"]
    found = [("Measured", header, [_cells(row) for row in suite.rows])]
    judged = [
        [what, f"{got:.3g}", f"{relation} {want}", "yes" if reached else "NO"]
        for what, got, relation, want, reached in goals(suite.rows)
    ]
    found.append(("Goals", ["goal", "measured", "wanted", "reached"], judged))
    for step, kernels in suite.facts.get("profile", {}).items():
        calls = sum(kernel["calls"] for kernel in kernels)
        each = [[str(e[key]) for key in ("kernel", "calls", "us")] for e in kernels]
        found.append((f"Step {step}: {calls} calls", ["kernel", "calls", "us"], each))
    return found


def _cells(row: Row) -> list[str]:
    cells = [row.case, row.op, row.way]
    if (t := row.times) is None:
        return [*cells, row.failure or "no time", *[""] * 5]
    share = fraction(row)
    cells += [_ms(t.median), f"{_ms(t.q1)}-{_ms(t.q3)}", "" if share is None else f"{share:.2f}"]
    more: dict[str, Any] = row.extra
    cells += [f"{more['products']:.2f}" if "products" in more else ""]
    cells += [_ms(more["wall"]) if "wall" in more else ""]
    return [*cells, "" if row.peak is None else f"{row.peak / 2**20:.0f}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"
