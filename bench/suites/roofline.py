# SPDX-License-Identifier: Apache-2.0
"""Suite `roofline`: each kernel's share of the limits of this machine, both measured in this run.

Bytes and flops are those of the formulas in costs.py, each tensor once. The limits are a copy far
beyond any cache and the fastest product at hand, measured before and after the kernels; the better
value counts.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from ksae import ops

from ..harness import costs
from ..harness.costs import Ceilings
from ..harness.record import Row
from ..harness.report import REFERENCE
from ..harness.session import Session
from .case import Call, Case
from .opcases import problems
from .ops import implementations

PASSES = 3
TINY = (16, 24, 256, 4)
QUICK = (512, 512, 16384, 32)
FULL = (2048, 768, 24576, 32)


def run(session: Session) -> None:
    """Fill a row for each op and dtype, with its floor, and the facts of the ceilings."""
    shape = TINY if session.tiny else QUICK if session.quick else FULL
    N, d, F, _ = shape
    copied = 2**20 if session.tiny else 2**24 if session.quick else 2**26
    session.tick("ceilings")
    limits = [costs.ceilings(N, d, F, rounds=2, copied=copied)]
    rows: dict[tuple[str, str], Row] = {}
    passes = 1 if session.tiny else PASSES
    for turn in range(passes):
        if turn and session.left() < 0:
            session.note(f"{turn} of {passes} passes, cut by the time")
            break
        for name in ("fp32", "bf16"):
            _pass(session, Case(*shape, name, session.data, session.device), rows, passes - turn)
            session.tick(f"{name}, {turn + 1} of {passes}")
    session.tick("ceilings again")
    limits.append(costs.ceilings(N, d, F, rounds=2, copied=copied))
    best = _better(*limits)
    session.suite.facts["ceilings"] = asdict(best)
    session.note(str(best))
    for row in rows.values():
        dtype = torch.bfloat16 if row.dtype == "bf16" else torch.float32
        product = best.product(dtype, screened=True) if row.extra["product"] else best.mm_fp32
        row.floor = costs.Cost(row.bytes or 0, row.flops or 0).seconds(best, product)


def _pass(session: Session, case: Case, rows: dict[tuple[str, str], Row], passes: int) -> None:
    """One block of every op in one dtype, the best implementation of each, all in turn."""
    calls: dict[str, Call] = {}
    named: dict[str, Row] = {}
    for problem in problems(case, ("forward",)):
        key = (problem.op, case.name)
        here = implementations(problem.op, session.device, every_isa=False)
        chosen = [i for i in here if "unscreened" not in i.name][-1]
        if key not in rows:
            rows[key] = session.add(
                Row(
                    "roofline",
                    str(case),
                    problem.op,
                    "forward",
                    chosen.name,
                    ours=chosen.name != REFERENCE,
                    shape=case.shape,
                    dtype=case.name,
                    bytes=problem.cost.bytes,
                    flops=problem.cost.flops,
                    extra={"product": problem.dense_product},
                )
            )
        calls[problem.op] = chosen.wrap(problem.make(ops))
        named[problem.op] = rows[key]
    session.block(named, calls, max(0.0, session.left() / (2 * passes + 1)))


def _better(a: Ceilings, b: Ceilings) -> Ceilings:
    own = max(a.own_fp32 or 0.0, b.own_fp32 or 0.0)
    return Ceilings(
        max(a.copy, b.copy), max(a.mm_fp32, b.mm_fp32), max(a.mm_bf16, b.mm_bf16), own or None
    )
