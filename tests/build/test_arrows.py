# SPDX-License-Identifier: Apache-2.0
"""Which way imports and includes point: every folder and top module of the package has its place,
arrows go down only, there is no circle, and no pair is exempt."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "ksae"

# From the top down. A file may import its own folder and what stands on a lower line.
ORDER = (
    ("__main__",),
    ("__init__",),
    ("api",),
    ("cli",),
    ("bench",),
    ("runs",),
    ("analysis",),
    ("activations", "interop", "dlpack"),
    ("step",),
    ("parallel",),
    ("coders",),
    ("functional", "info"),
    ("ops",),
    ("backends",),
    ("reference",),
    ("kernels", "_cpu", "_cuda"),
    ("files",),
    ("torch_version",),
    ("errors", "version", "env"),
)
RANK = {name: -line for line, names in enumerate(ORDER) for name in names}
# Only these choose a kernel or say which one serves.
KNOW_BACKENDS = {"ops", "info", "backends"}


def sources() -> dict[str, Path]:
    """Every module of the package: its name without `ksae.`, and where its text is."""
    found = {}
    for folder, name in ((PACKAGE, ""), (ROOT / "kernels", "kernels"), (ROOT / "bench", "bench")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = (name, *parts) if name else parts
            if name or parts[0] not in ("kernels", "bench"):  # as the build may have put them there
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found | {"_cpu": PACKAGE / "_cpu.pyi", "_cuda": PACKAGE / "_cuda.pyi"}


MODULES = sources()


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports anywhere in a file, also inside of functions, but not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from statements(ast.Module(child.orelse, []))
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from statements(child)


def imported(text: str, package: list[str]) -> set[str]:
    """Full names of the modules that a file of `package` imports."""
    names = set()
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        base = base + (node.module.split(".") if node.module else [])
        for alias in node.names:
            full = ".".join([*base, alias.name])
            known = full.removeprefix("ksae.") in MODULES
            names.add(full if base[:1] == ["ksae"] and known else ".".join(base))
    return names


def package_of(module: str) -> list[str]:
    parts = ["ksae", *module.split(".")] if module else ["ksae"]
    return parts if MODULES[module].name == "__init__.py" else parts[:-1]


def arrows() -> set[tuple[str, str]]:
    """Each import of one module of the package by another."""
    found = set()
    for module, path in MODULES.items():
        for name in imported(path.read_text(), package_of(module)):
            if name == "ksae" or name.startswith("ksae."):
                found.add((module, name.removeprefix("ksae").removeprefix(".")))
    return {(module, target) for module, target in found if module != target}


def place(module: str) -> str:
    return module.split(".")[0] or "__init__"


def test_every_folder_and_top_module_has_a_place() -> None:
    assert {place(module) for module in MODULES} == RANK.keys()
    assert all(target in MODULES for _, target in arrows())


def test_arrows_go_down() -> None:
    up = {
        (module, target)
        for module, target in arrows()
        if place(module) != place(target) and RANK[place(target)] >= RANK[place(module)]
    }
    up |= {
        (module, target)
        for module, target in arrows()
        if place(target) == "backends" and place(module) not in KNOW_BACKENDS | {"bench"}
    }
    assert up == set()


def circles(edges: set[tuple[str, str]]) -> set[frozenset[str]]:
    """Groups of modules of which each reaches every other."""
    reached: dict[str, set[str]] = {}
    after: dict[str, set[str]] = {}
    for module, target in edges:
        after.setdefault(module, set()).add(target)
    for start in after:
        seen, todo = set(), [start]
        while todo:
            for target in after.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        reached[start] = seen
    return {
        frozenset(m for m in seen if start in reached.get(m, set()))
        for start, seen in reached.items()
        if start in seen
    }


def test_there_is_no_circle() -> None:
    assert circles(arrows()) == set()


def test_a_circle_and_an_import_inside_of_a_function_are_seen() -> None:
    edges = {("a", "b"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "e"), ("e", "d")}
    assert circles(edges) == {frozenset("bc"), frozenset("de")}
    text = "def f():\n    from ..step.train_step import TrainStep\n"
    assert imported(text, ["ksae", "coders"]) == {"ksae.step.train_step"}
    text = "if TYPE_CHECKING:\n    from ksae import step\nelse:\n    import ksae.ops"
    assert imported(text, ["ksae"]) == {"ksae.ops"}


def test_triton_kernels_import_torch_and_triton_only() -> None:
    for module in (m for m in MODULES if place(m) == "kernels"):
        names = imported(MODULES[module].read_text(), package_of(module))
        roots = {name.split(".")[0] for name in names}
        assert roots - set(sys.stdlib_module_names) <= {"torch", "triton", "ksae"}, module
        assert all(n.startswith("ksae.kernels") for n in names if n.startswith("ksae")), module


# ----------------------------------------------------------------------------------------- includes


def includes(folder: str) -> set[tuple[str, str]]:
    pattern = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)
    files = [
        p for p in (ROOT / "csrc" / folder).rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    ]
    assert files
    return {(p.name, name) for p in files for name in pattern.findall(p.read_text())}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("", r"torch/|ATen|c10/"),
        ("include", r"pybind11|Python\.h|isa/"),
        ("cpu", r"pybind11|Python\.h|cuda"),
        ("cuda", r"pybind11|Python\.h|cpu"),
        ("bindings", r"isa/|\.\./|Python\.h"),
    ],
)
def test_includes_point_down(folder: str, forbidden: str) -> None:
    assert not {pair for pair in includes(folder) if re.search(forbidden, pair[1])}


def test_instruction_set_sources_include_nothing_that_could_leak() -> None:
    """The linker may keep an inline library function's AVX-512 copy for every CPU."""
    plain = {"cstddef", "cstdint", "cstring", "cmath", "cfloat", "limits", "immintrin.h"}
    own = {p.name for p in (ROOT / "csrc").rglob("*.h")}
    assert not {
        pair
        for pair in includes("cpu/isa")
        if pair[1] not in plain and Path(pair[1]).name not in own
    }
