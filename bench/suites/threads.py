# SPDX-License-Identifier: Apache-2.0
"""Suite `threads`: whether threads of ksae's kernels and of torch's ops get in each other's way.

A second pool of threads would still spin, or have to be woken, when the other's turn comes. So each
op is timed alone, call after call, and in turns with the other; blocks of both kinds alternate.
Both sides use OpenMP: in one process they share one runtime (`facts` names it), hence one pool.
What the turns cost beyond that is the cache: each call finds the other's data in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ksae.functional import sparse_decode, topk_encode

from ..harness.clock import timed
from ..harness.record import Row
from ..harness.session import Session

Call = Callable[[], Any]
SHAPE = {"N": 512, "d": 768, "F": 4096, "k": 32}  # calls of milliseconds
TINY = {"N": 16, "d": 32, "F": 128, "k": 4}
BLOCKS, ROUNDS = 20, 10


def run(session: Session) -> None:
    """Fill a pair of rows, alone and in turns, for each op of each pair."""
    shape = TINY if session.tiny else SHAPE
    blocks = 2 if session.tiny else BLOCKS
    theirs, ours = calls(**shape)
    session.suite.facts["runtimes"] = runtimes()
    pairs = [(a, b) for a in theirs for b in ours]
    every = theirs | ours
    for number, pair in enumerate(pairs):
        rows = [_rows(session, shape, pair, i) for i in range(2)]
        both = [every[name] for name in pair]
        _samples(both, 3)
        share = session.left() / (len(pairs) - number)
        end = session.spent() + share
        for block in range(blocks):
            for (alone, _), call in zip(rows, both, strict=True):
                alone.blocks += _samples([call], ROUNDS)
            for (_, turns), taken in zip(rows, _samples(both, ROUNDS), strict=True):
                turns.blocks.append(taken)
            session.tick(" beside ".join(pair))
            if block >= 2 and session.spent() > end:
                break


def calls(N: int, d: int, F: int, k: int) -> tuple[dict[str, Call], dict[str, Call]]:
    """Calls of torch that use its threads, and calls of ksae that use theirs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, d, generator=generator)
    W = torch.randn(F, d, generator=generator) / d**0.5
    b = torch.zeros(F)
    values, indices = topk_encode(x, W, b, k)
    u = torch.nn.functional.linear(x, W)  # [N, F]
    theirs = {"torch mm": lambda: x @ W.T, "torch relu": lambda: u.relu()}
    ours = {
        "topk_encode": lambda: topk_encode(x, W, b, k),
        "sparse_decode": lambda: sparse_decode(values, indices, W),
    }
    return theirs, ours


def runtimes() -> list[str]:
    """The OpenMP runtimes loaded into this process (Linux; empty elsewhere)."""
    maps = Path("/proc/self/maps")
    files = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    names = {Path(file).name for file in files}
    return sorted(n for n in names if n.startswith(("libgomp", "libiomp", "libomp")))


def _rows(session: Session, shape: dict[str, int], pair: tuple[str, str], i: int) -> list[Row]:
    return [
        session.add(
            Row(
                suite="threads",
                case=f"beside {pair[1 - i]}",
                op=pair[i],
                mode="forward",
                way=way,
                anchor="alone",
                shape=shape,
            )
        )
        for way in ("alone", "in turns")
    ]


def _samples(both: list[Call], rounds: int) -> list[list[float]]:
    """Seconds of each call, made one after the other, round after round."""
    taken: list[list[float]] = [[] for _ in both]
    for _ in range(rounds):
        for call, samples in zip(both, taken, strict=True):
            samples.append(timed(call))
    return taken
