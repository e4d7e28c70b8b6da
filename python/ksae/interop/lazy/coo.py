# SPDX-License-Identifier: Apache-2.0
"""The code [..., F] as a sparse tensor that has its place in the graph.

Torch's own constructor would do, but its backward sorts the entries. Here the gradient of the
sparse tensor that comes back from `values_of` has the entries in the order of the selection, and
passes on as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .code import Code


def coo(code: Code) -> Tensor:
    """The code as COO [..., F], uncoalesced: entries of a row in the order of its selection. Its
    attribute `code` is the argument."""
    lead, k = code.values_.shape[:-1], code.values_.shape[-1]
    rows = torch.unravel_index(torch.arange(lead.numel(), device=code.device), lead)
    at = torch.stack([*(r.repeat_interleave(k) for r in rows), code.indices_.flatten()])
    made: Any = _Sparse.apply(code.values_, at, code.shape)  # type: ignore[no-untyped-call]
    made.code = code
    return made  # type: ignore[no-any-return]


def values_of(made: Tensor) -> Tensor:
    """The values [..., k] of what `coo` gave, whose gradient goes through it."""
    code: Code = made.code  # type: ignore[attr-defined]
    values: Tensor = _Values.apply(made, code.values_.shape)  # type: ignore[no-untyped-call]
    return values


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(at)
        ctx.shape = values.shape
        return torch.sparse_coo_tensor(at, values.flatten(), shape, check_invariants=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        if grad.is_sparse and grad._indices().data_ptr() == at.data_ptr():
            return grad._values().reshape(ctx.shape), None, None
        grad = grad.to_dense() if grad.is_sparse else grad
        return grad[tuple(at)].reshape(ctx.shape), None, None


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(made._indices())
        ctx.shape = made.shape
        return made._values().reshape(shape).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        of = torch.sparse_coo_tensor(at, grad.flatten(), ctx.shape, check_invariants=False)
        return of, None
