# SPDX-License-Identifier: Apache-2.0
"""The guides that are notebooks too, each written from its page: `python docs/notebooks.py`.

Blocks of Python and shell become cells, without outputs, but for those that need more than one
process; all else is text. A test holds each
notebook to its page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

GUIDES = Path(__file__).parent / "guides"
PAGES = [GUIDES / "your_model.md", GUIDES / "own_loop.md"]
_CODE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ELSEWHERE = re.compile(
    r"^<!-- run by .*?-->\n```python\n", re.MULTILINE
)  # a test of its own runs it
_FOR_THE_SITE = re.compile(r"^(<!--.*?-->|\[This page as a notebook\]\(.*\).*)\n+", re.MULTILINE)


def notebook(page: Path) -> str:
    """The text of the notebook of a page."""
    text = _ELSEWHERE.sub("```py\n", page.read_text())
    text = _FOR_THE_SITE.sub("", text)
    cells, at = [], 0
    for block in _CODE.finditer(text):
        cells.append(("markdown", text[at : block.start()]))
        code = (
            block[2] if block[1] == "python" else re.sub(r"^(?=ksae )", "!", block[2], flags=re.M)
        )
        cells.append(("code", code))
        at = block.end()
    cells.append(("markdown", text[at:]))
    content = {
        "cells": [_cell(i, *cell) for i, cell in enumerate(c for c in cells if c[1].strip())],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell | {"source": text.strip().splitlines(keepends=True)}


if __name__ == "__main__":
    for page in PAGES:
        page.with_suffix(".ipynb").write_text(notebook(page))
