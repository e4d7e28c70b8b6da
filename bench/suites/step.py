# SPDX-License-Identifier: Apache-2.0
"""Suite `step`: a whole training step of ksae, of dense torch and of every peer, side by side.

Forward, loss, backward, gradient projection, Adam and unit norm, as each library's own trainer does
them, from the same weights on the same batches, at named model shapes. Each contestant has a
process of its own (workers.py) and takes its turn while the others sleep: a run of steps, as a
trainer makes them, of which the first, that finds caches and pages taken by others, is not timed.
Those that need more than a turn's seconds take one step, for which that hardly matters.

In a full run the time that is left is shared by the shapes to come. Where the last shape says that
fewer than LEAST rounds would fit, the next is scaled further than to FLOPS. A shape ends by time:
what is cut says so in its rows.
"""

from __future__ import annotations

import math

import torch

from ..contestants.workers import CHECKED, CONTESTANTS, OP, Task, Worker
from ..harness import costs
from ..harness.record import Row
from ..harness.session import Session
from ..harness.shapes import NAMED, Shape, available_memory, scaled
from . import latents

ANCHOR = "dense torch"
BLOCKS = 4
LEAST = 3  # blocks of a shape that is not cut
OVER = 1.25  # times its share that a shape may take for those
RUN = 1.0  # seconds of a turn; half of it in a quick run
LR = 1e-3
SAME_FVU = {1: 1e-3, CHECKED: 0.05}  # relative; later steps also differ by what each library does
FLOPS = {"quick": 5e9, "full": 8e10, "tiny": 2e7}  # of one product, at most
MEMORY = 0.6  # of what is free
QUICK_LEFT_OUT = (
    "ksae fp32, unscreened",
    "ksae bf16 weights, unfused",
    "dense torch, compiled",
    "eai-sparsify, fused Adam",
)
PATIENCE = {"quick": 60.0, "full": 180.0, "tiny": 60.0}  # seconds until all are ready
TINY = Shape("tiny", 64, 32, 512, 8)
DTYPES = {"ksae bf16 weights": "bf16", "ksae bf16 weights, unfused": "bf16"}


def run(session: Session) -> None:
    """Fill the suite's rows, one shape after the other."""
    if session.device != "cpu":
        session.note("step: contestants run on the CPU only")
    size = "tiny" if session.tiny else "quick" if session.quick else "full"
    names = [n for n in CONTESTANTS if not (session.quick and n in QUICK_LEFT_OUT)]
    if session.tiny:
        names = ["ksae fp32", "dense torch", "eai-sparsify"]
    memory = int(MEMORY * available_memory("cpu"))
    shapes = [TINY] if session.tiny else NAMED[:1] if session.quick else NAMED
    flops, to_come = FLOPS[size], list(shapes)
    try:
        while to_come and session.left() > 0:
            seconds = session.left() / len(to_come)
            fit = scaled(to_come[0], len(names), memory, flops)
            session.note(f"{fit}; scaled: {fit.scaling}")
            needed = run_shape(session, fit, names, seconds, PATIENCE[size])
            to_come.pop(0)
            if size == "full" and to_come:
                share = session.left() / len(to_come)
                flops = affordable(FLOPS[size], needed / fit.flops, OVER * share)
    finally:
        for shape in to_come:  # those that the time, or Ctrl-C, left without a whole turn
            if not any(row.case.startswith(f"{shape.name}: ") for row in session.suite.rows):
                why = "not reached before the end of the run"
                session.add(Row("step", str(shape), OP, "step", "all", failure=why))


def affordable(flops: float, pace: float, seconds: float) -> float:
    """`flops`, halved until a shape that takes `pace` seconds for each ends within `seconds`."""
    while flops * pace > max(seconds, 1e-3):
        flops /= 2
    return flops


def run_shape(
    session: Session,
    shape: Shape,
    names: list[str],
    seconds: float,
    patience: float,
    anchor: str = ANCHOR,
    case: str | None = None,
) -> float:
    """One shape: start all, then round after round until the time is spent; the seconds that it
    needs for LEAST rounds.

    anchor: the contestant that ksae does not change. case: of the rows, whose costs are not known
    by formula, and of which the first step alone is compared; None: the shape, of TopK.
    """
    start = session.spent()
    task = Task(shape.N, shape.d, shape.F, shape.k, session.data, LR, session.threads)
    workers = []
    try:
        for name in names:
            workers.append(Worker.start(name, task))
            session.tick(f"starting {name}")
            if name == anchor:  # those of ours and torch's first: they are quick to import
                for worker in workers:
                    worker.ready(patience)
        waited = session.spent()
        for worker in sorted(workers, key=lambda w: "compiled" in w.name):  # it takes longest
            worker.ready(max(1.0, patience - (session.spent() - waited)))
        rows = {
            w.name: session.add(_row(session.name, case or str(shape), shape, w, anchor))
            for w in workers
        }
        ready = session.spent()
        until, latest = start + seconds, start + (math.inf if session.quick else OVER * seconds)
        rounds = _rounds(session, workers, rows, until, latest)
        needed = ready - start + LEAST * (session.spent() - ready) / rounds
        for worker in workers:
            while worker.failure is None and len(worker.fvu) < CHECKED:
                worker.step(timed=False)
        _check(workers, rows, SAME_FVU if case is None else {1: SAME_FVU[1]})
        name = case or shape.name
        session.note(f"{name}: {rounds} rounds")
        if rounds < LEAST:
            session.note(f"{name}: cut by the time, {LEAST} rounds were to be")
    finally:
        for worker in workers:
            worker.stop()
    if case is None:
        _floors(session, shape, rows)
    return needed


def _floors(session: Session, shape: Shape, rows: dict[str, Row]) -> None:
    """What ksae's steps would take at this machine's ceilings."""
    limit = costs.ceilings(shape.N, shape.d, shape.F, rounds=2, copied=2**24)
    session.suite.facts.setdefault("ceilings", {})[str(shape)] = limit
    for row in rows.values():
        if row.ours:
            product = limit.product(
                torch.bfloat16 if row.dtype == "bf16" else torch.float32,
                "unscreened" not in row.way,
            )
            phases = latents.train_step(**shape.sizes, s=2 if row.dtype == "bf16" else 4)
            total = sum(phases.values(), costs.Cost())
            row.bytes, row.flops = total.bytes, total.flops
            row.floor = sum(c.seconds(limit, product) for c in phases.values())


def _row(suite: str, case: str, shape: Shape, worker: Worker, anchor: str) -> Row:
    return Row(
        suite,
        case,
        OP,
        "step",
        worker.name,
        ours=worker.name.startswith("ksae"),
        anchor=anchor,
        shape=shape.sizes,
        dtype=DTYPES.get(worker.name, "fp32"),
        peak=worker.peak_extra,
        failure=worker.failure,
        extra={"version": worker.version, "note": worker.note},
    )


def _rounds(
    session: Session, workers: list[Worker], rows: dict[str, Row], until: float, latest: float
) -> int:
    """Interleaved steps in BLOCKS blocks; slow contestants take part once a block.

    After `until` LEAST blocks are filled (in a quick run all), of one round each; after `latest`
    the first alone.
    """
    rounds = 0
    try:
        for block in range(BLOCKS):
            late = latest if block < LEAST or session.quick else until
            if block and session.spent() > late:
                break
            end = session.spent() + (until - session.spent()) / (BLOCKS - block)
            taken: dict[str, list[float]] = {w.name: [] for w in workers if w.failure is None}
            try:
                rounds += _block(session, workers, rows, taken, end, rounds)
            finally:  # Ctrl-C keeps a part of a block too
                for name, samples in taken.items():
                    if samples:
                        rows[name].blocks.append(samples)
    finally:
        for row in rows.values():
            if row.failure is None and len(row.blocks) < LEAST:
                row.extra["cut"] = f"{len(row.blocks)} of {BLOCKS} blocks, cut by the time"
    return rounds


def _block(
    session: Session,
    workers: list[Worker],
    rows: dict[str, Row],
    taken: dict[str, list[float]],
    end: float,
    before: int,
) -> int:
    """Rounds until `end`, at least one, into `taken`: how many, after `before` of other blocks."""
    rounds = 0
    while rounds == 0 or session.spent() < end:
        alive = [w for w in workers if w.failure is None]
        turn = (before + rounds) % len(alive) if alive else 0
        for worker in alive[turn:] + alive[:turn]:
            if rounds and _is_slow(worker, alive):
                continue
            taken[worker.name] += _turn(worker, RUN / 2 if session.quick else RUN)
            rows[worker.name].failure = worker.failure
        rounds += 1
        session.tick(f"round {before + rounds}")
        if not alive:
            break
    return rounds


def _turn(worker: Worker, run: float) -> list[float]:
    """Seconds of the steps of one turn, which takes about `run` seconds."""
    before = len(worker.seconds)
    if min(worker.seconds, default=worker.warm) < run:
        worker.step(timed=False)
    while worker.failure is None:
        worker.step()
        if sum(worker.seconds[before:]) + min(worker.seconds, default=run) > run:
            break
    return worker.seconds[before:]


def _is_slow(worker: Worker, workers: list[Worker]) -> bool:
    """Eight times the fastest."""
    fastest = min(min(w.seconds) for w in workers if w.seconds)
    return bool(worker.seconds) and min(worker.seconds) > 8 * fastest


def _check(workers: list[Worker], rows: dict[str, Row], same: dict[int, float]) -> None:
    """Contestants whose FVU is not ksae's at the steps of `same`: their timing counts for
    nothing."""
    want = next((w.fvu for w in workers if w.name.startswith("ksae") and not w.failure), None)
    for worker in workers:
        if worker.failure is not None or want is None:
            continue
        rows[worker.name].extra["fvu"] = worker.fvu[:CHECKED]
        for step, tolerance in same.items():
            rounding = 10 if "bf16" in worker.name and step == 1 else 1
            got, should = worker.fvu[step - 1], want[step - 1]
            if not abs(got - should) <= rounding * tolerance * should:
                rows[
                    worker.name
                ].failure = f"result differs: FVU at step {step} is {got:.6f}, ksae's {should:.6f}"
