# SPDX-License-Identifier: Apache-2.0
"""Work in a process of its own, whose results arrive one by one."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any

BEAT = 1.0  # seconds between two calls of `waiting`


def in_process(
    work: Callable[[Any], Iterator[Any]], task: Any, waiting: Callable[[str], None]
) -> Generator[Any, None, None]:
    """What the generator `work(task)` yields in a new process, as it comes.

    Raises:
        RuntimeError: the process failed or died.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(theirs, work, task), daemon=True)
    child.start()
    theirs.close()
    count = 0
    try:
        while True:
            while not mine.poll(BEAT):
                waiting(f", {count} done")
            kind, value = mine.recv()
            if kind == "end":
                return
            if kind == "failure":
                raise RuntimeError(value)
            count += 1
            yield value
    except EOFError:
        child.join()
        raise RuntimeError(f"a process of the benchmark ended with {child.exitcode}") from None
    finally:
        if child.is_alive():
            child.kill()
        child.join()


def _serve(pipe: Connection, work: Callable[[Any], Iterator[Any]], task: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        for value in work(task):
            pipe.send(("value", value))
    except Exception as error:
        pipe.send(("failure", f"{type(error).__name__}: {error}"))
    else:
        pipe.send(("end", None))
