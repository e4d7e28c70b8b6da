# SPDX-License-Identifier: Apache-2.0
"""What was built, and what the switches do."""

import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import ksae
from ksae import _cpu

ROOT = Path(__file__).parents[2]
OPS = {
    "topk",
    "topk_encode",
    "grad_topk_encode",
    "topk_encode_aux",
    "scored_encode",
    "threshold_encode",
    "batch_topk_encode",
    "sparse_decode",
    "sparse_decode_backward_values",
    "sparse_decode_backward_weight",
    "group_by_latent",
    "sparse_residual",
    "sparse_residual_slice",
    "prefix_residual",
    "prefix_residual_slice",
    "latent_sums",
    "row_grad_sq",
    "row_update",
    "total_variance",
    "loss_terms",
    "adam_scalars",
    "count_tokens",
    "vector_update",
}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, outside of the checkout and without this run's switches."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KSAE_", "OMP_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=300,
    )


@functools.cache
def config_with(**environment: str) -> dict:
    run = run_python("import json, ksae; print(json.dumps(ksae.config()))", **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# --- native modules -------------------------------------------------------------------------------


def levels_of_this_cpu() -> list[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["plain"]
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    levels, needed = ["plain"], set()
    for level, adds in {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512bf16": {"avx512_bf16"},
    }.items():
        needed |= adds
        if needed <= flags:
            levels.append(level)
    return levels


def test_isas_are_what_the_cpu_has():
    assert list(_cpu.isas()) == levels_of_this_cpu()


def test_openmp_is_built_in_and_uses_every_core():
    cpu = config_with()["cpu"]
    assert cpu["openmp_threads"] == len(os.sched_getaffinity(0))
    assert cpu["reason"] is None


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_on_the_threads_that_torch_would_use(threads):
    # Threads of a process are counted by the kernel; the first parallel region starts them.
    run = run_python(
        "import os, torch, ksae\n"
        f"torch.set_num_threads({threads})\n"
        "x = torch.rand(1024, 4096)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count(); ksae.topk(x, 8); print(count() - before)"
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == threads - 1


@pytest.mark.parametrize("level", levels_of_this_cpu())
def test_switch_forces_an_instruction_set(level):
    config = config_with(KSAE_ISA=level)
    assert config["cpu"]["isa"] == level
    assert config["switches"]["KSAE_ISA"] == level


def test_best_instruction_set_is_the_default():
    assert config_with()["cpu"]["isa"] == levels_of_this_cpu()[-1]


def test_unknown_instruction_set_is_refused():
    run = run_python("import ksae", KSAE_ISA="sse9")
    assert run.returncode != 0
    assert "must be an instruction set of this machine, got 'sse9'" in run.stderr.splitlines()[-1]


def test_screening_can_be_switched_off():
    assert config_with(KSAE_SCREEN="off")["cpu"]["screening"] is False


def test_native_code_can_be_switched_off():
    config = config_with(KSAE_NATIVE="0", KSAE_TRITON="0")
    for module in ("cpu", "cuda"):
        assert not config[module]["usable"]
        assert "KSAE_NATIVE=0" in config[module]["reason"]
    assert all(by_device == {"default": "reference"} for by_device in config["ops"].values())
    run = run_python(
        "import sys, torch, ksae\n"
        "values, indices = ksae.topk(torch.tensor([[1.0, 3.0, 2.0]]), 2)\n"
        "print(indices.tolist(), 'ksae._cpu' in sys.modules)",
        KSAE_NATIVE="0",
    )
    assert run.stdout.strip() == "[[1, 2]] False", run.stderr


def test_cuda_module_imports_without_a_gpu_and_says_why_it_is_unusable():
    cuda = config_with()["cuda"]
    assert cuda["built"] == (importlib.util.find_spec("ksae._cuda") is not None)
    assert cuda["usable"] == (cuda["devices"] > 0)
    if not cuda["built"]:
        assert "not built" in cuda["reason"]
        return
    from ksae import _cuda

    assert _cuda.runtime_version() >= 12000
    assert _cuda.architectures.split() == cuda["architectures"] != []
    if not cuda["usable"]:
        assert re.search(r"device_count: CUDA error \d+ \(.+\)|no CUDA d", cuda["reason"])


# --- the package ----------------------------------------------------------------------------------


def test_config_names_every_op_and_prints():
    config = ksae.config()
    assert set(config["ops"]) == OPS
    printed = str(config)
    assert all(re.search(rf"^  {op} ", printed, re.M) for op in OPS)
    assert max(map(len, printed.splitlines())) < 160


def test_version_is_that_of_the_metadata():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert ksae.__version__ == metadata.version("ksae") == ksae.config()["version"] == declared


def test_import_loads_no_extra():
    run = run_python("import sys, ksae; print(*sys.modules)")
    assert run.returncode == 0, run.stderr
    assert not {"transformers", "matplotlib", "typer", "triton", "ksae.kernels"} & set(
        run.stdout.split()
    )


def test_triton_package_does_nothing_at_import():
    run = run_python(
        "import sys, ksae.kernels as m; print('triton' in sys.modules, hasattr(m, '__version__'))"
    )
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_backward_through_an_op_without_formula_is_an_error():
    """torch only warns of it; the test configuration makes every such warning fail."""
    with torch.library._scoped_library("ksae_test_build", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CPU")
        y = torch.ops.ksae_test_build.double(torch.ones(3, requires_grad=True))
        with pytest.raises(UserWarning, match="autograd kernel was not registered"):
            y.sum().backward()
