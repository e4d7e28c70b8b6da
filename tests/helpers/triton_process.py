# SPDX-License-Identifier: Apache-2.0
"""Runs a script of native/triton in a process where Triton is imported as the script wants it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
SCRIPTS = HELPERS.parent / "native" / "triton"


def report(script: str, *arguments: str, **environment: str) -> dict:
    """What a script prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        env=inherited | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
