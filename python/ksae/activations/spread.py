# SPDX-License-Identifier: Apache-2.0
"""A harvest by several processes: each runs the language model on its share of the contexts, and
all get the rows of all, in the order of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ksae.errors import RankError
from ksae.parallel.ranks import Ranks

Run = Callable[[Tensor], dict[str, Tensor]]


def in_turn(
    ranks: Ranks, run: Run, numbers: Tensor, batch_size: int
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """run(numbers) [contexts] -> rows, a batch of contexts at a time as in one process, and so with
    its bits; rank r runs batches r, r + R, ... Yields rows and how many contexts they are of.

    Raises:
        RankError: another rank has raised an error.
    """
    chosen = torch.split(numbers, batch_size) if len(numbers) else ()
    for start in range(0, len(chosen), ranks.size):
        turn = chosen[start : start + ranks.size]
        with told(ranks):
            rows = run(turn[ranks.rank]) if ranks.rank < len(turn) else None
        ranks.agree("harvest", {"contexts": start})
        every = [ranks.broadcast(rows if r == ranks.rank else None, r) for r in range(len(turn))]
        yield from zip(every, map(len, turn), strict=True)  # no exchange while they are used
    ranks.agree("harvest", {"contexts": len(numbers)})


@contextlib.contextmanager
def told(ranks: Ranks | None) -> Iterator[None]:
    """Let the other ranks know of an error of this one."""
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        if ranks is not None and not vars(error).setdefault("told", False):
            vars(error)["told"] = True
            ranks.refuse("harvest", error)
        raise
