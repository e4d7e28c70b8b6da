# SPDX-License-Identifier: Apache-2.0
"""The processes of gpu/run.py: none outlives its time, and one that dies takes nothing else along.

A kernel that fails can leave its process without a usable device, or waiting for ever. So what is
measured runs in a process of its own, which says in the record what it begins; when it dies or
takes too long, a new one goes on with what was not begun. Nothing here needs ksae or torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..harness.session import Session

TIMED_OUT = 124
UNUSABLE = 70  # exit status of a process whose device is lost
LOOK = 0.2  # seconds between two looks at a process
GRACE = 20  # seconds that what is being measured at the end of the time may still take


def start(
    command: Sequence[str], log: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """The command in a group of its own; its output goes to the end of `log` as it comes."""
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        return subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.PIPE,
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> int:
    """Ends the process and what it started. Its exit status."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    return process.wait()


def run(command: Sequence[str], seconds: float, log: Path, **environment: str) -> tuple[int, str]:
    """Exit status (124 if it ran out of time) and what it printed."""
    position = log.stat().st_size if log.exists() else 0
    process = start(command, log, environment)
    try:
        status = process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    finally:
        end(process)
    with log.open("rb") as text:
        text.seek(position)
        return status, text.read().decode(errors="replace")


def last_line(log: Path) -> str:
    """What was printed last."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def begun_of(session: Session) -> list[str]:
    """Sections that some process has begun, as it is on disk now."""
    session.resume()
    names: list[str] = session.suite.facts["sections"]["begun"]
    return names


def supervise(
    session: Session,
    names: Sequence[str],
    command: Callable[[Sequence[str]], Sequence[str]],
    log: Path,
    most: float,
    **environment: str,
) -> None:
    """Sections `names`, in order, in a process that `command` makes for those that are left.

    A section that takes longer than `most` seconds is ended; the next process begins after it.
    """
    waiting = list(names)
    while waiting and session.left() > 0:
        process = start(command(waiting), log, environment)
        begun: list[str] = []
        since = time.monotonic()
        try:
            while (status := process.poll()) is None:
                time.sleep(LOOK)
                now = [name for name in begun_of(session) if name in waiting]
                begun, since = now, since if now == begun else time.monotonic()
                if time.monotonic() - since > most or session.left() < -GRACE:
                    status = TIMED_OUT
                    break
        finally:
            end(process)
        begun = [name for name in begun_of(session) if name in waiting]
        if status == 0:
            return
        how = "took too long" if status == TIMED_OUT else f"its process ended with {status}"
        session.problem(f"{begun[-1] if begun else waiting[0]}: {how}, after: {last_line(log)}")
        waiting = waiting[waiting.index(begun[-1]) + 1 :] if begun else []
    for name in waiting:
        session.problem(f"no time for {name}")


def end_with_parent() -> None:
    """This process ends when the one that started it is gone."""

    def wait() -> None:
        os.read(0, 1)  # the other end of the pipe is the parent's: it closes, nothing is written
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
