# SPDX-License-Identifier: Apache-2.0
"""Speed of latents spread over ranks on this machine: `python -m ksae.bench.studies.ranks`.

R processes of one thread each, joined by Gloo, against one process of R threads, on the same
tokens, from the same weights. They take turns, a few steps each, so that what else the machine does
meets both; while one computes the other waits for its turn. A round's ratio is the wall clock of
the one process over that of the ranks, from the start of the first to the end of the last.
Processor time is of all threads, Gloo's among them; waiting is wall clock less that of the main
thread. Losses of both are compared at every step.

With --phases the ranks also say where a step's time goes, by phase and by exchange.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("encode", "residual", "sums", "scalars", "update")
LR = 1e-4
BATCHES = 4
# Of losses, relative: at first, and after one of N k winners by less than the rounding of a weight
# has been another, which alone is 1e-5.
TOLERANCE, LATER, FIRST = 1e-6, 2e-3, 8

Times = dict[str, list[float]]  # of each part: wall clock, and processor time of the main thread


def serve(pipe: Any, rank: int, args: argparse.Namespace, store: str) -> None:
    """One process: rank -1 holds the whole coder, the others a part each. Does as many steps as it
    is sent, and answers with start, end, processor time, losses and parts."""
    import torch
    import torch.distributed as dist

    from ksae.bench.harness import data
    from ksae.coders import SAE, TopK
    from ksae.coders.coder import SparseCoder
    from ksae.parallel.shard import shard
    from ksae.step.train_step import TrainStep

    R = args.ranks
    torch.set_num_threads(R if rank < 0 else 1)
    sae: SparseCoder = SAE(args.d, args.F, TopK(args.k))
    sae.load_state_dict(data.initial_weights(args.F, args.d), strict=False)
    batches = data.batches(args.data, args.N, args.d, BATCHES)
    if rank >= 0:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=R)
        sae = shard(sae)
        n = args.N // R
        batches = [x[rank * n : (rank + 1) * n].clone() for x in batches]
    step, taken = TrainStep(sae, LR), 0
    parts: Times = defaultdict(lambda: [0.0, 0.0])
    if rank >= 0 and args.phases:
        watch(step, parts)
    pipe.send("ready")
    while count := pipe.recv():
        parts.clear()
        losses = []
        cpu, begin = time.process_time(), time.perf_counter()
        for _ in range(count):
            losses.append(step(batches[taken % BATCHES])["loss"])
            taken += 1
        end = time.perf_counter()
        pipe.send((begin, end, time.process_time() - cpu, [float(x) for x in losses], dict(parts)))
    if rank >= 0:
        dist.destroy_process_group()


def watch(step: Any, parts: Times) -> None:
    """Let the phases of a step and the exchanges within them add their times to `parts`."""
    from ksae.parallel.ranks import Ranks

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            begin, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                parts[name][0] += time.perf_counter() - begin
                parts[name][1] += time.thread_time() - cpu

        return inner

    for phase in PHASES:
        setattr(step._fused, phase, timed(phase, getattr(step._fused, phase)))
    step._rows_of_all = timed("tokens", step._rows_of_all)
    begin, scatter = Ranks.start_gather, Ranks.scatter

    def start(self: Any, rows: Any, name: str = "rows", into: Any = None) -> Any:
        part = f"  exchange: {name}"
        return timed(part, timed(part, begin)(self, rows, name, into))  # and the wait for its end

    def scattered(self: Any, rows: Any, name: str = "rows", into: Any = None) -> Any:
        return timed(f"  exchange: {name}", scatter)(self, rows, name, into)

    Ranks.start_gather = start  # type: ignore[method-assign]
    Ranks.scatter = scattered  # type: ignore[method-assign]


class Processes:
    """The one process and the ranks."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        import multiprocessing

        os.environ["OMP_WAIT_POLICY"] = "passive"  # who waits leaves the cores to the others
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(-1, args.ranks):
            here, there = context.Pipe()
            given = (there, rank, args, f"{folder}/store")
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def take(self, which: slice, steps: int) -> list[Any]:
        """Steps of some of the processes at once: what each answers."""
        for pipe in self.pipes[which]:
            pipe.send(steps)
        return [pipe.recv() for pipe in self.pipes[which]]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(0)
        for process in self.processes:
            process.join(30)


ONE, RANKS = slice(0, 1), slice(1, None)


def measure(args: argparse.Namespace) -> list[tuple[list[Any], list[Any]]]:
    """The answers of both of every round, checked."""
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(args, folder)
        for which in (ONE, RANKS):
            processes.take(which, 2)  # moments, workspaces and the heap are made here
        rounds = []
        for t in range(args.rounds):
            found = {}
            for which in (ONE, RANKS) if t % 2 else (RANKS, ONE):
                found[which.start] = processes.take(which, args.steps)
            one, ranks = found[ONE.start], found[RANKS.start]
            for theirs in ranks:
                for a, b in zip(one[0][3], theirs[3], strict=True):
                    allowed = TOLERANCE if (t + 1) * args.steps + 2 <= FIRST else LATER
                    assert abs(a - b) <= allowed * abs(a), (t, a, b)
            rounds.append((one, ranks))
        processes.close()
    return rounds


def report(args: argparse.Namespace, rounds: list[tuple[list[Any], list[Any]]]) -> str:
    S: int = args.steps

    def wall(answers: list[Any]) -> float:
        seconds: float = max(a[1] for a in answers) - min(a[0] for a in answers)
        return seconds * 1e3 / S

    def cpu(answers: list[Any]) -> float:
        seconds: float = sum(a[2] for a in answers)
        return seconds * 1e3 / S

    def quartiles(values: list[float]) -> str:
        low, middle, high = statistics.quantiles(values, n=4)
        return f"{middle:8.1f} ({low:.1f} to {high:.1f})"

    one, ranks = zip(*rounds, strict=True)
    ratios = [wall(a) / wall(b) for a, b in rounds]
    busy = [cpu(a) / cpu(b) for a, b in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    walls = [[wall(a) for a in side] for side in (one, ranks)]
    of_medians = statistics.median(walls[0]) / statistics.median(walls[1])
    least = min(walls[0]) / min(walls[1])
    lines = [
        f"N={args.N} d={args.d} F={args.F} k={args.k}, {args.data} data, float32,"
        f" {len(rounds)} rounds of {S} steps; median (quartiles), ms a step",
        f"one process, {args.ranks} threads: wall clock {quartiles(walls[0])},"
        f" processor time {quartiles([cpu(a) for a in one])}",
        f"{args.ranks} ranks of 1 thread:     wall clock {quartiles(walls[1])},"
        f" processor time {quartiles([cpu(b) for b in ranks])}",
        f"speed of the ranks, one process = 1: {middle:.3f} ({low:.3f} to {high:.3f}) by round;"
        f" {of_medians:.3f} of medians, {least:.3f} of the fastest rounds;"
        f" {statistics.median(busy):.3f} by processor time",
    ]
    if args.phases:
        lines += parts(args, list(ranks))
    return "\n".join(lines)


def parts(args: argparse.Namespace, ranks: list[list[Any]]) -> list[str]:
    """A table of the parts of a step on each rank."""
    names = list(dict.fromkeys(name for _, *_, found in ranks[0] for name in found))
    lines = ["ms a step of each rank: wall clock, processor time of the main thread, medians"]
    for name in names:
        cells = []
        for rank in range(args.ranks):
            pairs = [answers[rank][4].get(name, [0.0, 0.0]) for answers in ranks]
            for values in zip(*pairs, strict=True):
                cells.append(f"{statistics.median(values) / args.steps * 1e3:8.2f}")
        lines.append(f"{name:32}" + " ".join(cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"N": 2048, "d": 768, "F": 24576, "k": 32, "ranks": 2, "rounds": 25, "steps": 3}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--data", default="normal", help="normal, planted or a .npy file")
    parser.add_argument("--phases", action="store_true", help="say where the ranks' time goes")
    parser.add_argument("--out", type=Path, help="write the report there too")
    args = parser.parse_args()
    text = report(args, measure(args))
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
