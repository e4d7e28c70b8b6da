# SPDX-License-Identifier: Apache-2.0
"""Suite `families`: a whole training step of the architectures beside TopK, as suite `step` has it.

ksae, dense torch, and the libraries that have the architecture, each with its own defaults.

JumpReLU starts at a threshold that N(0, 1) inputs pass k times a token.
"""

from __future__ import annotations

from ..contestants.families import ARCHITECTURES, CONTESTANTS
from ..contestants.workers import OP
from ..harness.record import Row
from ..harness.session import Session
from ..harness.shapes import NAMED, available_memory, scaled
from .step import FLOPS, MEMORY, PATIENCE, TINY, run_shape


def run(session: Session) -> None:
    """Fill the suite's rows, one architecture after the other."""
    if session.device != "cpu":
        session.note("families: contestants run on the CPU only")
    size = "tiny" if session.tiny else "quick" if session.quick else "full"
    shape = TINY if session.tiny else NAMED[0]
    to_come = list(ARCHITECTURES)
    memory = int(MEMORY * available_memory("cpu"))
    try:
        while to_come and session.left() > 0:
            architecture = to_come[0]
            names = [name for name in CONTESTANTS if name.endswith(f", {architecture}")]
            if session.tiny:
                names = names[:2]
            fit = scaled(shape, len(names), memory, FLOPS[size])
            session.note(f"{architecture}: {fit}; scaled: {fit.scaling}")
            run_shape(
                session,
                fit,
                names,
                session.left() / len(to_come),
                PATIENCE[size],
                anchor=f"dense torch, {architecture}",
                case=f"{architecture}, {fit}",
            )
            to_come.pop(0)
    finally:
        for architecture in to_come:
            if not any(row.case.startswith(f"{architecture}, ") for row in session.suite.rows):
                why = "not reached before the end of the run"
                case = f"{architecture}, {shape}"
                session.add(Row(session.name, case, OP, "step", "all", failure=why))
