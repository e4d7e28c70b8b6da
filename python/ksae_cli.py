# SPDX-License-Identifier: Apache-2.0
"""The console script. `ksae` sees that this module is loaded and leaves torch to the commands that
need it, so that `ksae --help` answers at once; see `ksae/__init__.py`."""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the `ksae` command."""
    from ksae import cli

    cli.main()
