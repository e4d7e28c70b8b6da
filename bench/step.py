# SPDX-License-Identifier: Apache-2.0
"""A whole training step of ksae, of dense torch and of every peer that is installed, side by side.

    python bench/step.py --json step.json

Forward, loss, backward, gradient projection, Adam and unit norm, as each library's own trainer does
them, from the same weights on the same batches. See bench/README.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import costs
import torch
from measure import Times, describe, machine, table, write_json
from workers import CHECKED, CONTESTANTS, Task, Worker

OURS = "ksae fp32, screened"  # what the ratios are to, where the CPU can screen
SHAPES = [(2048, 768, 24576, 32), (2048, 768, 16384, 64)]
SMALL = [(256, 96, 1024, 16)]
LR = 1e-3
SLOW = 8  # times the fastest; such contestants take part in every fourth round only


@dataclass(frozen=True)
class Claim:
    """What a contestant has to reach against a peer."""

    ours: str
    peer: str
    times: float


CLAIMS = [
    Claim("ksae fp32", "eai-sparsify", 3.5),
    Claim("ksae fp32, screened", "eai-sparsify", 4.5),
    Claim("ksae bf16 weights", "eai-sparsify", 6),
    Claim("ksae fp32", "sae-lens", 14),
    Claim("ksae fp32", "dictionary-learning", 14),
]
EXTRA_LIMIT = 0.05  # of the N x F float32 matrix
SAME_FVU = {1: 1e-3, CHECKED: 0.05}  # relative; later steps also differ by what each library does


def run(shape: tuple[int, int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    N, d, F, k = shape
    task = Task(N, d, F, k, args.data, LR, args.threads, args.verbose)
    print(f"\nN={N} d={d} F={F} k={k}, data {args.data}, lr {LR}")
    print("starting", flush=True)
    workers = []
    for name in args.only or CONTESTANTS:
        workers.append(Worker.start(name, task))
        print(f"  {name}: {workers[-1].failure or 'ready'}", flush=True)
    for round_ in range(args.rounds):
        alive = [w for w in workers if w.failure is None]
        turn = round_ % len(alive) if alive else 0
        for worker in alive[turn:] + alive[:turn]:
            if round_ % 4 == 0 or not _is_slow(worker, alive):
                worker.step()
    for worker in workers:
        while worker.failure is None and len(worker.fvu) < CHECKED:
            worker.step(timed=False)
    for worker in workers:
        worker.stop()

    times = {w.name: Times.of(w.seconds) for w in workers if w.failure is None}
    wrong = _differences(workers)
    base = OURS if OURS in times else "ksae fp32"
    limit = costs.ceilings(N, d, F)
    print()
    print(_table(workers, times, base, N * F * 4, wrong))
    print()
    print(limit)
    floors = _floors(shape, limit, times)
    # The claims are about these shapes only.
    verdicts = _verdicts(workers, times, N * F * 4) if shape in SHAPES else []
    for line in [*floors, *verdicts, *wrong.values()]:
        print(line)
    return {
        "shape": {"N": N, "d": d, "F": F, "k": k},
        "ceilings": limit,
        "rows": [_record(w, times, base, N * F * 4) for w in workers],
        "floors": floors,
        "verdicts": verdicts,
        "differences": wrong,
    }


def _is_slow(worker: Worker, workers: list[Worker]) -> bool:
    fastest = min(min(w.seconds) for w in workers if w.seconds)
    return min(worker.seconds) > SLOW * fastest


def _differences(workers: list[Worker]) -> dict[str, str]:
    """Contestants whose FVU is not ksae's: their timing counts for nothing."""
    ours = [w for w in workers if w.name.startswith("ksae") and w.failure is None]
    if not ours:
        return {}
    want = ours[0].fvu
    wrong = {}
    for worker in workers:
        for step, tolerance in SAME_FVU.items():
            if worker.failure is not None:
                continue
            rounding = 10 if "bf16" in worker.name and step == 1 else 1
            got, should = worker.fvu[step - 1], want[step - 1]
            if not abs(got - should) <= rounding * tolerance * should:
                line = f"{worker.name}: FVU at step {step} is {got:.6f}, ksae's {should:.6f}"
                wrong.setdefault(worker.name, f"RESULTS DIFFER: {line}")
    return wrong


def _table(
    workers: list[Worker], times: dict[str, Times], base: str, matrix: int, wrong: dict[str, str]
) -> str:
    header = [
        "contestant",
        "version",
        "ms",
        "quartiles",
        "n",
        "ratio",
        "extra MB",
        "of 4NF",
        "heap MB",
    ]
    header += ["FVU 1", f"FVU {CHECKED}", "remarks"]
    rows = []
    for w in workers:
        if w.failure is not None:
            rows.append([w.name, w.version or "-", *["-"] * 9, w.failure[:60]])
            continue
        t = times[w.name]
        ratio = f"{t.median / times[base].median:.2f}" if base in times else "-"
        extra = "-" if w.peak_extra is None else f"{w.peak_extra / 1e6:.1f}"
        share = "-" if w.peak_extra is None else f"{w.peak_extra / matrix:.3f}"
        heap = "-" if w.peak_resident is None else f"{w.peak_resident / 1e6:.1f}"
        remark = "RESULTS DIFFER" if w.name in wrong else w.note
        rows.append(
            [
                w.name,
                w.version,
                f"{t.median * 1e3:.1f}",
                f"{t.q1 * 1e3:.1f}-{t.q3 * 1e3:.1f}",
                str(t.n),
                ratio,
                extra,
                share,
                heap,
                f"{w.fvu[0]:.4f}",
                f"{w.fvu[CHECKED - 1]:.4f}",
                remark,
            ]
        )
    return table(header, rows)


def _record(w: Worker, times: dict[str, Times], base: str, matrix: int) -> dict[str, Any]:
    record: dict[str, Any] = {"name": w.name, "version": w.version, "note": w.note}
    if w.failure is not None:
        return record | {"failure": w.failure}
    return record | {
        "seconds": times[w.name],
        "ratio": times[w.name].median / times[base].median if base in times else None,
        "peak_extra_bytes": w.peak_extra,
        "peak_resident_bytes": w.peak_resident,
        "peak_extra_of_matrix": None if w.peak_extra is None else w.peak_extra / matrix,
        "fvu": w.fvu[:CHECKED],
    }


def _floors(
    shape: tuple[int, int, int, int], limit: costs.Ceilings, times: dict[str, Times]
) -> list[str]:
    """What the phases need at the ceilings just measured, and how near each step of ours came."""
    lines = []
    for name, s, dtype, screened in (
        ("ksae fp32", 4, torch.float32, False),
        ("ksae fp32, screened", 4, torch.float32, True),
        ("ksae bf16 weights", 2, torch.bfloat16, False),
    ):
        if name not in times:
            continue
        phases = costs.train_step(*shape, s)
        product = limit.product(dtype, screened)
        floor = sum(c.seconds(limit, product) for c in phases.values())
        total = sum(phases.values(), costs.Cost())
        lines.append(
            f"floor of {name}: {floor * 1e3:.1f} ms for {total.bytes / 1e9:.2f} GB and "
            f"{total.flops / 1e9:.1f} GFLOP; the step is at {floor / times[name].median:.0%} of it"
        )
    return lines


def _verdicts(workers: list[Worker], times: dict[str, Times], matrix: int) -> list[str]:
    lines = []
    for claim in CLAIMS:
        text = f"{claim.ours} at least {claim.times:g}x faster than {claim.peer}"
        if claim.ours in times and claim.peer in times:
            ratio = times[claim.peer].median / times[claim.ours].median
            lines.append(f"{'PASS' if ratio >= claim.times else 'MISS'}  {text}: {ratio:.2f}x")
        else:
            lines.append(f"n/a   {text}: not measured")
    for w in workers:
        if w.name.startswith("ksae") and "unfused" not in w.name and w.peak_extra is not None:
            share = w.peak_extra / matrix
            verdict = "PASS" if share < EXTRA_LIMIT else "MISS"
            lines.append(
                f"{verdict}  {w.name}: peak extra memory below {EXTRA_LIMIT} of 4NF: {share:.3f}"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--shape", action="append", metavar="N,d,F,k", help="default: both shapes of the README")
    add("--small", action="store_true", help="one small shape, to see that everything runs")
    add("--threads", type=int, default=2, help="of every contestant (default %(default)s)")
    add("--rounds", type=int, default=21, help="interleaved (default %(default)s)")
    add("--data", default="normal", help="normal, planted or a .npy file (default %(default)s)")
    add("--only", action="append", choices=list(CONTESTANTS), help="may be given several times")
    add("--json", metavar="PATH", help="write the results there")
    add("--verbose", action="store_true", help="show what the libraries print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, s.split(","))) for s in args.shape or []]
    record = machine(data=args.data, rounds=args.rounds)
    print(describe(record))
    results = [run(s, args) for s in shapes or (SMALL if args.small else SHAPES)]
    write_json(args.json, {"machine": record, "shapes": results})
    return 1 if any(r["differences"] for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
