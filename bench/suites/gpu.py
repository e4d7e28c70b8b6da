# SPDX-License-Identifier: Apache-2.0
"""Suite `gpu`: what gpu/run.py measures on a CUDA device, with the package as it is installed.

gpu/run.py runs in a process of its own, so that a launch that fails does not take the other suites
along, and writes as it goes: what it had measured when it was cut off is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..harness.measure import Times
from ..harness.record import Kept, Row
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
        take(session, json.loads(found[0].read_text()))


def take(session: Session, data: dict[str, Any]) -> None:
    """Rows, ceilings and problems of gpu/run.py's record."""
    session.suite.facts["ceilings"] = data["ceilings"]
    for problem in data["problems"]:
        session.note(f"problem: {problem}")
    for row in rows(data):
        session.add(row)


def rows(data: dict[str, Any]) -> Iterator[Row]:
    """A row for each, with the times that gpu/run.py kept of it: one block."""
    for r in data["rows"]:
        timed = "median" in r
        times = Times(*(r[name] for name in ("median", "q1", "q3", "n"))) if timed else None
        yield Row(
            "gpu",
            r["shape"],
            r["op"],
            "step" if r["op"] == "step" else "forward",
            r["way"],
            ours=r["way"].startswith("ksae"),
            kept=Kept(times, [times.q1]) if times else None,
            dtype="bf16",
            bytes=r.get("bytes"),
            flops=r.get("flops"),
            floor=r["fraction"] * r["median"] if timed else None,
            peak=r.get("extra_bytes"),
            failure=None if timed else r.get("note", "no time"),
        )
