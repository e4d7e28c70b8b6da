# SPDX-License-Identifier: Apache-2.0
"""Command lines of ksae, run as a user types them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import ksae


def run_command(command: str) -> None:
    """Run `ksae ...` in the current folder; it has to end well."""
    assert command.startswith("ksae "), command
    code = f"import sys, ksae_cli; sys.argv = {shlex.split(command)!r}; ksae_cli.main()"
    package = str(Path(ksae.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
