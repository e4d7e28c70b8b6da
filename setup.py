# SPDX-License-Identifier: Apache-2.0
"""Maps python/ksae, kernels/ and bench/ into one package and asks CMake for the native modules.

Metadata is in pyproject.toml; sources, flags and architectures are in CMakeLists.txt. Environment:
  KSAE_NATIVE=0     leave the C++ and CUDA modules out: the reference in plain torch serves every op
  KSAE_CUDA=0|1     leave the CUDA module out | demand it (default: built when nvcc is found)
  KSAE_SANITIZE     sanitizers for the CPU module, such as address,undefined
  CMAKE_ARGS        more arguments for CMake
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def program(name: str) -> str:
    # pip's build environment is on PATH; an environment that was not activated is not.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"ksae: building needs {name}: pip install {name}")
    return found


def find_nvcc() -> str | None:
    choice = os.environ.get("KSAE_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"ksae: KSAE_CUDA must be 0 or 1, got {choice}")
    nvcc = None if choice == "0" else shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if choice == "1" and nvcc is None:
        sys.exit("ksae: KSAE_CUDA=1 needs nvcc on the PATH or its path in CUDACXX")
    return nvcc


def find_compiler() -> None:
    """A machine without one is told here, before CMake's page about it."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    names = named or ["c++", "g++", "clang++", "cl", "CC"]  # those that CMake looks for
    if not any(map(shutil.which, names)):
        what = f"CXX names {named[0]}, which is not there" if named else "there is no C++ compiler"
        sys.exit(
            f"ksae: {what}: install g++ 12 or newer, or set KSAE_NATIVE=0 to install without the"
            " native kernels, much slower"
        )


NATIVE = os.environ.get("KSAE_NATIVE", "") != "0"
NVCC = find_nvcc() if NATIVE else None


MODULES = (["_cpu"] if NATIVE else []) + (["_cuda"] if NVCC else [])


class BuildPy(build_py):
    def run(self) -> None:
        # setuptools packs whatever lies there, so a module of an earlier build would come along.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Runs CMake once for all modules, then puts each where setuptools expects it."""

    def run(self) -> None:
        if not self.extensions:
            return
        if not re.search("CMAKE_(CXX_COMPILER|TOOLCHAIN)", os.environ.get("CMAKE_ARGS", "")):
            find_compiler()
        build = Path(self.build_temp).resolve() / "cmake"
        self.cmake(
            ["--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
            + [f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"]
            + ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}"]
            # A Python that CMake starts need not see the packages of this one.
            + [f"-DPython_EXECUTABLE={sys.executable}"]
            + [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            + (["-DKSAE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={NVCC}"] if NVCC else ["-DKSAE_CUDA=OFF"])
            + [f"-DKSAE_SANITIZE={os.environ.get('KSAE_SANITIZE', '')}"]
            + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        )
        self.cmake(["--build", str(build)])
        if self.inplace and not NVCC:  # a CUDA module of an earlier editable install would stay
            Path(self.get_ext_fullpath("ksae._cuda")).unlink(missing_ok=True)
        super().run()

    def cmake(self, arguments: list[str]) -> None:
        if subprocess.run([program("cmake"), *arguments]).returncode:
            hint = "; KSAE_CUDA=0 leaves the CUDA module out" if NVCC else ""
            sys.exit(f"ksae: CMake failed, see its messages above{hint}")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(self.build_temp) / "cmake" / target.name, target)


setup(
    # A working tree may have ksae.bench and ksae.kernels as links.
    packages=[
        *find_packages("python", exclude=["ksae.bench*", "ksae.kernels*"]),
        "ksae.kernels",
        "ksae.bench",
        *(f"ksae.bench.{name}" for name in find_packages("bench")),
    ],
    py_modules=["ksae_cli"],  # the console script
    package_dir={
        "": "python",
        "ksae": "python/ksae",
        "ksae.kernels": "kernels",
        "ksae.bench": "bench",
    },
    package_data={
        "ksae": ["py.typed", "*.pyi"],
        "ksae.analysis.attribution": ["assets/*"],
        "ksae.analysis.dashboard": ["assets/*"],
    },
    exclude_package_data={
        "ksae.bench": ["*.md", ".gitignore", "results/**", "pytest/*", "cache/*"]
    },
    # Both are declared: with one, an editable install would lose the other.
    ext_modules=[Extension(f"ksae.{name}", []) for name in MODULES],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
)
