# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources as host C++ and loads them as a Python module.

    emulator = build.cuda()                  # ksae._cuda, from csrc/cuda and csrc/bindings/cuda.cpp
    emulator = build.kernels()               # the emulator's own test kernels
    emulator.module                          # the pybind11 module; its pointers are host memory
    emulator.seed(7)                         # the order in which threads and blocks run
    emulator.blocks_in_flight(1)             # at most so many blocks alive at once (3)
    emulator.step_limit(10**6)               # turns and atomics of one launch

`cuda` takes `texts={"topk.cu": text}`: the same module with another text in place of a source's.
KSAE_SANITIZE=address,undefined in the environment builds for a process that has the sanitizers'
libraries preloaded. A kernel that the emulator rejects raises RuntimeError out of the call.

Objects and modules are kept in the temporary folder under a hash of what went into them. Tests use
the fixtures `emulated` (ksae._cuda) and `emulated_kernels` of conftest.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DKSAE_EMULATE"),
    '-DKSAE_CUDA_ARCHITECTURES="emulated"',
)
EMULATOR = tuple(HERE / f"{name}.cpp" for name in ("scheduler", "waiting", "faults", "fiber"))


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


def cuda(texts: Mapping[str, str] | None = None) -> Emulator:
    csrc = ROOT / "csrc"
    sources = [*sorted((csrc / "cuda").glob("*.cu")), csrc / "bindings" / "cuda.cpp"]
    return Emulator(_build("_cuda", sources, texts or {}), "_cuda")


def kernels() -> Emulator:
    sources = [HERE / "kernels.cu", HERE / "kernels_module.cpp"]
    return Emulator(_build("kernels", sources, {}), "kernels")


def _build(name: str, sources: Sequence[Path], instead: Mapping[str, str]) -> Path:
    import pybind11  # tests/peers, which share conftest.py, do without it

    headers = [*(ROOT / "csrc" / "include").rglob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    headers += [*(ROOT / "csrc" / "bindings").glob("*.h"), *HERE.glob("*.h")]
    texts = {path: path.read_text() for path in sorted({*sources, *EMULATOR, *headers})}
    for file, text in instead.items():
        (path,) = [p for p in texts if p.name == file]
        texts[path] = text
    flags = [*FLAGS, f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    link = ["-shared"]
    if sanitize := os.environ.get("KSAE_SANITIZE"):
        # vptr checks need type information that pybind11's hidden types do not share.
        options = [f"-fsanitize={sanitize}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += [*options, "-fno-omit-frame-pointer"]
        link += options
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    shared = [version.stdout, pybind11.__version__, *flags, *(texts[p] for p in sorted(headers))]
    objects = {path: f"{_hash([*shared, texts[path]])}.o" for path in [*sources, *EMULATOR]}
    cache = Path(tempfile.gettempdir()) / f"ksae-emulation-{os.getuid()}"
    target = cache / _hash(objects.values()) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    cache.mkdir(mode=0o700, exist_ok=True)
    with (cache / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this run may be at the same
        if target.exists():
            return target
        scratch = Path(folder)
        for path, text in texts.items():
            copy = scratch / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
        flags += [f"-I{scratch / HERE.relative_to(ROOT)}"]
        flags += [f"-I{scratch}/csrc/include", f"-I{scratch}/csrc/cuda"]

        def compile(path: Path) -> None:
            out = scratch / objects[path]
            if not (cache / out.name).exists():
                source = scratch / path.relative_to(ROOT)
                _run([*flags, "-x", "c++", "-c", str(source), "-o", str(out)])
                out.replace(cache / out.name)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile, objects))
        _run([*link, *(str(cache / o) for o in objects.values()), "-o", str(scratch / target.name)])
        target.parent.mkdir(exist_ok=True)
        (scratch / target.name).replace(target)
    return target


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _run(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{COMPILER} failed:\n{done.stderr[-6000:]}")
