# SPDX-License-Identifier: Apache-2.0
"""Suite `scaling`: how cost grows with N, d, F and k, one at a time, beside what the formulas say.

The exponent is the slope of log time against log size. Expected is the slope, over the same points,
of what the formula (costs.growth) says: N d F for the encode, N k d + F d for the rest. It knows no
caches: a table of rows that outgrows one makes a gather grow with F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ksae import ops

from ..harness import costs
from ..harness.costs import Ceilings, Cost
from ..harness.record import Row, low
from ..harness.session import Session
from . import latents
from .case import Call, Case, Problem
from .opcases import problems

PASSES = 3
# A size grows by these factors from `BASE`; k and F keep k <= F.
FACTORS = (0.25, 0.5, 1, 2, 4)
BASE = {"N": 512, "d": 256, "F": 8192, "k": 32}
FULL = {"N": 1024, "d": 512, "F": 16384, "k": 32}
TINY = {"N": 32, "d": 16, "F": 256, "k": 4}
MARGIN = 0.15  # an exponent above the expected one by more, beyond two standard errors, is marked

Costs = Callable[[int, int, int, int], Cost]
TIMED: dict[str, tuple[Costs, bool]] = {  # op: its formula, and whether it is a dense product
    "topk_encode": (costs.topk_encode, True),
    "sparse_decode": (costs.sparse_decode, False),
    "rest of a step": (
        lambda N, d, F, k: sum(
            (c for n, c in latents.train_step(N, d, F, k).items() if n != "topk_encode"), Cost()
        ),
        False,
    ),
}


@dataclass(frozen=True)
class Fit:
    """log t = exponent log size + constant, by least squares."""

    exponent: float
    error: float  # standard


def fit(sizes: Sequence[float], times: Sequence[float]) -> Fit:
    """The exponent and its standard error (NaN for two points)."""
    xs, ys = [math.log(s) for s in sizes], [math.log(t) for t in times]
    n, x0, y0 = len(xs), sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x0) ** 2 for x in xs)
    slope = sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in zip(xs, ys, strict=True))
    error = math.sqrt(rest / (n - 2) / spread) if n > 2 else math.nan
    return Fit(slope, error)


def run(session: Session) -> None:
    """Fill the rows of the sweeps and the facts of the fits."""
    base = TINY if session.tiny else BASE if session.quick else FULL
    factors = FACTORS[1:4] if session.tiny else FACTORS
    limit = costs.ceilings(base["N"], base["d"], base["F"], rounds=2, copied=2**24)
    session.suite.facts["ceilings"] = asdict(limit)
    points = [(name, base | {name: int(base[name] * f)}) for name in base for f in factors]
    session.note("base " + " ".join(f"{n}={s}" for n, s in base.items()) + ", fp32")
    passes = 2 if session.tiny else PASSES
    rows: dict[tuple[str, str, int], Row] = {}
    visits = passes * len(points)
    for visit in range(visits):
        if visit >= len(points) and session.left() < 0:
            session.note(f"{visit} of {visits} visits, cut by the time")
            break
        name, sizes = points[visit % len(points)]
        # The base belongs to all four sweeps: each times it for itself.
        _point(session, rows, name, sizes, limit, max(0.0, session.left() / (visits - visit)))
        session.tick(f"{name}={sizes[name]}, {visit // len(points) + 1} of {passes}")
    session.suite.facts["fits"] = fits(list(rows.values()))


def _point(
    session: Session,
    rows: dict[tuple[str, str, int], Row],
    name: str,
    sizes: dict[str, int],
    limit: Ceilings,
    seconds: float,
) -> None:
    shape = (sizes["N"], sizes["d"], sizes["F"], sizes["k"])
    case = Case(*shape, "fp32", session.data, session.device)
    calls = _calls(case)
    for op in calls:
        key = (op, name, sizes[name])
        if key not in rows:
            formula, product = TIMED[op]
            cost = formula(case.N, case.d, case.F, case.k)
            rate = limit.product(torch.float32, screened=True) if product else limit.mm_fp32
            rows[key] = session.add(
                Row(
                    "scaling",
                    str(case),
                    op,
                    f"over {name}",
                    "ksae",
                    ours=True,
                    shape=case.shape,
                    bytes=cost.bytes,
                    flops=cost.flops,
                    floor=cost.seconds(limit, rate),
                    extra={"sweep": name, "growth": _work(costs.growth(op, *case.shape.values()))},
                )
            )
    session.block({op: rows[(op, name, sizes[name])] for op in calls}, calls, seconds)


def _calls(case: Case) -> dict[str, Call]:
    """The encode, the decode, and what else a step does."""
    found: dict[str, Problem] = {p.op: p for p in problems(case, ("forward",))}
    rest = [found[op].make(ops) for op in ("sparse_residual", "group_by_latent", *latents.STEP)]

    def step() -> None:
        for call in rest:
            call()

    return {
        "topk_encode": found["topk_encode"].make(ops),
        "sparse_decode": found["sparse_decode"].make(ops),
        "rest of a step": step,
    }


def _work(cost: Cost) -> float:
    """Bytes, or flops where the formula has those alone."""
    return cost.bytes or cost.flops


def fits(rows: list[Row]) -> list[dict[str, object]]:
    """Exponents of every op and sweep: measured, expected, and whether it grows too fast."""
    sweeps: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.blocks:
            sweeps.setdefault((row.op, row.extra["sweep"]), []).append(row)
    found: list[dict[str, object]] = []
    for (op, name), points in sweeps.items():
        if len(points) < 2:
            continue
        sizes = [row.shape[name] for row in points]
        measured = fit(sizes, [min(low(block) for block in row.blocks) for row in points])
        expected = fit(sizes, [row.extra["growth"] for row in points]).exponent
        error = 0.0 if math.isnan(measured.error) else measured.error
        found.append(
            {
                "op": op,
                "size": name,
                "exponent": round(measured.exponent, 3),
                "error": round(error, 3),
                "expected": round(expected, 3),
                "too_fast": measured.exponent - 2 * error > expected + MARGIN,
            }
        )
    return found
