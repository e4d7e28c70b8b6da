# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve CUDA tensors: CUDA C++ where it is built and usable, else Triton where it can
be imported, else the reference. Three ways encode, and a table of measurements chooses:

- "product": torch's product in chunks of rows, its scores written, then an exact selection;
- "screened", of float32: the same with a product of bf16 copies, a selection that knows what they
  lost, and float32 scores of what can win;
- "fused": one Triton kernel that never writes the scores; it screens float32 as well.

`bench/gpu/run.py` measures them on a GPU and prints the rows to put into TABLE. A call takes the
row of its GPU generation and dtype that is nearest in d and F; without a row, the product. Where
nothing is measured, float32 is screened: products in bf16 have 15 times the rate of those in
float32 by the makers' figures (H100, H200), 16 times (A100), 2 to 4 (RTX 4090). A step with AuxK
encodes twice when it is fused, or screened with a k_aux too large to screen; else one product
serves both selections: a choice of its own.

Environment, read once at import: KSAE_ENCODE=product, screened or fused overrides the table.
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
from .product import Encode, pays

WAYS = ("product", "screened", "fused")
KINDS = ("float32", "16 bit")  # of weights
UNMEASURED = "no measurement yet: by count"
BY_COUNT = {"float32": "screened", "16 bit": "product"}


class Row(NamedTuple):
    """The faster way to encode, where it was measured, and what was measured."""

    generation: str  # compute capability
    kind: str  # of KINDS
    d: int
    F: int
    way: str
    measured: str
    aux: str = "product"  # the faster way of topk_encode_aux


TABLE = tuple(
    Row(generation, kind, 768, 24576, BY_COUNT[kind], UNMEASURED, BY_COUNT[kind])
    for generation in ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    for kind in KINDS
)


def _override() -> str | None:
    way = env.read("KSAE_ENCODE") or None
    if way is not None and way not in WAYS:
        raise ValueError(f"KSAE_ENCODE must be product, screened or fused, got {way!r}")
    return way


override = _override()


@functools.cache
def row(generation: str, kind: str, d: int, F: int) -> Row | None:
    """The row of this generation and kind of weights that is nearest in d and F."""

    def distance(r: Row) -> float:
        return abs(math.log(max(d, 1) / r.d)) + abs(math.log(max(F, 1) / r.F))

    rows = (r for r in TABLE if (r.generation, r.kind) == (generation, kind))
    return min(rows, key=distance, default=None)


def generation(device: torch.device) -> str:
    """The key of the table: compute capability, which on AMD GPUs counts something else."""
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def way(W_enc: Tensor, k: int, aux: bool = False) -> str:
    """How k of tensors of this shape and dtype on this device are encoded; aux: by
    topk_encode_aux."""
    F, d = W_enc.shape
    single = W_enc.dtype == torch.float32
    chosen = override
    if chosen is None:
        found = row(generation(W_enc.device), KINDS[not single], d, F)
        chosen = "product" if found is None else found.aux if aux else found.way
    if chosen == "screened" and not (single and pays(k, F)):
        return "product"
    if chosen == "fused" and triton.kernels is None:
        return "screened" if single and pays(k, F) else "product"
    return chosen


def screens(W_enc: Tensor, k: int, aux: bool = False) -> bool:
    """Whether weights like these are encoded by way of a bf16 copy, so that it is worth keeping.

    k: the selection of the call; aux: of topk_encode_aux.
    """
    if not W_enc.is_cuda or W_enc.dtype != torch.float32 or _copying() is None:
        return False
    chosen = way(W_enc, k, aux)
    return chosen == "screened" or (chosen == "fused" and triton.takes(k))


def bf16_copy(W: Tensor) -> tuple[Tensor, Tensor]:
    """The arguments W_bf16 and norms of `topk_encode`, of float32 weights W [F, d]."""
    by = _copying()
    assert by is not None
    return by.bf16_copy(W)


def _copying() -> Encode | None:
    return triton.kernels if cuda.kernels is None else cuda.kernels


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
    product, server = found[0]
    ways = {"product": product}
    screened = cuda.kernels if server == "native" else triton.kernels
    if hasattr(screened, f"screened_{name}"):
        ways["screened"] = getattr(screened, f"screened_{name}")
        if cuda.kernels is not None:
            ways["screened"] = cuda.served(name, ways["screened"])
    if (fused := getattr(triton.kernels, f"fused_{name}", None)) is not None:
        ways["fused"] = fused
    if len(ways) == 1:
        return found[0]
    aux = name == "topk_encode_aux"
    chosen = {override} if override else {r.aux if aux else r.way for r in TABLE}
    servers = {"triton" if w == "fused" and "fused" in ways else server for w in chosen}
    taken = {way: inspect.signature(function).parameters for way, function in ways.items()}

    @functools.wraps(max(ways.values(), key=lambda f: len(inspect.signature(f).parameters)))
    def encode(**args: Any) -> Any:
        by = way(args["W_enc"], args["k"], aux)
        by = by if by in ways else "product"  # a gradient-aware encode is not screened
        return ways[by](**{arg: value for arg, value in args.items() if arg in taken[by]})

    return encode, " or ".join(sorted(servers))


def state() -> dict[str, Any]:
    """For ksae.config(): whether Triton kernels can serve, and how each generation encodes."""
    usable = triton.kernels is not None
    if override is not None:
        chosen = {"encode": f"{override}, by KSAE_ENCODE"}
    else:
        chosen = {
            f"encode {r.kind} on {r.generation}, d={r.d}, F={r.F}": f"{r.way} ({r.measured})"
            for r in TABLE
        }
    return {"triton": "usable" if usable else triton.reason, **chosen}
