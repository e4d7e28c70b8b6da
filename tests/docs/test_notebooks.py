# SPDX-License-Identifier: Apache-2.0
"""The notebooks are their pages, hold no outputs, and run from the first cell to the last."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from commands import run_command

DOCS = Path(__file__).parents[2] / "docs"


def _notebooks() -> Any:
    """docs/notebooks.py, which is no package."""
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = _notebooks()
each = pytest.mark.parametrize("page", notebooks.PAGES, ids=lambda p: p.stem)


def cells(page: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(page.with_suffix(".ipynb").read_text())["cells"]
    return found


@each
def test_a_notebook_is_its_page(page: Path):
    again = "run python docs/notebooks.py"
    assert page.with_suffix(".ipynb").read_text() == notebooks.notebook(page), again
    shown = "\n".join("".join(cell["source"]) for cell in cells(page))
    for line in page.read_text().splitlines():
        if line.strip() and not line.startswith(("```", "<!--", "[This page as a notebook]")):
            assert line in shown
    assert all(not cell.get("outputs") for cell in cells(page))


def test_every_notebook_has_a_page_that_links_to_it():
    assert {p.with_suffix(".ipynb") for p in notebooks.PAGES} == set(DOCS.rglob("*.ipynb"))
    for page in notebooks.PAGES:
        assert f"({page.stem}.ipynb)" in page.read_text()


@pytest.mark.nightly
@each
def test_the_cells_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    code = ["".join(cell["source"]) for cell in cells(page) if cell["cell_type"] == "code"]
    assert len(code) >= 3
    for source in code:
        if source.startswith("!"):
            for line in source.splitlines():
                run_command(line.removeprefix("!"))
        else:
            exec(compile(source, str(page), "exec"), scope)
