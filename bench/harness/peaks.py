# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a call, in a process that does nothing else."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .children import in_process
from .measure import map_each_block, peak_extra

if TYPE_CHECKING:
    from .session import Session

Peak = tuple[str, str, str, str, int]  # case, op, mode, way, bytes
Ways = Callable[[Any, Any, Any], dict[str, Callable[[], Any]]]  # those of a problem, by name


class Task:
    """What the process is told: plain values and a function of a module, which can be sent."""

    def __init__(
        self,
        ways: Ways,
        shape: tuple[int, int, int, int],
        name: str,
        session: Session,
        seconds: float,
    ) -> None:
        self.ways, self.shape, self.name, self.seconds = ways, shape, name, seconds
        self.data, self.device = session.data, session.device
        self.quick, self.threads = session.quick, session.threads


def of_ops(
    ways: Ways, shape: tuple[int, int, int, int], name: str, session: Session, seconds: float
) -> Iterator[Peak | None]:
    """Of every way (`ways`) of every op at one shape: outputs and workspaces, not the inputs. None
    is the last, if the seconds are enough."""
    yield from in_process(_serve, Task(ways, shape, name, session, seconds), lambda text: None)


def _serve(task: Task) -> Iterator[Peak | None]:
    from types import SimpleNamespace

    from ..suites.case import Case
    from ..suites.opcases import problems
    from .report import REFERENCE

    torch.set_num_threads(task.threads)
    end = time.perf_counter() + task.seconds
    map_each_block(True)
    case = Case(*task.shape, task.name, task.data, task.device)
    settings: Any = SimpleNamespace(quick=task.quick, device=task.device)
    for problem in problems(case):
        gc.collect()
        gc.freeze()  # `peak_extra` collects before each call; what is imported is no garbage
        for way, make in task.ways(problem, case, settings).items():
            if time.perf_counter() > end:
                return
            with contextlib.suppress(RuntimeError), torch.no_grad():
                call = make()
                # Graphs, pools and the state of an optimizer are made at the first call; of the
                # reference, which can take seconds, the first call has to do.
                if way != REFERENCE or problem.mode == "backward":
                    call()
                peak = _cuda_peak(call) if task.device == "cuda" else peak_extra(call)
                if peak is not None:
                    yield (str(case), problem.op, problem.mode, way, peak)
                del call
    yield None


def _cuda_peak(call: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
