# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, and learn; what is pinned twice is pinned alike."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ksae

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_runs_and_its_fvu_falls(script: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(ksae.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    fvu = [float(value) for value in re.findall(r"FVU (\d\.\d+)", run.stdout)]
    assert len(fvu) >= 2 and fvu[-1] < fvu[0] / 2, run.stdout


def test_pre_commit_pins_the_linters_of_the_extra_dev():
    metadata = (ROOT / "pyproject.toml").read_text()
    pinned = re.search(r"^dev = \[(.*)\]$", metadata, re.MULTILINE)
    assert pinned is not None
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "clang-format"):
        wanted = re.search(rf'"({tool}==[\d.]+)"', pinned[1])
        assert wanted is not None
        assert set(re.findall(rf'"({tool}==[\d.]+)"', hooks)) == {wanted[1]}


def test_wheels_are_built_for_every_supported_python():
    metadata = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', metadata)
    built = [int(minor) for minor in re.findall(r"cp3(\d+)-\*", metadata)]
    assert oldest is not None and built[0] == int(oldest[1])
    assert built == list(range(built[0], built[-1] + 1))
    named = {int(n) for n in re.findall(r"Python :: 3\.(\d+)\"", metadata)}
    assert named <= set(built)
