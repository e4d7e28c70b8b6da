# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources as host C++ and loads them as a Python module.

    emulator = build.cuda()                  # ksae._cuda, from csrc/cuda and csrc/bindings/cuda.cpp
    emulator = build.kernels()               # the emulator's own test kernels
    emulator.module                          # the pybind11 module; its pointers are host memory
    emulator.seed(7)                         # the order in which threads and blocks run
    emulator.blocks_in_flight(1)             # at most so many blocks alive at once (3)
    emulator.step_limit(10**6)               # turns and atomics of one launch

`cuda` takes `edit={"select.cu": (old, new)}`: the same module with one text replaced in a copy of a
source, which must occur exactly once. KSAE_SANITIZE=address,undefined in the environment builds for
a process that has the sanitizers' libraries preloaded. A kernel that the emulator rejects raises
RuntimeError out of the call.

Modules are kept in the temporary folder under a hash of all that went into them. In tests use the
fixtures `emulated` (ksae._cuda) and `emulated_kernels` of conftest.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DKSAE_EMULATE"),
    '-DKSAE_CUDA_ARCHITECTURES="emulated"',
)
EMULATOR = (HERE / "scheduler.cpp", HERE / "fiber.cpp")


class Emulator:
    """A loaded module and the switches of its scheduler."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        spec = importlib.util.spec_from_file_location(f"emulated_{path.parent.name}.{name}", path)
        assert spec is not None and spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))

    def seed(self, value: int) -> None:
        self._library.ksae_emulation_seed(ctypes.c_uint64(value))

    def blocks_in_flight(self, count: int) -> None:
        self._library.ksae_emulation_blocks_in_flight(ctypes.c_uint(count))

    def step_limit(self, steps: int) -> None:
        self._library.ksae_emulation_step_limit(ctypes.c_uint64(steps))


def cuda(edit: Mapping[str, tuple[str, str]] | None = None) -> Emulator:
    csrc = ROOT / "csrc"
    sources = [*sorted((csrc / "cuda").glob("*.cu")), csrc / "bindings" / "cuda.cpp"]
    return Emulator(_build("_cuda", sources, edit or {}), "_cuda")


def kernels() -> Emulator:
    sources = [HERE / "kernels.cu", HERE / "kernels_module.cpp"]
    return Emulator(_build("kernels", sources, {}), "kernels")


def _build(name: str, sources: Sequence[Path], edit: Mapping[str, tuple[str, str]]) -> Path:
    headers = [*(ROOT / "csrc" / "include").rglob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    headers += HERE.glob("*.h")
    texts = {path: path.read_text() for path in sorted({*sources, *EMULATOR, *headers})}
    for file, (old, new) in edit.items():
        (path,) = [p for p in texts if p.name == file]
        count = texts[path].count(old)
        assert count == 1, f"{file} must contain {old!r} once, got {count}"
        texts[path] = texts[path].replace(old, new)
    flags = [*FLAGS, f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    link = ["-shared"]
    if sanitize := os.environ.get("KSAE_SANITIZE"):
        # vptr checks need type information that pybind11's hidden types do not share.
        options = [f"-fsanitize={sanitize}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += [*options, "-fno-omit-frame-pointer"]
        link += options
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    key = hashlib.sha256(repr((flags, version.stdout, pybind11.__version__)).encode())
    for path, text in texts.items():
        key.update(f"{path.relative_to(ROOT)}\0{text}\0".encode())
    cache = Path(tempfile.gettempdir()) / f"ksae-emulation-{os.getuid()}"
    folder = cache / key.hexdigest()[:16]
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    cache.mkdir(mode=0o700, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    try:
        for path, text in texts.items():  # a copy: edits, and one folder for all includes
            copy = scratch / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        emulation = scratch / HERE.relative_to(ROOT)
        flags += [f"-I{emulation}", f"-I{scratch}/csrc/include", f"-I{scratch}/csrc/cuda"]
        objects = [scratch / f"{i}.o" for i in range(len(sources) + len(EMULATOR))]
        jobs = [
            [*flags, "-x", "c++", "-c", str(scratch / path.relative_to(ROOT)), "-o", str(out)]
            for path, out in zip([*sources, *EMULATOR], objects, strict=True)
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_compile, jobs))
        _compile([*link, *map(str, objects), "-o", str(scratch / target.name)])
        folder.mkdir(exist_ok=True)
        (scratch / target.name).replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{COMPILER} failed:\n{done.stderr[-6000:]}")
