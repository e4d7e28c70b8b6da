# SPDX-License-Identifier: Apache-2.0
"""Whether the threads of ksae's kernels and of torch's ops get into each other's way.

    python bench/threads.py --json threads.json

A second pool of threads would still spin, or have to be woken, when the other's turn comes. So each
op is timed alone, call after call, and in turns with the other, and the ratio is what the turns
cost. Both sides use OpenMP; in one process they share one libgomp, hence one pool. See
bench/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import describe, machine, table, write_json

import ksae

N, d, F, k = 512, 768, 4096, 32  # calls of some milliseconds, as the small ops of a step


def ways(seed: int = 0) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Calls of torch that use its threads, and calls of ksae that use theirs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, d, generator=generator)
    W = torch.randn(F, d, generator=generator) / d**0.5
    b = torch.zeros(F)
    values, indices = ksae.topk_encode(x, W, b, k)
    u = torch.nn.functional.linear(x, W)
    theirs = {"torch mm": lambda: x @ W.T, "torch relu": lambda: u.relu()}
    ours = {
        "topk_encode": lambda: ksae.topk_encode(x, W, b, k),
        "sparse_decode": lambda: ksae.sparse_decode(values, indices, W),
    }
    return theirs, ours


def seconds(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Samples of each call, made one after the other, round after round."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, samples in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return taken


def compare(one: Callable[[], Any], other: Callable[[], Any], blocks: int, rounds: int) -> Any:
    """Medians of each call alone and in turns; blocks of both kinds alternate."""
    alone: list[list[float]] = [[], []]
    turns: list[list[float]] = [[], []]
    seconds([one, other], 3)
    for _ in range(blocks):
        for i, call in enumerate((one, other)):
            alone[i] += seconds([call], rounds)[0]
        for i, samples in enumerate(seconds([one, other], rounds)):
            turns[i] += samples
    return [statistics.median(samples) for samples in (*alone, *turns)]


def pools() -> list[str]:
    """The OpenMP runtimes loaded into this process."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = {line.split()[-1] for line in lines if "omp" in line and ".so" in line}
    return sorted({Path(file).name for file in files if "libgomp" in file or "libiomp" in file})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=20, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", metavar="PATH", help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = machine(N=N, d=d, F=F, k=k, runtimes=pools())
    print(describe(record), flush=True)
    theirs, ours = ways()
    rows, results = [], []
    for a, one in theirs.items():
        for b, other in ours.items():
            alone_a, alone_b, turn_a, turn_b = compare(one, other, args.blocks, args.rounds)
            pairs = ((a, alone_a, turn_a, b), (b, alone_b, turn_b, a))
            for name, alone, turn, beside in pairs:
                row = {"op": name, "beside": beside, "alone": alone, "in_turns": turn}
                results.append(row | {"ratio": turn / alone})
                times = (f"{alone * 1e3:.3f}", f"{turn * 1e3:.3f}", f"{turn / alone:.2f}x")
                rows.append([f"{name} beside {beside}", *times])
    print(table(["op", "alone, ms", "in turns, ms", "ratio"], rows))
    write_json(args.json, {"machine": record, "rows": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
