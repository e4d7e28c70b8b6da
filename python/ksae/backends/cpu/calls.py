# SPDX-License-Identifier: Apache-2.0
"""The native module, and what it is called with: pointers, types, memory."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import env

_reason = ""
_cpu: Any = None
if env.read("KSAE_NATIVE") == "0":
    _reason = "left out by KSAE_NATIVE=0"
else:
    try:
        from ... import _cpu
    except ImportError as error:
        _reason = f"not importable: {error}"
    else:
        if isa := env.read("KSAE_ISA"):
            _cpu.set_isa(isa)


def other_sources(why: str) -> str:
    """What to do about a module that does not fit these files, as an old one that was built in
    place."""
    return f"ksae._cpu was built from other sources than these: {why}; build or install ksae again"


def states(op: str) -> bool:
    """Whether the module states the native parameters of an op.

    Raises:
        ImportError: it is of before there were such.
    """
    try:
        return op in _cpu.fields
    except AttributeError:
        raise ImportError(other_sources("it has no fields")) from None


def available() -> bool:
    """Whether the native kernels can be called."""
    return not _reason


def reason() -> str:
    """Why they cannot, in one line; empty if they can."""
    return _reason


def in_range(indices: Tensor, F: int) -> bool:
    """Whether all indices are seen to lie in [0, F); False: look again, or there is no module."""
    if _reason or not indices.is_contiguous():
        return False
    inside: bool = _cpu.indices_in_range(
        indices.data_ptr(), indices.numel(), indices.element_size(), F
    )
    return inside


_MAPPED = 1 << 25  # bytes; for more, malloc maps fresh pages, which the kernel clears
_spare: dict[int, list[np.ndarray[Any, Any]]] = {}  # by size in bytes


def _large(F: int, d: int, dtype: torch.dtype) -> Tensor:
    """An [F, d] that is to be written in full.

    A training step frees its weight gradients and wants the same sizes again: a large one gets the
    memory of one that nobody holds any more. What is spare is let go once it does not serve.
    """
    size = F * d * dtype.itemsize
    if size < _MAPPED:
        return torch.empty(F, d, dtype=dtype)
    try:
        memory = _spare[size].pop()  # one step for the interpreter: threads cannot take the same
    except (KeyError, IndexError):
        _spare.clear()
        memory = np.empty(size, np.uint8)  # on Linux, NumPy asks for huge pages
    held = memory.view()  # by the tensor's storage, and by nothing else
    weakref.finalize(held, _keep, memory).atexit = False
    return torch.from_numpy(held).view(dtype).view(F, d)


def _keep(memory: np.ndarray[Any, Any]) -> None:
    _spare.setdefault(memory.nbytes, []).append(memory)


class _Workspace:
    """Allocator for the native side; the memory lives as long as this object."""

    def __call__(self, size: int) -> int:
        self.memory = torch.empty(size + 64, dtype=torch.uint8)
        return (self.memory.data_ptr() + 63) & ~63
