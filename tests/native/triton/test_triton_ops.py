# SPDX-License-Identifier: Apache-2.0
"""The portable Triton kernels without a GPU: interpreted against the reference, in a process of its
own, because Triton reads TRITON_INTERPRET once, at its import; errors; who serves what."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
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
    "native/triton/triton_ops_cases.py": 73,
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


def row(way: str) -> gpu.Row:
    return gpu.Row("9.0", 768, 24576, way, "a test")


def test_the_nearest_row_of_the_generation_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    far = gpu.Row("9.0", 4096, 131072, "product", "a test")
    monkeypatch.setattr(gpu, "TABLE", (row("fused"), far, gpu.Row("8.0", 1, 1, "fused", "")))
    gpu.row.cache_clear()
    assert gpu.row("9.0", 1024, 24576) == row("fused") and gpu.row("9.0", 2048, 100_000) == far
    assert gpu.row("hip", 768, 24576) is None and gpu.row("9.0", 0, 1) is not None
    gpu.row.cache_clear()


def test_the_table_claims_no_measurement_that_it_lacks() -> None:
    for r in gpu.TABLE:
        assert r.way in gpu.WAYS
        assert (r.measured == gpu.UNMEASURED and r.way == "product") or " ms" in r.measured


@pytest.mark.parametrize(
    ("native_", "portable", "ways", "served"),
    [
        (True, True, ["product"], ("native", "native", "native")),
        (True, True, ["fused"], ("native", "triton", "triton")),
        (True, True, ["product", "fused"], ("native", *["native or triton"] * 2)),
        (False, True, ["product"], ("triton", "triton", "triton")),
        (True, False, ["fused"], ("native", "native", "native")),
        (False, False, ["product"], (None, None, None)),
    ],
)
def test_precedence(
    monkeypatch: pytest.MonkeyPatch,
    native_: bool,
    portable: bool,
    ways: list[str],
    served: tuple[str | None, ...],
) -> None:
    monkeypatch.setattr(gpu.cuda, "kernels", IMPLEMENTATIONS["cuda"] if native_ else None)
    monkeypatch.setattr(gpu.triton, "kernels", Kernels() if portable else None)
    monkeypatch.setattr(gpu, "TABLE", tuple(map(row, ways)))
    ops = ("sparse_decode", "topk_encode", "grad_topk_encode")
    found = [gpu.kernel(BY_NAME[name]) for name in ops]
    assert tuple(f and f[1] for f in found) == served


def answering(method: Any, name: str) -> Any:
    """A method with the arguments of `method` that returns its name."""

    @functools.wraps(method)
    def answer(self: Any, **args: Any) -> str:
        inspect.signature(method).bind(self, **args)  # knows them all
        return name

    return answer


@pytest.mark.parametrize("way", gpu.WAYS)
def test_a_call_takes_the_way_that_was_chosen(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(gpu, "override", way)
    monkeypatch.setattr(gpu.triton, "kernels", Kernels())
    monkeypatch.setattr(gpu.cuda, "kernels", None)
    x, W, b = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5)
    calls = {"topk_encode": (x, W, b, 1), "grad_topk_encode": (x, x, W, b, W, 1, 0.5),
             "topk_encode_aux": (x, W, b, 1, 2, b > 0)}  # fmt: skip
    for op, args in calls.items():
        for name in (f"fused_{op}", op):
            monkeypatch.setattr(Kernels, name, answering(getattr(Kernels, name), name))
        encode, server = gpu.kernel(BY_NAME[op]) or (None, None)
        got = encode(**BY_NAME[op].bind(args))
        assert server == "triton" and got == ("fused_" if way == "fused" else "") + op


def test_a_step_with_auxk_is_chosen_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, it takes a second product."""
    monkeypatch.setattr(gpu, "TABLE", (row("fused"), row("product")._replace(F=99, aux="fused")))
    monkeypatch.setattr(gpu, "generation", lambda device: "9.0")
    gpu.row.cache_clear()
    for F, ways in ((24576, ("fused", "product")), (99, ("product", "fused"))):
        W = torch.empty(F, 768, device="meta")
        assert (gpu.way(W), gpu.way(W, aux=True)) == ways
    gpu.row.cache_clear()


def config(**environment: str) -> subprocess.CompletedProcess[str]:
    return python("-c", "import json, ksae; print(json.dumps(ksae.config()))", **environment)


def test_switches_show_in_the_configuration() -> None:
    on = json.loads(config(KSAE_ENCODE="fused", KSAE_TRITON="0").stdout)
    assert on["gpu"]["encode"] == "fused, by KSAE_ENCODE"
    assert on["gpu"]["triton"] == "left out by KSAE_TRITON=0"
    assert on["switches"]["KSAE_ENCODE"] == "fused" and on["switches"]["KSAE_TRITON"] == "0"
    plain = gpu.state()
    assert plain["encode on 9.0, d=768, F=24576"] == "product (no measurement yet: product path)"
    bad = config(KSAE_ENCODE="best")
    assert bad.returncode != 0
    assert "KSAE_ENCODE must be fused or product, got 'best'" in bad.stderr.splitlines()[-1]
