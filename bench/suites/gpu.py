# SPDX-License-Identifier: Apache-2.0
"""Suite `gpu`: what gpu/run.py measures on a CUDA device, with the package as it is installed.

gpu/run.py runs in a process of its own, so that a launch that fails does not take the other suites
along, and writes as it goes: what it had measured when it was cut off is there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..gpu.report import SUITE
from ..harness.record import Record, load
from ..harness.session import Session

BEAT = 1.0  # seconds between two looks at the process


def run(session: Session) -> None:
    """Fill the suite's rows; on a device that is not CUDA with gpu/run.py's dry run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ksae.bench.gpu.run", "--out", folder, "--installed"]
        command += ["--minutes", str(session.left() / 60)]
        command += [] if session.device == "cuda" else ["--dry-run"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            try:
                while child.poll() is None:
                    time.sleep(BEAT)
                    session.tick("bench/gpu/run.py")
            finally:
                child.kill()
                error = child.stderr.read().decode(errors="replace") if child.stderr else ""
        found = list(Path(folder).glob("gpu_*.json"))
        if not found:
            raise RuntimeError(
                (error.strip().splitlines() or ["bench/gpu/run.py left nothing"])[-1]
            )
        take(session, load(found[0]))


def take(session: Session, record: Record) -> None:
    """What gpu/run.py has found."""
    suite = record.suites[SUITE]
    session.suite.facts |= suite.facts
    session.suite.problems += suite.problems
    for row in suite.rows:
        session.add(row)
