# SPDX-License-Identifier: Apache-2.0
"""Runs a script of this folder in a process where Triton is imported as the script wants it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def report(script: str, *arguments: str, **environment: str) -> dict:
    """What a script of this folder prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
