# SPDX-License-Identifier: Apache-2.0
"""Mistakes put into the real select kernel: the comparison with the reference, in emulation, sees
each. A mutant runs in a process of its own, because it may read anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = """
import json, sys
sys.path.insert(0, sys.argv[2])
import torch
from cases import scores
from emulation import build
from ksae import reference
from ksae.cuda import Kernels

emulator = build.cuda(edit=json.loads(sys.argv[1]))
impl = Kernels(emulator.module)
for seed in range(4):
    emulator.seed(seed)
    for kind in ("random", "ties", "nan", "descending", "all equal"):
        x = scores(kind, 2, 9001, torch.float32)
        for k in (5, 700):
            try:
                got, want = impl.topk(x, k), reference.topk(x, k)
            except RuntimeError as error:
                sys.exit(f"rejected: {error}")
            if not torch.equal(got[1], want[1]):
                sys.exit(f"wrong: {kind}, k={k}, seed {seed}")
print("right")
"""

MUTANTS = {
    "missing barrier": (
        "    histogram[threadIdx.x] = 0;\n    __syncthreads();\n",
        "    histogram[threadIdx.x] = 0;\n",
    ),
    "off by one": ("if (maxima[g] >= bound)", "if (maxima[g] > bound)"),
    "dropped overflow": ("state[3] = static_cast<uint32_t>(p.k);", "state[3] = 0;"),
    "capacity ignored": ("if (count + kRound > plan.capacity &&", "if (false &&"),
    "NaN by its sign": ("  if (s != s) return 0xffffffffu;\n", ""),
    "wrong mask": ("__shfl_xor_sync(0xffffffffu, m, o)", "__shfl_xor_sync(0x0000ffffu, m, o)"),
    "barrier in a branch": (
        "  const uint32_t bound = kth_largest(",
        "  if (threadIdx.x < 100) __syncthreads();\n  const uint32_t bound = kth_largest(",
    ),
}


def compare(edit: dict[str, tuple[str, str]]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMPARE, json.dumps(edit), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_kernel_itself_is_right():
    done = compare({})
    assert done.returncode == 0 and done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    done = compare({"select.cu": MUTANTS[name]})
    died = done.returncode < 0 or "AddressSanitizer" in done.stderr
    assert died or done.stderr.startswith(("wrong: ", "rejected: ")), done.stdout + done.stderr
