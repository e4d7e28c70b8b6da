# SPDX-License-Identifier: Apache-2.0
"""The ops under vmap and under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_op = torch.ops.ksae
# Ops whose output rows depend on the rows of these arguments alone.
_ROWS = {
    "topk": ("x",),
    "topk_encode": ("x",),
    "grad_topk_encode": ("x", "grad"),
    "sparse_decode": ("values", "indices"),
    "sparse_decode_backward_values": ("grad", "indices"),
}
# Ops whose floating inputs are cast under autocast.
_CAST = frozenset(
    {
        "topk_encode",
        "grad_topk_encode",
        "batch_topk_encode",
        "threshold_encode",
        "sparse_decode",
    }
)


def vmap_rule(name: str, arguments: tuple[str, ...]) -> Callable[..., Any] | None:
    """The rule for torch.library.register_vmap; None where the op has no meaning under vmap."""
    if name in _ROWS:
        return _by_row(name, arguments)
    return {
        "sparse_decode_backward_weight": _sparse_decode_backward_weight,
        "total_variance": _total_variance,
    }.get(name)


def refuse_vmap(name: str) -> Callable[..., Any]:
    """The rule of the other ops."""

    def refuse(*args: Any) -> Any:
        raise NotImplementedError(
            f"{name}: has no meaning under vmap; call it once per batch entry"
        )

    return refuse


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """A per-row argument with its batch dimension folded into the rows: [size * N, ...]."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _unfold(t: Tensor, size: int) -> Tensor:
    return t.reshape(size, t.shape[0] // size, *t.shape[1:])


def _fold_offsets(offsets: Tensor, dim: int | None, size: int) -> Tensor:
    """Row offsets of each batch entry, [N+1], as those of all rows: [size * N + 1].

    Each has as many code entries as the others, for these are a batch.
    """
    offsets = offsets.expand(size, *offsets.shape) if dim is None else offsets.movedim(dim, 0)
    ends = offsets[:, -1].cumsum(0)
    starts = (offsets[:, :-1] + (ends - offsets[:, -1])[:, None]).flatten()
    return torch.cat([starts, ends[-1:]])


def _by_row(name: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    rows = _ROWS[name]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, folded = info.batch_size, []
        for argument, dim, arg in zip(arguments, in_dims, args, strict=False):
            if argument == "row_offsets" and arg is not None:
                arg = _fold_offsets(arg, dim, size)
            elif argument in rows:
                arg = _fold(arg, dim, size).contiguous()
            elif dim is not None:
                raise ValueError(
                    f"{name}: {argument} must be unbatched under vmap, got a batch of it"
                )
            folded.append(arg)
        out = getattr(_op, name).default(*folded)
        if isinstance(out, Tensor):
            return _unfold(out, size), 0
        return tuple(_unfold(t, size) for t in out), (0,) * len(out)

    return rule


def _sparse_decode_backward_weight(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """A batch of weight gradients: batch b owns the latents [b*F, (b+1)*F)."""
    size, F = info.batch_size, args[3]
    grad, values, indices = (
        a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
        for a, dim in zip(args[:3], in_dims[:3], strict=True)
    )
    own = F * torch.arange(size, device=indices.device)[:, None, None]
    folded = (t.flatten(0, 1).contiguous() for t in (grad, values, indices + own))
    offsets = args[4] if len(args) > 4 else None
    if offsets is not None:
        offsets = _fold_offsets(offsets, in_dims[4], size)
    grad_W, value_sum = _op.sparse_decode_backward_weight(*folded, size * F, offsets)
    return (_unfold(grad_W, size), _unfold(value_sum, size)), (0, 0)


def _total_variance(info: Any, in_dims: tuple[Any, ...], y: Tensor) -> Any:
    return torch.stack([_op.total_variance(rows) for rows in y.movedim(in_dims[0], 0)]), 0


def autocast(op: Any, name: str, device: str, hints: frozenset[str]) -> Callable[..., Any]:
    """The op under autocast, which is off inside of it; floating inputs (not float64) are cast for
    those of _CAST.

    Hints are about float32 weights, not about cast ones, and dropped.
    """
    cast = name in _CAST
    dropped = [cast and a.name in hints for a in op._schema.arguments]

    def to(arg: Any, dtype: torch.dtype) -> Any:
        floating = isinstance(arg, Tensor) and arg.is_floating_point()
        return arg.to(dtype) if floating and arg.dtype != torch.float64 else arg

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            args = tuple(None if drop else a for a, drop in zip(args, dropped, strict=False))
            return op(*(to(a, dtype) if cast else a for a in args))

    return kernel
