# SPDX-License-Identifier: Apache-2.0
"""The C++ side alone: the example against the public header, and a compiler without OpenMP."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cpp"


@pytest.mark.nightly
def test_the_example_builds_and_runs(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", str(EXAMPLE), "-B", str(tmp_path)],
        ["cmake", "--build", str(tmp_path), "-j1"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([tmp_path / "example"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference from float64" in done.stdout
    source = (EXAMPLE / "main.cpp").read_text()
    assert [line for line in source.splitlines() if "ksae/" in line and "#include" in line] == [
        "#include <ksae/cpu.h>"
    ]


def test_without_openmp_the_build_says_what_to_do(tmp_path: Path) -> None:
    def configure(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(tmp_path), "-DKSAE_PYTHON=OFF"]
        return subprocess.run(
            [*command, "-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON", *options],
            capture_output=True,
            text=True,
            timeout=300,
        )

    refused, allowed = configure(), configure("-DKSAE_OPENMP=OFF")
    assert refused.returncode != 0 and "CMAKE_ARGS=-DKSAE_OPENMP=OFF" in refused.stderr
    assert allowed.returncode == 0 and "one thread" in allowed.stderr
