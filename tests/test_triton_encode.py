# SPDX-License-Identifier: Apache-2.0
"""The Triton encode without a GPU: interpreted against the reference, and compiled only.

Both run in processes of their own, because Triton reads TRITON_INTERPRET once, at its import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASES = (
    "random", "no row", "one row", "k is F", "overflow", "shortfall", "all equal", "infinite",
    "one NaN latent", "winners in one tile", "centred", "masked", "half",
)  # fmt: skip


def run(script: str, *arguments: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"triton-interpreted-{case}")
def test_equals_the_reference_bit_for_bit(case):
    assert run("triton_encode_cases.py", case, TRITON_INTERPRET="1").strip() == "equal"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_gate_compiles_without_spills(capability, dtype):
    report = json.loads(run("triton_compile.py", str(capability), dtype))
    assert report["stack"] == 0
    assert not {"LDL", "STL"} & set(report["instructions"])
    assert report["registers"] <= 255
    assert report["shared"] <= 99 * 1024  # what a block may have on sm_89 and sm_120
    if dtype == "bf16":
        product = {90: "HGMMA", 100: "UTCHMMA"}.get(capability, "HMMA")
        assert product in report["instructions"]
