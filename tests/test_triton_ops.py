# SPDX-License-Identifier: Apache-2.0
"""The portable Triton kernels without a GPU: interpreted against the reference, compiled for five
generations, and their errors. The first two run in processes of their own, because Triton reads
TRITON_INTERPRET once, at its import."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import test_contracts
import torch
from cases import NAMES

from ksae import checks, cuda, native, ops, reference
from ksae.triton import Kernels

TESTS = Path(__file__).parent
CASES = TESTS / "triton_ops_cases.py"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )


# -------------------------------------------------------------------------------------- interpreted


def cases() -> list[str]:
    """Names of the tests that the file defines or imports."""
    names = []
    for node in ast.parse(CASES.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names += [a.asname or a.name for a in node.names]
        elif isinstance(node, ast.FunctionDef):
            names.append(node.name)
    return [name for name in names if name.startswith("test_")]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of each test of the file the failures; one process runs them all."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    done = python("-m", "pytest", str(CASES), *options, TRITON_INTERPRET="1")
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, list[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        failures = found.setdefault(case.get("name", "").split("[")[0], [])
        failures += [f"{case.get('name')}: {(bad.text or '')[-2000:]}" for bad in case]
    return found


@pytest.mark.parametrize("name", cases(), ids=lambda name: f"triton-interpreted-{name[5:]}")
def test_equals_the_reference(interpreted: dict[str, list[str]], name: str) -> None:
    assert interpreted[name] == []


# --------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("name", NAMES)
def test_kernels_have_the_arguments_of_the_reference(name: str) -> None:
    own = list(inspect.signature(getattr(Kernels, name)).parameters)[1:]
    assert own == list(inspect.signature(getattr(reference, name)).parameters)


# ------------------------------------------------------------------------------------------- errors

(BAD,) = (m.args for m in test_contracts.test_bad_arguments.pytestmark if m.name == "parametrize")
IMPLEMENTATIONS = {
    "reference": reference,
    "cpu": native,
    "cuda": cuda.Kernels(types.ModuleType("no kernel is reached")),
    "triton": Kernels(),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("call", "error", "message"), BAD[1], ids=lambda p: f"{p[0]}-{p[1]}")
def test_bad_arguments(
    implementation: str, call: tuple[str, int, Any], error: type[Exception], message: str
) -> None:
    """One message, whichever implementation would have served the call."""
    name, position, value = call
    function = getattr(IMPLEMENTATIONS[implementation], name, getattr(reference, name))
    kernel = ops._kernel(name, getattr(checks, name), function, native_=True)
    args = list(test_contracts.arguments(name, torch.float32))
    args[position] = value(args[position]) if callable(value) else value
    with pytest.raises(error, match=re.escape(message)):
        kernel(*args)
