# SPDX-License-Identifier: Apache-2.0
"""Mistakes put into the real kernels: in emulation, the comparison with the reference sees each, or
the emulator names kernel, block and thread.

All mistakes of a file are compiled together, for float32, and switched on one at a time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from emulation import build
from emulation.mistakes import MUTANTS

pytestmark = pytest.mark.nightly

KERNELS = build.ROOT / "csrc" / "cuda"
FILES = sorted({m.file for m in MUTANTS.values()})
CHECKED = sorted({name.partition(":")[0] for name in MUTANTS})  # by mutants.py
NAMESPACE = "namespace ksae::cuda {\n"
SWITCH = """extern "C" {
inline __attribute__((visibility("default"))) int ksae_mutant = 0;
}
"""
FLOAT_ALONE = """template <class Run>
cudaError_t with_float(Dtype, Run run) {
  return run(static_cast<float*>(nullptr));
}
"""


def mutated(file: str) -> str:
    """The file with all of its mutants, each asleep until ksae_mutant is its number."""
    text = (KERNELS / file).read_text().replace("with_type(", "with_float(")
    for number, mutant in enumerate(MUTANTS.values(), 1):
        if mutant.file == file:
            count = text.count(mutant.old)
            assert count == 1, f"{file} must contain {mutant.old!r} once, got {count}"
            text = text.replace(
                mutant.old, mutant.new.replace("WRONG", f"(ksae_mutant == {number})")
            )
    return text


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    segments, many = mutated("segments.h"), "kMostUnits = 4096;"
    assert many in segments
    few = segments.replace(many, "kMostUnits = 3;")  # so that units have more than 256 entries
    common = (KERNELS / "common.h").read_text()
    common = common.replace(NAMESPACE, SWITCH + NAMESPACE + FLOAT_ALONE, 1)
    texts = {file: mutated(file) for file in FILES}
    emulator = build.cuda(texts | {"segments.h": few, "common.h": common})
    names = [*CHECKED, *MUTANTS]
    jobs = [(0, op) for op in CHECKED]
    jobs += [(number, name.partition(":")[0]) for number, name in enumerate(MUTANTS, 1)]
    done = subprocess.run(
        [sys.executable, str(build.HERE / "mutants.py"), str(emulator.path)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(names, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("kernels", CHECKED)
def test_the_kernels_themselves_are_right(outcomes, kernels):
    assert outcomes[kernels] == "right"


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(outcomes, name):
    seen = r"^(wrong|rejected): |emulation of |AddressSanitizer|runtime error: "
    assert re.search(seen, outcomes[name]), outcomes[name]
