# SPDX-License-Identifier: Apache-2.0
"""A process for each contestant of the step benchmark.

Its memory can be measured, its environment is its own, and if it fails the others go on. The parent
asks one process at a time for one step: steps of all contestants alternate, only one computes.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from ksae.errors import failure

from ..harness import data
from ..harness.measure import map_each_block, peak_extra, slow_share
from . import families, ours, peers

BATCHES = 4
CHECKED = families.CHECKED  # the step (counted from 1) whose FVU must agree, after the first

OP = "train_step"  # as KSAE_BENCH_SLOW and the rows call it

CONTESTANTS: dict[str, Callable[..., ours.Contestant]] = {
    "ksae fp32": partial(ours.Ksae, screening=True),
    "ksae fp32, unscreened": partial(ours.Ksae, screening=False),
    "ksae bf16 weights": partial(ours.Ksae, dtype=torch.bfloat16),
    "ksae fp32, unfused": partial(ours.Ksae, fused=False),
    "ksae bf16 weights, unfused": partial(ours.Ksae, dtype=torch.bfloat16, fused=False),
    "dense torch": ours.Dense,
    "dense torch, compiled": partial(ours.Dense, compiled=True),
    "eai-sparsify": peers.Sparsify,
    "eai-sparsify, fused Adam": partial(peers.Sparsify, fused_adam=True),
    "sae-lens": peers.SaeLens,
    "dictionary-learning": peers.DictionaryLearning,
    "overcomplete": peers.Overcomplete,
}
EVERY = CONTESTANTS | families.CONTESTANTS
MODULES = {
    "eai-sparsify": "sparsify",
    "sae-lens": "sae_lens",
    "dictionary-learning": "dictionary_learning",
    "overcomplete": "overcomplete",
}


def missing(name: str) -> str | None:
    """Why a contestant cannot take part, as far as that is seen without importing it."""
    module = MODULES.get(name.partition(",")[0])
    if module is not None and importlib.util.find_spec(module) is None:
        return f"not installed: pip install {name.partition(',')[0]}"
    if name == "dense torch, compiled" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler"
    return None


@dataclass(frozen=True)
class Task:
    N: int
    d: int
    F: int
    k: int
    data: str
    lr: float
    threads: int
    verbose: bool = False


@dataclass
class Worker:
    """One contestant: what it reported, and the times that `step` collects."""

    name: str
    version: str = ""
    note: str = ""
    failure: str | None = None
    peak_extra: int | None = None  # bytes held at once in a step, beyond what is there before it
    warm: float = 0.0  # seconds of the step before the first that is timed
    fvu: list[float] = field(default_factory=list)  # of every step so far
    seconds: list[float] = field(default_factory=list)  # of the timed ones
    _process: Any = None
    _pipe: Any = None

    @staticmethod
    def start(name: str, task: Task) -> Worker:
        """Starts the process; `ready` waits for it, so that several can start at once."""
        worker = Worker(name, failure=missing(name))
        if worker.failure is not None:
            return worker
        context = multiprocessing.get_context("spawn")
        ours_, theirs = context.Pipe()
        worker._process = context.Process(target=_serve, args=(theirs, name, task), daemon=True)
        worker._process.start()
        theirs.close()
        worker._pipe = ours_
        return worker

    def ready(self, patience: float) -> None:
        """Wait until the process has taken its first steps, for at most `patience` seconds."""
        if self.failure is not None or self.fvu:
            return
        if not self._pipe.poll(patience):
            self.stop(kill=True)
            self.failure = "not ready in time"
            return
        report = self._receive()
        if report is not None:
            self.version, self.note = report["version"], report["note"]
            self.peak_extra, self.warm = report["peak_extra"], report["warm"]
            self.fvu = report["fvu"]

    def step(self, timed: bool = True) -> None:
        self._pipe.send("step")
        report = self._receive()
        if report is not None:
            self.fvu.append(report["fvu"])
            if timed:
                self.seconds.append(report["seconds"])

    def stop(self, kill: bool = False) -> None:
        """End the process: it is asked to, or killed."""
        if self._process is None:
            return
        if self.failure is None and not kill:
            self._pipe.send("stop")
            self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _receive(self) -> dict[str, Any] | None:
        try:
            report = self._pipe.recv()
        except EOFError:
            self._process.join()
            self.failure = f"its process ended with exit code {self._process.exitcode}"
            return None
        self.failure = report.get("failure")
        return None if self.failure else report


def _serve(pipe: Connection, name: str, task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    if not task.verbose:
        _silence()
    try:
        _run(pipe, name, task)
    except Exception as error:
        pipe.send({"failure": failure(error)})


def _silence() -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)


def _run(pipe: Connection, name: str, task: Task) -> None:
    torch.set_num_threads(task.threads)
    map_each_block(True)
    start = data.initial_weights(task.F, task.d)
    contestant = EVERY[name](start, task.k, task.lr)
    del start
    slow = slow_share(OP) if name.startswith("ksae") else 0.0
    inputs = data.batches(task.data, task.N, task.d, BATCHES)
    prepare = getattr(contestant, "prepare", lambda x: None)
    taken = 0

    def step() -> tuple[float, float]:
        nonlocal taken
        x = inputs[taken % BATCHES]
        taken += 1
        prepare(x)
        begin = time.perf_counter()
        loss = contestant.step(x)
        end = time.perf_counter()
        seconds = (end - begin) * (1 + slow)
        while end < begin + seconds:
            end = time.perf_counter()
        return seconds, contestant.fvu(loss, x)

    fvu = [step()[1], step()[1]]  # moments, workspaces and pools are made here

    def memory_step() -> int | None:
        nonlocal taken
        for p in contestant.parameters():
            p.grad = None  # gradients that a trainer keeps between steps are a cost of the step
        x = inputs[taken % BATCHES]
        taken += 1
        prepare(x)
        losses: list[Any] = []
        peak = peak_extra(lambda: losses.append(contestant.step(x)))
        fvu.append(contestant.fvu(losses[0], x))
        return peak

    peak_held = memory_step()
    map_each_block(False)  # as it is for everybody: steps are timed so
    warm, value = step()  # the heap grows to what a step needs
    fvu.append(value)
    pipe.send(
        {
            "version": contestant.version,
            "note": contestant.note,
            "peak_extra": peak_held,
            "warm": warm,
            "fvu": fvu,
        }
    )
    while pipe.recv() == "step":
        seconds, value = step()
        pipe.send({"seconds": seconds, "fvu": value})
