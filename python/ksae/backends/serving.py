# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve CUDA tensors: CUDA C++ where it is built and usable, else Triton where it can
be imported, else the reference. Two ways encode, and a table of measurements chooses:

- "product": torch's product in chunks of rows, its scores written, then an exact selection;
- "fused": one Triton kernel that never writes the scores.

`bench/gpu/run.py` measures both on a GPU and prints the row to put into TABLE. A call takes the row
of its GPU generation that is nearest in d and F; without a row it takes the product. A step with
AuxK encodes twice when it is fused, while the product serves both its selections: a choice of its
own.

Environment, read once at import: KSAE_ENCODE=fused or product overrides the table.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import env
from . import cuda, triton

WAYS = ("product", "fused")
UNMEASURED = "no measurement yet: product path"


class Row(NamedTuple):
    """The faster way to encode, where it was measured, and what was measured."""

    generation: str  # compute capability
    d: int
    F: int
    way: str
    measured: str
    aux: str = "product"  # the faster way of topk_encode_aux


TABLE = (
    Row("8.0", 768, 24576, "product", UNMEASURED),
    Row("8.9", 768, 24576, "product", UNMEASURED),
    Row("9.0", 768, 24576, "product", UNMEASURED),
    Row("10.0", 768, 24576, "product", UNMEASURED),
    Row("12.0", 768, 24576, "product", UNMEASURED),
)


def _override() -> str | None:
    way = env.read("KSAE_ENCODE") or None
    if way is not None and way not in WAYS:
        raise ValueError(f"KSAE_ENCODE must be fused or product, got {way!r}")
    return way


override = _override()


@functools.cache
def row(generation: str, d: int, F: int) -> Row | None:
    """The row of this generation that is nearest in d and F."""

    def distance(r: Row) -> float:
        return abs(math.log(max(d, 1) / r.d)) + abs(math.log(max(F, 1) / r.F))

    return min((r for r in TABLE if r.generation == generation), key=distance, default=None)


def generation(device: torch.device) -> str:
    """The key of the table: compute capability, which on AMD GPUs counts something else."""
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def way(W_enc: Tensor, aux: bool = False) -> str:
    """How tensors of this shape on this device are encoded; aux: by topk_encode_aux."""
    if override is not None:
        return override
    F, d = W_enc.shape
    found = row(generation(W_enc.device), d, F)
    if found is None:
        return "product"
    return found.aux if aux else found.way


def screens(W_enc: Tensor, k: int, aux: bool = False) -> bool:
    """Whether weights like these are encoded by way of a bf16 copy, so that it is worth keeping.

    k: the largest selection of the call; aux: of topk_encode_aux.
    """
    if triton.kernels is None or not W_enc.is_cuda or W_enc.dtype != torch.float32:
        return False
    return way(W_enc, aux) == "fused" and triton.takes(k)


def kernel(spec: Any) -> tuple[Callable[..., Any], str] | None:
    """What serves the op of `spec` (ksae.ops.spec.Spec) on CUDA tensors and its name; None where
    the reference does, as for ops without a kernel for GPUs."""
    name: str = spec.name
    found: list[tuple[Callable[..., Any], str]] = []
    native = None if cuda.kernels is None else cuda.kernels.kernel(spec)
    if native is not None:
        found.append((cuda.served(name, native), "native"))
    if triton.kernels is not None and hasattr(triton.kernels, name):
        found.append((getattr(triton.kernels, name), "triton"))
    if not found:
        return None
    fused = getattr(triton.kernels, f"fused_{name}", None)
    if fused is None:
        return found[0]
    product, server = found[0]
    aux = name == "topk_encode_aux"
    ways = {override} if override else {r.aux if aux else r.way for r in TABLE}
    label = " or ".join(sorted({"triton" if w == "fused" else server for w in ways}))
    taken = inspect.signature(product).parameters  # no hints: nothing is screened

    @functools.wraps(fused)
    def encode(**args: Any) -> Any:
        if way(args["W_enc"], aux) == "fused":
            return fused(**args)
        return product(**{arg: value for arg, value in args.items() if arg in taken})

    return encode, label


def state() -> dict[str, Any]:
    """For ksae.config(): whether Triton kernels can serve, and how each generation encodes."""
    usable = triton.kernels is not None
    if override is not None:
        chosen = {"encode": f"{override}, by KSAE_ENCODE"}
    else:
        chosen = {
            f"encode on {r.generation}, d={r.d}, F={r.F}": f"{r.way} ({r.measured})" for r in TABLE
        }
    return {"triton": "usable" if usable else triton.reason, **chosen}
