# SPDX-License-Identifier: Apache-2.0
"""Processes that are ranks of a Gloo group, for tests: started once, given job after job."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT = 120.0  # seconds that a job may take, on a busy machine


@dataclass
class Failed:
    """What a rank raised."""

    kind: str
    message: str
    where: str


class Pool:
    """World processes of one thread each, joined by Gloo.

    world: how many. timeout: seconds that an exchange may take.
    """

    def __init__(self, world: int, timeout: float = 60.0) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            here, there = context.Pipe()
            place = (rank, world, timeout, f"{self.folder.name}/store")
            process = context.Process(target=_serve, args=(there, *place), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
        """job(group, *args) on the first ranks: what each returns, or Failed. `job` is a function
        of a module in tests/helpers; a rank that does not answer ends all and is an error."""
        for pipe in self.pipes:  # all take part in making a group
            pipe.send((job, ranks, args))
        end = time.monotonic() + LIMIT
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(end - time.monotonic(), 0)):  # True of one that has ended
                self.close()
                raise TimeoutError(f"rank {rank} of {ranks} has not answered for {LIMIT} s")
            try:
                answers.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                answers.append(Failed("ended", "", ""))
        return answers[:ranks]

    def values(self, job: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
        """As `run`, where no rank may fail."""
        answers = self.run(job, ranks, *args)
        for answer in answers:
            assert not isinstance(answer, Failed), answer.where
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def _serve(pipe: Connection, rank: int, world: int, timeout: float, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=max(timeout, 60.0)),  # to find each other on a busy machine
    )
    groups: dict[int, Any] = {} if timeout < 60 else {world: dist.group.WORLD}
    while True:
        try:
            job, ranks, args = pipe.recv()
        except EOFError:
            os._exit(0)
        answer: Any = None
        try:
            if ranks not in groups:
                limit = timedelta(seconds=timeout)
                groups[ranks] = dist.new_group(list(range(ranks)), timeout=limit)
            if rank < ranks:
                answer = job(groups[ranks], *args)
        except Exception as error:
            where = "".join(traceback.format_exception(error))
            answer = Failed(type(error).__name__, str(error), where)
        pipe.send(answer)


sys.path.append(str(Path(__file__).parent))  # of the processes that are spawned
