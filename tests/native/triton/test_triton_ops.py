# SPDX-License-Identifier: Apache-2.0
"""The portable Triton kernels without a GPU: interpreted against the reference, in a process of its
own, because Triton reads TRITON_INTERPRET once, at its import; errors; who serves what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from cases import NAMES
from implementations import NOT_ON_GPUS, takes_arguments_of

from ksae import reference
from ksae.backends import cpu as native
from ksae.backends import cuda
from ksae.backends import serving as gpu
from ksae.backends.triton import Kernels
from ksae.ops.specs import BY_NAME

ROOT = Path(__file__).parents[3]
# The files of which Triton's interpreter runs what they mark, and at least so many tests of each.
TESTS = {
    "ops/test_ops.py": 39,
    "ops/test_latents.py": 17,
    "ops/test_small_ops.py": 145,
    "ops/test_bf16_copy.py": 13,
    "ops/test_row_offsets.py": 63,
    "ops/test_screened_encode.py": 43,
    "native/triton/triton_ops_cases.py": 77,
    "native/triton/triton_step_cases.py": 4,
}


class FusedFirst(Kernels):
    """Encodes without the scores."""

    topk_encode = Kernels.fused_topk_encode
    grad_topk_encode = Kernels.fused_grad_topk_encode
    topk_encode_aux = Kernels.fused_topk_encode_aux


IMPLEMENTATIONS = {
    "reference": reference,
    "cpu": native,
    "cuda": cuda.Kernels(types.ModuleType("no kernel is reached")),
    "triton": Kernels(),
    "triton, fused": FusedFirst(),
}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


# -------------------------------------------------------------------------------------- interpreted


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """{file: {test: its failure, or nothing}}; one process runs them all."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1")
    files = (str(ROOT / "tests" / name) for name in TESTS)
    done = python("-m", "pytest", *files, *options, TRITON_INTERPRET="1")
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, dict[str, str]] = {name: {} for name in TESTS}
    for case in ET.parse(report).iter("testcase"):
        (name,) = [n for n in TESTS if case.get("file", "").endswith(n)]
        found[name][case.get("name", "")] = "".join((bad.text or "")[-2000:] for bad in case)
    return found


@pytest.mark.parametrize("name", TESTS)
def test_equals_the_reference(interpreted: dict[str, dict[str, str]], name: str) -> None:
    assert len(interpreted[name]) >= TESTS[name]
    assert {test: why for test, why in interpreted[name].items() if why} == {}


# --------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("name", sorted({*NAMES} - NOT_ON_GPUS))
def test_kernels_have_the_arguments_of_the_reference(name: str) -> None:
    takes_arguments_of(getattr(Kernels, name), name)


# ---------------------------------------------------------------------------------- who serves what


@pytest.mark.parametrize("name", sorted(NOT_ON_GPUS))
def test_the_reference_serves_an_op_without_a_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(gpu.triton, "kernels", Kernels())
    monkeypatch.setattr(gpu.cuda, "kernels", cuda.Kernels(types.ModuleType("_cuda")))
    assert gpu.kernel(BY_NAME[name]) is None


def config(**environment: str) -> subprocess.CompletedProcess[str]:
    return python("-c", "import json, ksae; print(json.dumps(ksae.config()))", **environment)


def test_switches_show_in_the_configuration() -> None:
    on = json.loads(config(KSAE_ENCODE="fused", KSAE_TRITON="0").stdout)
    assert on["gpu"]["encode"] == "fused, by KSAE_ENCODE"
    assert on["gpu"]["triton"] == "left out by KSAE_TRITON=0"
    assert on["switches"]["KSAE_ENCODE"] == "fused" and on["switches"]["KSAE_TRITON"] == "0"
    plain = gpu.state()
    assert (
        plain["encode float32 on 9.0, d=768, F=24576"] == "screened (no measurement yet: by count)"
    )
    assert plain["encode 16 bit on 9.0, d=768, F=24576"] == "product (no measurement yet: by count)"
    bad = config(KSAE_ENCODE="best")
    assert bad.returncode != 0
    assert (
        "KSAE_ENCODE must be product, screened or fused, got 'best'" in bad.stderr.splitlines()[-1]
    )
