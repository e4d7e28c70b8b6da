# SPDX-License-Identifier: Apache-2.0
"""The only place that registers anything with torch (namespace `ksae`).

The reference is the default kernel on every device; a kernel of the same name serves its device
above it. Inputs are 2-D; kernels get them contiguous, except written ones, which must be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import reference
from ..backends import cpu as native
from ..backends import serving as gpu
from . import autograd, batching, straight
from .spec import Spec
from .specs import BY_NAME, SPECS

_serving: dict[str, dict[str, str]] = {}


def serving() -> dict[str, dict[str, str]]:
    """Who serves each op: {op: {device: name}}; "default" is every device not named."""
    return {name: dict(devices) for name, devices in _serving.items()}


def kernel(name: str, serve: Callable[..., Any], device: str | None) -> Callable[..., Any]:
    """The op behind its check, as `serve` computes it for tensors of `device`; None: of any."""
    return straight.kernel(BY_NAME[name], serve, getattr(reference, name), device)


def _label(spec: Spec, server: str, serve: Callable[..., Any]) -> str:
    """Who serves an op, and with which arguments the reference does instead."""
    without = straight.unserved(serve, spec)
    return f"{server}; reference with {' or '.join(without)}" if without else server


def _register(spec: Spec) -> Any:
    """Register one op: kernels, shapes, gradient, vmap and autocast."""
    name, qualified = spec.name, f"ksae::{spec.name}"
    torch.library.define(qualified, spec.schema)
    op = getattr(torch.ops.ksae, name).default

    default = kernel(name, getattr(reference, name), None)
    torch.library.impl(qualified, "CompositeExplicitAutograd", default)
    _serving[name] = {"default": "reference"}
    if (serve := native.kernel(spec)) is not None:
        torch.library.impl(qualified, "CPU", kernel(name, serve, "cpu"))
        _serving[name]["cpu"] = _label(spec, "native", serve)
    if (on_gpu := gpu.kernel(spec)) is not None:
        serve, server = on_gpu
        torch.library.impl(qualified, "CUDA", kernel(name, serve, "cuda"))
        _serving[name]["cuda"] = _label(spec, server, serve)

    torch.library.register_fake(qualified, spec.fake)
    if name in autograd.RULES:
        run = straight.untraced(autograd.kernel(op, name))
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
