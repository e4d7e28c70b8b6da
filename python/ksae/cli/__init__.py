# SPDX-License-Identifier: Apache-2.0
"""The command line, one file a command. `main` is its entry point, `run` returns the exit code."""

from ksae.cli.app import main, run

__all__ = ["main", "run"]
