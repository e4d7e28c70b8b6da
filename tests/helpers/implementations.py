# SPDX-License-Identifier: Apache-2.0
"""Every way to compute an op, by name, behind the one fixture `impl` of conftest.py.

    pytestmark = pytest.mark.implementations(*EVERY)

A test without this mark runs on the reference and on the CPU at each instruction set. In a process
with TRITON_INTERPRET=1 the Triton kernels are interpreted, and nothing else runs there.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from cases import Implementation, implementations
from torch import Tensor

from ksae import ops, reference
from ksae.ops import straight
from ksae.ops.specs import BY_NAME

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


def as_op(op: str, kernel: Any) -> Any:
    """`kernel` as the table of ops calls it, but unchecked: by name, with contiguous tensors; the
    reference where it does not serve."""
    spec = BY_NAME[op]
    own, others = straight.named(kernel, spec), straight.unserved(kernel, spec)

    def run(*args: Any, **named: Any) -> Any:
        values = {**spec.defaults, **dict(zip(spec.names, args, strict=False)), **named}
        if any(values[name] is not None for name in others):
            return getattr(reference, op)(**values)
        return kernel(**{name: contiguous(values[name]) for name in own})

    return run


def to(arg: Any, device: str) -> Any:
    """Tensors and lists of tensors on a device, contiguous; the same objects where they are so."""
    if isinstance(arg, list | tuple):
        return [to(a, device) for a in arg]
    return arg.to(device).contiguous() if isinstance(arg, Tensor) else arg


# Ops that the reference serves on GPUs: no kernel is written yet.
NOT_ON_GPUS = {"scored_encode", "prefix_residual", "prefix_residual_slice"}


def takes_arguments_of(kernel: Any, op: str) -> None:
    """Assert that `kernel` names arguments of the op alone, in its order, all that must be given
    among them and with the same defaults."""
    spec, own = BY_NAME[op], inspect.signature(kernel).parameters
    names = [name for name in own if name != "self"]
    assert names == [name for name in spec.names if name in names]
    assert not set(spec.names) - set(names) - spec.optional
    schema = inspect.signature(getattr(reference, op)).parameters
    assert all(own[name].default == schema[name].default for name in names)


class Kernels(Implementation):
    """Kernels called as the table of ops calls them."""

    def __init__(self, name: str, kernels: Any) -> None:
        super().__init__(name)
        self.kernels = kernels

    def __getattr__(self, op: str) -> Any:
        name = op.removeprefix("fused_")
        kernel = self.find(op)
        return as_op(name, kernel) if name in BY_NAME else kernel

    def find(self, op: str) -> Any:
        return getattr(self.kernels, op)


class Emulated(Kernels):
    """ksae._cuda, executed by the emulator."""

    def __init__(self, emulator: Any) -> None:
        from ksae.backends import cuda

        super().__init__(EMULATED, cuda.Kernels(emulator.module))

    def find(self, op: str) -> Any:
        return self.kernels.kernel(BY_NAME[op]) if op in BY_NAME else super().find(op)


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

        def run(*args: Any, **more: Any) -> Any:
            there = [to(a, "cuda") for a in args]
            more_there = {name: to(a, "cuda") for name, a in more.items()}
            kernel = getattr(self.kernels, named[0])
            called = kernel if self.kernels is ops else as_op(op, kernel)
            result = called(*there, **more_there)
            if result is None:  # what is written is what counts
                both = zip((*args, *more.values()), (*there, *more_there.values()), strict=True)
                for here, t in both:
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
