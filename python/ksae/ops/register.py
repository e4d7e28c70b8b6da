# SPDX-License-Identifier: Apache-2.0
"""The only place that registers anything with torch (namespace `ksae`).

The reference is the default kernel on every device; a kernel of the same name serves its device
above it. Inputs are 2-D; kernels get them contiguous, except written ones, which must be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import cpu as native
from ..backends import serving as gpu
from . import autograd, batching
from .spec import Spec
from .specs import BY_NAME, SPECS

_serving: dict[str, dict[str, str]] = {}


def serving() -> dict[str, dict[str, str]]:
    """Who serves each op: {op: {device: name}}; "default" is every device not named."""
    return {name: dict(devices) for name, devices in _serving.items()}


def _contiguous(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.contiguous()
    if isinstance(arg, list | tuple):
        return [_contiguous(a) for a in arg]
    return arg


def kernel(name: str, function: Callable[..., Any], native_: bool) -> Callable[..., Any]:
    """`function` behind the check. Native leaves float64, the oracle's type, to the reference."""
    spec = BY_NAME[name]
    oracle = getattr(reference, name)
    written, has_indices = spec.written, spec.has_indices

    def run(*args: Any) -> Any:
        values = spec.bind(args)
        lead, dims, _ = spec.check(values)
        if has_indices:
            spec.check_indices(values, dims)
        serve = oracle if lead.dtype == torch.float64 else function
        result = serve(*(map(_contiguous, args) if native_ else args))
        if result is NotImplemented:  # arguments that the kernel does not know
            result = oracle(*args)
        if written:  # below autograd: tell it
            changed = [values[w] for w in written if values[w] is not None]
            torch.autograd.graph.increment_version(changed)
        return result

    return run


def _register(spec: Spec) -> Any:
    """Register one op: kernels, shapes, gradient, vmap and autocast."""
    name, qualified = spec.name, f"ksae::{spec.name}"
    torch.library.define(qualified, spec.schema)
    op = getattr(torch.ops.ksae, name).default

    default = kernel(name, getattr(reference, name), native_=False)
    torch.library.register_kernel(qualified, None, default)
    _serving[name] = {"default": "reference"}
    if native.available() and hasattr(native, name):
        served = kernel(name, getattr(native, name), native_=True)
        torch.library.register_kernel(qualified, "cpu", served)
        _serving[name]["cpu"] = "native"
    if (on_gpu := gpu.kernel(name)) is not None:
        served = kernel(name, on_gpu[0], native_=True)
        torch.library.register_kernel(qualified, "cuda", served)
        _serving[name]["cuda"] = on_gpu[1]

    torch.library.register_fake(qualified, spec.fake)
    if name in autograd.RULES:
        run = autograd.kernel(op, name)
        _library.impl(name, run, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    rule = batching.vmap_rule(name, spec.names)
    if rule is not None:
        torch.library.register_vmap(qualified, rule)
    else:
        torch.library.impl(qualified, "FuncTorchBatched", batching.refuse_vmap(name))
    for device in ("cpu", "cuda"):
        cast = batching.autocast(op, name, device, spec.hints)
        torch.library.impl(qualified, f"Autocast{device.upper()}", cast)
    return op


_library = torch.library.Library("ksae", "FRAGMENT")  # type: ignore[no-untyped-call]
OPS = {spec.name: _register(spec) for spec in SPECS}
