# SPDX-License-Identifier: Apache-2.0
"""What a study has found so far: one JSON file that grows by a cell at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def stored(path: Path, settings: dict[str, Any], rows: str = "cells") -> dict[str, Any]:
    """The record so far, {"settings": ..., rows: [...]}; `harness.measure.write_json` writes it.

    Raises:
        SystemExit: it was made with other settings, whose results are not mixed with these.
    """
    if not path.exists():
        return {"settings": settings, rows: []}
    record: dict[str, Any] = json.loads(path.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{path} was made with {record['settings']}; give another --out")
    return record
