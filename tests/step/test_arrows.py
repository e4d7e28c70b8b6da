# SPDX-License-Identifier: Apache-2.0
"""What the step and the coders may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ksae

PACKAGE = Path(ksae.__file__).parent
ABOVE = {"activations", "analysis", "interop", "runs", "cli", "bench", "backends"}
FORBIDDEN = {"step": ABOVE | {"files"}, "coders": ABOVE | {"step", "parallel"}}
FILES = [(name, path) for name in FORBIDDEN for path in sorted((PACKAGE / name).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Folders of the package that a file imports from, also inside of functions."""
    found = set()
    inside = list(path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1]
            base += node.module.split(".") if node.module else []
            found |= {(base or [alias.name])[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ksae."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize(
    ("name", "path"), FILES, ids=[str(p.relative_to(PACKAGE)) for _, p in FILES]
)
def test_imports_only_what_lies_below(name: str, path: Path) -> None:
    assert not imported(path) & FORBIDDEN[name]


@pytest.mark.parametrize("path", [p for name, p in FILES if name == "step"], ids=lambda p: p.stem)
def test_functions_are_read_in_one_look(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"
