# SPDX-License-Identifier: Apache-2.0
"""What a machine lacks is said in one sentence, and the reference serves where it can: no compiler,
no native modules, an old torch, an old CPU. (No OpenMP: test_cpp_example.py.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ksae
from ksae.torch_version import OLDEST

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(ksae.__file__).parents[1])}
TRAIN = "import sys, ksae_cli; sys.argv = ['ksae', 'train', '--activations', 'x.npy', '--d-sae', "
TRAIN += "'8', '--k', '2', '--out', 'run']; ksae_cli.main()"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )


def build(tmp_path: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py, which finds no program but Python's own."""
    run = ["-c", f"import os; os.chdir({str(ROOT)!r}); import setuptools, runpy, sys;"]
    run[1] += f" sys.argv = ['setup.py', '-q', {command!r}, '--build-temp', {str(tmp_path)!r}];"
    run[1] += " runpy.run_path('setup.py', run_name='__main__')"
    clean = dict.fromkeys(("CXX", "CMAKE_ARGS", "KSAE_NATIVE"), "")
    return python(*run, PATH=str(tmp_path), KSAE_CUDA="0", **{**clean, **environment})


@pytest.mark.parametrize(
    ("named", "said"),
    [("", "there is no C++ compiler"), ("g++-99 -O2", "CXX names g++-99, which is not there")],
)
def test_no_compiler(tmp_path: Path, named: str, said: str) -> None:
    done = build(tmp_path, "build_ext", CXX=named)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ksae:")]
    assert line.startswith(f"ksae: {said}: install g++ 12 or newer") and "KSAE_NATIVE=0" in line
    assert "Traceback" not in done.stderr and "CMake" not in done.stdout + done.stderr


def test_without_native_modules_nothing_is_compiled(tmp_path: Path) -> None:
    done = build(tmp_path, "build_ext", KSAE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_without_native_modules_the_reference_serves() -> None:
    code = "import sys; sys.modules['ksae._cpu'] = None; import ksae, torch;"  # as if not there
    code += " print(ksae.topk(torch.tensor([1.0, 3.0, 2.0]), 2)); print(ksae.config()['cpu'])"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "tensor([3., 2.])" in done.stdout and "not importable" in done.stdout


@pytest.mark.parametrize(
    ("fields", "why"),
    [("", "it has no fields"), ("m.fields = {'row_update': ('v_max',)}", "is named v_max")],
    ids=["before fields", "other fields"],
)
def test_a_native_module_of_other_sources(fields: str, why: str) -> None:
    """As one that was built in place before a change: said at import, in one sentence."""
    code = f"import sys, types; m = types.ModuleType('ksae._cpu'); {fields}"
    code += "\nm.row_update = m.isa = m.can_screen = lambda *a: None"
    done = python("-c", f"{code}\nsys.modules['ksae._cpu'] = m\nimport ksae")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("ImportError: ksae._cpu was built from other sources than these: ")
    assert why in said and said.endswith("; build or install ksae again")


def test_an_old_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((64, 4), np.float32))
    old = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.4.1+cpu');"
    for code in ("import ksae", TRAIN):
        done = python("-c", f"{old} {code}")
        assert done.returncode == 1
        said = done.stderr.strip().splitlines()[-1]
        assert said.endswith("ksae needs torch 2.11 or newer, got 2.4.1+cpu: pip install -U torch")
        assert code == "import ksae" or len(done.stderr.strip().splitlines()) == 1
    assert f'"torch>={OLDEST}"' in (ROOT / "pyproject.toml").read_text()


def test_an_old_cpu() -> None:
    """The lowest level is always built, and it is plain C++."""
    done = python("-c", "import ksae; print(ksae.config()['cpu'])", KSAE_ISA="plain")
    assert re.search(r"'isa': 'plain'", done.stdout) and "'usable': True" in done.stdout
    done = python("-c", "import ksae", KSAE_ISA="avx1024")
    assert "must be an instruction set of this machine, got 'avx1024'" in done.stderr
