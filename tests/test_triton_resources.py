# SPDX-License-Identifier: Apache-2.0
"""What the portable Triton kernels cost on five generations of GPUs: compiled at the sizes of shape
A, without a GPU, in processes of their own, because Triton reads TRITON_INTERPRET at its import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "triton_compile_ops.py"


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_compiles_without_spills(capability: int) -> None:
    """Nothing in local memory, no atomic; registers and shared memory bounded."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kernel, cost in json.loads(done.stdout).items():
        assert cost["stack"] == 0 and cost["instructions"] == [], (kernel, cost)
        assert cost["registers"] <= 168, (kernel, cost)
        assert cost["shared"] <= 48 * 1024, (kernel, cost)
