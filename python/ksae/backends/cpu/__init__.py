# SPDX-License-Identifier: Apache-2.0
"""Bridge from torch tensors to the native CPU kernels: the one place where tensors become pointers.

Each function has the name and meaning of its reference and names the arguments that it serves; with
others that are optional, the reference serves the call. An op that states its native parameters
itself has no function here (bridge.py). Tensors come checked, contiguous and in
float32, bfloat16 or float16 (ksae.ops sees to it). Outputs and workspaces are torch's; the
thread count is torch.get_num_threads().

Environment, read once at import: KSAE_NATIVE=0 leaves the native code out,
KSAE_ISA=plain|avx2|avx512|avx512bf16 lowers the instruction set, KSAE_SCREEN=off switches certified
screening of float32 encodes off (on where the CPU has BF16 dot instructions).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import bridge
from . import calls, encode
from .calls import _Workspace, available, in_range, reason
from .decode import (
    prefix_residual,
    prefix_residual_slice,
    sparse_decode,
    sparse_decode_backward_values,
    sparse_decode_backward_weight,
    sparse_residual,
    sparse_residual_slice,
)
from .encode import (
    batch_topk_encode,
    batch_topk_encode_counted,
    encode_product,
    grad_topk_encode,
    grad_topk_encode_counted,
    scored_encode,
    threshold_encode,
    threshold_encode_by,
    topk,
    topk_encode,
    topk_encode_aux,
    topk_encode_counted,
)
from .group import group_by_latent

__all__ = [
    "available",
    "batch_topk_encode",
    "batch_topk_encode_counted",
    "calls",
    "encode",
    "encode_product",
    "grad_topk_encode",
    "grad_topk_encode_counted",
    "group_by_latent",
    "in_range",
    "kernel",
    "prefix_residual",
    "prefix_residual_slice",
    "reason",
    "scored_encode",
    "sparse_decode",
    "sparse_decode_backward_values",
    "sparse_decode_backward_weight",
    "sparse_residual",
    "sparse_residual_slice",
    "threshold_encode",
    "threshold_encode_by",
    "topk",
    "topk_encode",
    "topk_encode_aux",
    "topk_encode_counted",
]


def kernel(spec: Any) -> Callable[..., Any] | None:
    """The op of `spec` (ksae.ops.spec.Spec) on CPU tensors; None where the reference serves it."""
    if not available():
        return None
    if not calls.states(spec.name):
        found: Callable[..., Any] | None = globals().get(spec.name)
        return found
    known = {"Workspace": _Workspace, "get_num_threads": torch.get_num_threads}
    run = "call({values}, Workspace(), get_num_threads())"
    fields, call = calls._cpu.fields[spec.name], getattr(calls._cpu, spec.name)
    try:
        return bridge.native(spec, fields, call, run, known)
    except ValueError as error:  # a field that its line does not have
        raise ImportError(calls.other_sources(str(error))) from None
