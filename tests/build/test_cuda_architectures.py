# SPDX-License-Identifier: Apache-2.0
"""For which GPUs the CUDA module is compiled: what is asked for, else those of this machine, else
one binary for each generation. The part of CMakeLists.txt that chooses runs by itself, with a
compiler and a driver that only answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = "compute_80\ncompute_86\ncompute_89\ncompute_90\ncompute_100\ncompute_103\ncompute_120"
EACH = "80-real;90-real;100-real;120"
OURS = ("CMAKE_CUDA_ARCHITECTURES", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST")


def program(folder: Path, name: str, said: str, code: int = 0) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n")
    path.chmod(0o755)


def architectures(folder: Path, **environment: str) -> str:
    text = (ROOT / "CMakeLists.txt").read_text()
    start, end = text.index("  if(NOT CMAKE_CUDA_ARCH"), text.index("  enable_language(CUDA)")
    (folder / "choose.cmake").write_text(text[start:end])
    cmake = shutil.which("cmake")
    assert cmake is not None
    clean = {key: value for key, value in os.environ.items() if key not in OURS}
    run = subprocess.run(
        [cmake, "-P", str(folder / "choose.cmake")],
        env={**clean, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.rsplit(" ", 1)[1].strip()


@pytest.mark.parametrize(
    ("gpus", "code", "want"),
    [
        ("9.0", 0, "90"),
        ("9.0\n8.6\n9.0", 0, "86-real;90"),
        ("10.3", 0, "103"),
        ("7.5", 0, EACH),  # older than the kernels
        ("12.1", 0, EACH),  # newer than the compiler
        ("NVIDIA-SMI has failed", 9, EACH),
    ],
)
def test_the_gpus_of_this_machine_or_one_of_each_generation(
    tmp_path: Path, gpus: str, code: int, want: str
) -> None:
    program(tmp_path, "nvcc", KNOWN)
    program(tmp_path, "nvidia-smi", gpus, code)
    assert architectures(tmp_path) == want


def test_a_compiler_is_asked_for_no_more_than_it_knows(tmp_path: Path) -> None:
    program(tmp_path, "nvcc", "compute_80\ncompute_90")
    program(tmp_path, "nvidia-smi", "", 1)
    assert architectures(tmp_path) == "80-real;90"


def test_what_is_asked_for_comes_first(tmp_path: Path) -> None:
    program(tmp_path, "nvcc", KNOWN)
    program(tmp_path, "nvidia-smi", "9.0")
    assert architectures(tmp_path, CUDAARCHS="80;86") == "80;86"
    assert architectures(tmp_path, TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX") == "80-real;90"
    assert architectures(tmp_path, CMAKE_CUDA_ARCHITECTURES="89") == "89"
