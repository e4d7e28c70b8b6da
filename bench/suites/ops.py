# SPDX-License-Identifier: Apache-2.0
"""Suite `ops`: every op by implementation and by torch's ways; forward, backward and peak memory.

A way's result is compared with the reference's before it is timed, and ksae's is computed twice
and has to give the same bits. All implementations of an op are timed in turn, in one process; all
ops are gone through several times, each time in a fresh one, so that a disturbance hits few blocks
of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae import ops, reference
from ksae.backends import cpu as native
from ksae.errors import failure

from ..harness import peaks
from ..harness.children import in_process
from ..harness.record import Record, Row, low
from ..harness.report import NO_KERNEL, REFERENCE
from ..harness.session import Session
from .case import Call, Case, Problem
from .opcases import problems

PASSES = 4  # blocks of a row
LEAST_PASSES = 3  # a case gets those before another gets more
VISIT = 0.2  # seconds of a block, at most: long calls take what their few rounds take
LEAST_FOR_MEMORY = 60.0  # seconds; less where it is done earlier
PROBLEMS = 16  # of a case, about
Shape = tuple[int, int, int, int]
TINY: list[Shape] = [(16, 24, 256, 4)]
QUICK: list[Shape] = [(512, 256, 8192, 32)]
# The cheap ones first: what is cut by the time are the last. In the second to the fourth a dense or
# stored way may win: few rows, large k / F.
FULL: list[Shape] = [
    *QUICK,
    (1, 768, 24576, 32),
    (32, 768, 24576, 32),
    (256, 768, 4096, 512),
    (2048, 768, 24576, 32),
    (2048, 768, 16384, 64),
]
MEMORY: list[Shape] = [*QUICK, (2048, 768, 24576, 32)]  # where peak memory is measured
PATIENCE = 0.5  # seconds: a slower reference is timed while it is checked against, once
SLOW = 12  # times the fastest: such a way is timed in the first pass only


@dataclass(frozen=True)
class Implementation:
    """A module with the ops, and what has to be set before each call."""

    name: str
    module: Any
    isa: str | None = None
    screen: bool | None = None

    def wrap(self, call: Call) -> Call:
        if self.isa is None:
            return call
        from ksae import _cpu

        isa, screen = self.isa, self.screen

        def switched() -> Any:
            before, screened = _cpu.isa(), native.encode.screening
            _cpu.set_isa(isa)
            native.encode.screening = screened if screen is None else screen
            try:
                return call()
            finally:
                _cpu.set_isa(before)
                native.encode.screening = screened

        return switched


def implementations(op: str, device: str, every_isa: bool) -> Iterator[Implementation]:
    """The reference, then what ksae has above it on `device`."""
    yield Implementation(REFERENCE, reference)
    if device != "cpu":
        serving = ops.serving()[op]
        if device in serving:
            yield Implementation(f"ksae {serving[device]}", ops)
        return
    if not native.available():
        return
    if "cpu" not in ops.serving()[op]:
        yield Implementation(NO_KERNEL, ops)
        return
    from ksae import _cpu

    best = _cpu.isa()
    for isa in _cpu.isas() if every_isa else [best]:
        yield Implementation(f"ksae {isa}", ops, isa)
    if op == "topk_encode" and _cpu.can_screen() and native.encode.screening:
        yield Implementation(f"ksae {best}, unscreened", ops, best, screen=False)


def ways(problem: Problem, case: Case, session: Session) -> dict[str, Callable[[], Call]]:
    """Makers of the calls by name; ksae's own start with "ksae"."""
    found: dict[str, Callable[[], Call]] = {}
    # The lower instruction sets at one shape: plain C++ takes minutes for a large product.
    every_isa = not session.quick and case.key in QUICK
    for impl in implementations(problem.op, session.device, every_isa):
        if impl.name.endswith("unscreened") and problem.mode != "forward":
            continue

        def make(impl: Implementation = impl) -> Call:
            return impl.wrap(problem.make(impl.module))

        found[impl.name] = make
    for name, call in (problem.torchs | problem.parts).items():
        found[name] = lambda call=call: call  # type: ignore[misc]
    return found


def rows_of(problem: Problem, case: Case, names: list[str]) -> dict[str, Row]:
    """A row for each way."""
    return {
        name: Row(
            "ops",
            str(case),
            problem.op,
            problem.mode,
            name,
            ours=name.startswith("ksae"),
            anchor=next(iter(problem.torchs), REFERENCE),  # nothing of ksae in it
            shape=case.shape,
            dtype=case.name,
            bytes=problem.cost.bytes,
            flops=problem.cost.flops,
            extra={"part": True} if name in problem.parts else {},
        )
        for name in names
    }


def wrong(
    problem: Problem, made: dict[str, Callable[[], Call]], case: Case
) -> tuple[dict[str, str], float]:
    """Ways whose first result is not the reference's, or differs from itself, and by how much;
    and the seconds that the reference took."""
    call = made[REFERENCE]()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    want = [t.double() for t in problem.check(result)]
    found = {}
    for name, make in made.items():
        if name == REFERENCE or name in problem.parts:
            continue
        try:
            # copies: an update writes into its argument, torch's ways may share theirs
            got = [t.clone() for t in problem.check(make()())]
            apart = _apart_in_the_mean if problem.exchanges else _apart
            error = max(apart(a, b) for a, b in zip(got, want, strict=False))
            if not error <= (case.exchanged if problem.exchanges else case.tolerance):
                found[name] = f"result differs from the reference by {error:.1e}"
            elif name.startswith("ksae") and not _equal(got, problem.check(make()())):
                found[name] = "a second run gave other bits"
        except (RuntimeError, MemoryError) as error:
            found[name] = failure(error)
    return found, seconds


def _apart(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest entry."""
    if not want.numel():
        return 0.0
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))


def _apart_in_the_mean(got: Tensor, want: Tensor) -> float:
    """The norm of the error over the norm."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def run(session: Session) -> None:
    """Fill the suite's rows: a pass with the checks, peak memory, then pass after pass. In a quick
    run, whose passes are short, memory comes last and nothing is cut."""
    shapes = TINY if session.tiny else QUICK if session.quick else FULL
    dtypes = ("fp32",) if session.tiny else ("fp32", "bf16")
    cases = [(shape, name) for shape in shapes for name in dtypes]
    known: Known = {}
    passes = 1 if session.tiny else PASSES
    done = dict.fromkeys(cases, 0)  # passes of each
    taken: dict[CaseKey, float] = {}  # seconds of each in the last pass
    kept = 0.25 * session.left() if session.quick else 0.0  # for memory
    for turn in range(passes):
        left = session.left() - kept
        chosen = cases if turn < LEAST_PASSES else fitting(cases, taken, left)
        where = f"pass {turn + 1} of {passes}"
        for case in _pass(session, chosen, known, where, max(0.0, left) / (passes - turn), taken):
            done[case] += 1
        if turn == (passes - 1 if session.quick else 0):
            _memory(session, cases[:1] if session.quick else _of(MEMORY, cases), known)
    for (shape, name), count in done.items():
        if count < passes:
            session.note(f"{_title(shape, name)}: {count} of {passes} passes, cut by the time")
        if count < min(passes, LEAST_PASSES):
            for row in (r for r in session.suite.rows if r.case == _title(shape, name)):
                row.extra["cut"] = f"{count} of {passes} passes, cut by the time"
    _missing(session, known)


def fitting(cases: Sequence[CaseKey], taken: Mapping[CaseKey, float], left: float) -> list[CaseKey]:
    """The first of `cases` that end within `left` seconds if they take what they `taken`."""
    found = []
    for case in cases:
        left -= taken.get(case, 0.0)
        if left < 0:
            break
        found.append(case)
    return found


def _pass(
    session: Session,
    cases: list[CaseKey],
    known: Known,
    where: str,
    seconds: float,
    taken: dict[CaseKey, float],
) -> list[CaseKey]:
    """One block of every problem of `cases`: the cases that it ended before the time was spent."""
    session.tick(where)
    titles = {_title(*case): case for case in cases}
    task = Task(session, cases, seconds, known)
    whole: list[CaseKey] = []
    current, begin = None, session.spent()
    with closing(in_process(_serve, task, partial(_waiting, session, where))) as found:
        for key, rows in found:
            if current is not None and key[0] != current:
                whole.append(titles[current])
                taken[titles[current]], begin = session.spent() - begin, session.spent()
            current = key[0]
            _merge(session, known, key, rows)
            if session.left() < 0 and not session.quick:
                return whole
    if current is not None:
        whole.append(titles[current])
        taken[titles[current]] = session.spent() - begin
    return whole


def _title(shape: Shape, name: str) -> str:
    """As `str(Case)` has it, which would make the inputs as well."""
    N, d, F, k = shape
    return f"N={N} d={d} F={F} k={k} {name}"


def _of(shapes: Sequence[Shape], cases: Sequence[CaseKey]) -> list[CaseKey]:
    return [case for case in cases if case[0] in shapes]


CaseKey = tuple[Shape, str]
Known = dict[tuple[str, str, str], dict[str, Row]]


class Task:
    """What the process of a pass is told: plain values that can be sent."""

    def __init__(
        self, session: Session, cases: list[CaseKey], seconds: float, known: Known
    ) -> None:
        self.cases, self.seconds = cases, seconds
        self.settings = {
            name: getattr(session, name) for name in ("quick", "tiny", "threads", "device", "data")
        }
        # Known rows without their blocks but the first, which says who is slow.
        self.known = {
            key: {name: replace(row, blocks=row.blocks[:1]) for name, row in rows.items()}
            for key, rows in known.items()
        }


def _serve(task: Task) -> Iterator[tuple[tuple[str, str, str], dict[str, Row]]]:
    """One pass over all problems in a fresh process: rows with the block that it adds.

    Where inputs and code come to lie in memory can make one process differ from the next by more
    than its own samples tell, so that blocks of a row have to come from several.
    """
    torch.set_num_threads(task.settings["threads"])
    session = Session(Record({}, "pass"), Path(), **task.settings)
    session.begin("ops", task.seconds)
    titles = {_title(*case) for case in task.cases}
    visits = sum(case in titles for case, *_ in task.known) or PROBLEMS * len(task.cases)
    for shape, name in task.cases:
        case = Case(*shape, name, session.data, session.device)
        for problem in problems(case):
            key = (str(case), problem.op, problem.mode)
            before = {n: len(row.blocks) for n, row in task.known.get(key, {}).items()}
            share = session.left() / max(1, visits)
            _visit(session, problem, case, task.known, min(VISIT, max(0.0, share)))
            visits -= 1
            rows = task.known[key]
            yield key, {n: replace(r, blocks=r.blocks[before.get(n, 0) :]) for n, r in rows.items()}


def _waiting(session: Session, where: str, done: str) -> None:
    session.tick(where + done)


def _merge(session: Session, known: Known, key: tuple[str, str, str], rows: dict[str, Row]) -> None:
    """Add the blocks of a pass to the rows of the run."""
    if key not in known:
        known[key] = rows
        for row in rows.values():
            session.add(row)
        return
    for name, row in rows.items():
        known[key][name].blocks += row.blocks


def _visit(
    session: Session,
    problem: Problem,
    case: Case,
    known: Known,
    seconds: float,
) -> None:
    """One block of one problem; at the first visit the check as well."""
    made = ways(problem, case, session)
    key = (str(case), problem.op, problem.mode)
    if key not in known:
        known[key] = rows = rows_of(problem, case, list(made))
        for row in rows.values():
            session.add(row)
        failures, reference_s = wrong(problem, made, case)
        for name, why in failures.items():
            rows[name].failure = why
        if reference_s > PATIENCE and rows[REFERENCE].anchor != REFERENCE:
            rows[REFERENCE].blocks.append([reference_s])
            del made[REFERENCE]
    rows = known[key]
    lows = {name: low(row.blocks[0]) for name, row in rows.items() if row.blocks}
    least = min(lows.values(), default=0.0)
    calls = {
        name: make()
        for name, make in made.items()
        if rows[name].failure is None
        and (lows.get(name, 0.0) <= SLOW * least or name == rows[name].anchor)
    }
    session.block(rows, calls, seconds)


def _memory(
    session: Session,
    cases: list[CaseKey],
    known: Known,
) -> None:
    """The peak of each way at these cases, in a process of their own each."""
    until = session.spent() + max(0.5 * session.left(), LEAST_FOR_MEMORY)
    for number, (shape, name) in enumerate(cases):
        session.tick(f"peak memory, {name}")
        seconds = (until - session.spent()) / (len(cases) - number)
        complete = False
        for found in peaks.of_ops(ways, shape, name, session, seconds):
            complete = found is None
            if found is not None:
                case, op, mode, way, peak = found
                rows = known.get((case, op, mode), {})
                if way in rows:
                    rows[way].peak = peak
        if not complete:
            session.note(f"peak memory: cut by the time at {_title(shape, name)}")


def _missing(session: Session, known: Known) -> None:
    """Ops of the table that nothing here times are rows that say so."""
    timed = {op for _, op, _ in known}
    for op in ops.serving():
        if op not in timed:
            why = "no case in bench/suites/opcases.py"
            session.add(Row("ops", "any", op, "forward", "ksae", failure=why))
