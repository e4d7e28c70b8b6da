# SPDX-License-Identifier: Apache-2.0
"""`ksae config`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show what was built and loaded, and what serves each op."""
    from ksae import info

    shown = info.config()
    print(json.dumps(shown, indent=1) if as_json else shown)
