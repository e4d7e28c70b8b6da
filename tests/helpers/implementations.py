# SPDX-License-Identifier: Apache-2.0
"""Every way to compute an op, by name, behind the one fixture `impl` of conftest.py.

    pytestmark = pytest.mark.implementations(*EVERY)

A test without this mark runs on the reference and on the CPU at each instruction set. In a process
with TRITON_INTERPRET=1 the Triton kernels are interpreted, and nothing else runs there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from cases import Implementation, implementations
from torch import Tensor

from ksae import ops, reference

CPU = "each instruction set"
HOST = "cpu"  # what the table of ops chooses on the host
EMULATED, GPU = "cuda-emulated", "gpu"
INTERPRETED, INTERPRETED_FUSED = "triton-interpreted", "triton-interpreted-fused"
ON_HOST = ("reference", CPU)
ON_CUDA = (EMULATED, GPU)  # the CUDA kernels, without and with a GPU
EVERY = (*ON_HOST, *ON_CUDA)
KERNELS = (CPU, *ON_CUDA)  # for tests that compare with the reference, bit for bit
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def contiguous(arg: Any) -> Any:
    if isinstance(arg, list):
        return [contiguous(a) for a in arg]
    return arg.contiguous() if isinstance(arg, Tensor) else arg


def to(arg: Any, device: str) -> Any:
    """Tensors and lists of tensors on a device, contiguous; the same objects where they are so."""
    if isinstance(arg, list | tuple):
        return [to(a, device) for a in arg]
    return arg.to(device).contiguous() if isinstance(arg, Tensor) else arg


class Kernels(Implementation):
    """Kernels called as the table of ops calls them: with contiguous tensors."""

    def __init__(self, name: str, kernels: Any) -> None:
        super().__init__(name)
        self.kernels = kernels

    def __getattr__(self, op: str) -> Any:
        kernel = getattr(self.kernels, op)
        return lambda *args: kernel(*map(contiguous, args))


class Emulated(Kernels):
    """ksae._cuda, executed by the emulator."""

    def __init__(self, emulator: Any) -> None:
        from ksae.backends import cuda

        super().__init__(EMULATED, cuda.Kernels(emulator.module))


class Interpreted(Kernels):
    """The Triton kernels in Triton's interpreter."""

    def __init__(self) -> None:
        from ksae.backends import triton

        super().__init__(INTERPRETED, triton.Kernels())


class Fused(Interpreted):
    """Encodes without the scores."""

    def __getattr__(self, op: str) -> Any:
        fused = f"fused_{op}"
        return super().__getattr__(fused if hasattr(self.kernels, fused) else op)


class OnCuda(Implementation):
    """The ops, or the Triton kernels, on the GPU, for tests whose tensors are on the CPU; what was
    written is copied."""

    def __init__(self, name: str) -> None:
        from ksae.backends import triton

        super().__init__(name)
        self.native = True
        fused = name == "triton-fused"
        self.kernels = ops if name == "cuda" else triton.Kernels()
        self.prefixes = ("fused_", "") if fused else ("",)

    def __getattr__(self, op: str) -> Any:
        named = [p + op for p in self.prefixes if hasattr(self.kernels, p + op)]

        def run(*args: Any) -> Any:
            there = [to(a, "cuda") for a in args]
            result = getattr(self.kernels, named[0])(*there)
            if result is NotImplemented:  # arguments that the kernel does not know: as in the table
                result = getattr(reference, op)(*there)
            if result is None:  # what is written is what counts
                for here, t in zip(args, there, strict=True):
                    if isinstance(here, Tensor):
                        here.copy_(t)
                return None
            return result.cpu() if isinstance(result, Tensor) else tuple(to(result, "cpu"))

        return run


def parameters(marked: Iterable[str], encodes: bool) -> Iterator[Any]:
    """What the fixture `impl` of a test runs through."""
    for name in marked:
        if name == CPU:
            yield from (n for n in implementations() if n != "reference")
        elif name == GPU:
            on_gpu = ("cuda", "triton", "triton-fused") if encodes else ("cuda", "triton")
            yield from (pytest.param(n, marks=pytest.mark.gpu) for n in on_gpu)
        else:
            yield name
