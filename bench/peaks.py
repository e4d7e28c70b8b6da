# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a call, in a process that does nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from .measure import map_each_block, peak_extra

if TYPE_CHECKING:
    from .session import Session

Peaks = dict[tuple[str, str, str, str], int]  # case, op, mode, way -> bytes
PATIENCE = 120.0  # seconds for a whole shape


def of_ops(shape: tuple[int, int, int, int], name: str, session: Session) -> Peaks | None:
    """Of every way of every op at one shape: outputs and workspaces, not the inputs."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    task = (shape, name, session.data, session.device, session.quick, session.threads)
    child = context.Process(target=_serve, args=(theirs, *task), daemon=True)
    child.start()
    theirs.close()
    try:
        found: Peaks | None = mine.recv() if mine.poll(PATIENCE) else None
    except EOFError:
        found = None
    finally:
        if child.is_alive():
            child.terminate()
        child.join()
    return found


def _serve(
    pipe: Connection,
    shape: tuple[int, int, int, int],
    name: str,
    kind: str,
    device: str,
    quick: bool,
    threads: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    from types import SimpleNamespace

    from .opcases import Case, problems
    from .ops import ways

    torch.set_num_threads(threads)
    map_each_block(True)
    case = Case(*shape, name, kind, device)
    settings: Any = SimpleNamespace(quick=quick, device=device)
    found: Peaks = {}
    for problem in problems(case):
        for way, make in ways(problem, settings).items():
            with contextlib.suppress(RuntimeError), torch.no_grad():
                call = make()
                call()  # graphs, pools and the state of an optimizer are made here
                peak = _cuda_peak(call) if device == "cuda" else peak_extra(call)
                if peak is not None:
                    found[(str(case), problem.op, problem.mode, way)] = peak
                del call
    pipe.send(found)


def _cuda_peak(call: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
