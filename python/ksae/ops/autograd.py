# SPDX-License-Identifier: Apache-2.0
"""Gradients: for each differentiable op, what is saved and what comes back.

Saved are tensors only, and each is unpacked once; a gradient that nobody asked for is None and its
product is not formed. The products of `topk_encode` and `sparse_decode` are closed under
differentiation: the gradient of each is made of the same ops, to any order. In forward mode there
are none, and a call says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

_op = torch.ops.ksae
Gradients = tuple[Tensor | None, ...]


class Rule(NamedTuple):
    """The gradient of one op: what its backward needs, and the backward."""

    save: Callable[..., None]
    backward: Callable[..., Any]


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.F = inputs[0].shape[1]


def _topk(ctx: Any, grad: Tensor | None, _: None) -> Gradients:
    if grad is None:
        return None, None
    (indices,) = ctx.saved_tensors
    # of torch.topk: writes into the zeros that it makes, but where vmap cannot
    full = torch.ops.aten.value_selecting_reduction_backward
    return full(grad, 1, indices, [grad.shape[0], ctx.F], True), None


def _save_topk_encode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, W_enc, _, _, b_dec, *_ = inputs
    ctx.save_for_backward(x, W_enc, b_dec, *output)
    ctx.has_b_dec = b_dec is not None


def _topk_encode(ctx: Any, grad: Tensor | None, _: None) -> Gradients:
    if grad is None:
        return (None,) * 8
    need_x, need_W, need_b = ctx.needs_input_grad[:3]
    need_b_dec = ctx.has_b_dec and ctx.needs_input_grad[4]  # the dispatcher drops defaults
    dx, dW_enc, db_enc, db_dec = _encoder(ctx, grad, need_x, need_W, need_b, need_b_dec)
    return dx, dW_enc, db_enc, None, db_dec, None, None, None


def _save_encode_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, W_enc, _, _, b_dec = inputs  # the fourth is theta, or k
    ctx.save_for_backward(x, W_enc, b_dec, *output)
    ctx.has_b_dec = b_dec is not None


def _encode_rows(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
    if grad is None:
        return (None,) * 5
    need_x, need_W, need_b = ctx.needs_input_grad[:3]
    need_b_dec = ctx.has_b_dec and ctx.needs_input_grad[4]
    dx, dW_enc, db_enc, db_dec = _encoder(ctx, grad, need_x, need_W, need_b, need_b_dec)
    return dx, dW_enc, db_enc, None, db_dec  # nothing through the selection


def _save_grad_topk_encode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, _, W_enc, *_, b_dec = inputs
    ctx.save_for_backward(x, W_enc, b_dec, *output)
    ctx.has_b_dec = b_dec is not None


def _grad_topk_encode(ctx: Any, grad: Tensor | None, _: None) -> Gradients:
    if grad is None:
        return (None,) * 9
    need_x, _, need_W, need_b = ctx.needs_input_grad[:4]
    need_b_dec = ctx.has_b_dec and ctx.needs_input_grad[8]
    dx, dW_enc, db_enc, db_dec = _encoder(ctx, grad, need_x, need_W, need_b, need_b_dec)
    # nothing through the score: not to the downstream gradient, not to W_dec
    return dx, None, dW_enc, db_enc, None, None, None, None, db_dec


def _encoder(
    ctx: Any, grad: Tensor, need_x: bool, need_W: bool, need_b: bool, need_b_dec: bool
) -> Gradients:
    """Gradients of x, W_enc, b_enc and b_dec where the selection is fixed: of k a row, or with row
    offsets."""
    x, W_enc, b_dec, values, indices, *rest = ctx.saved_tensors
    (row_offsets,) = rest or (None,)
    if row_offsets is None:
        dv = torch.where(values > 0, grad, 0)  # [N, k]: a slot at zero passes nothing
    else:
        dv, indices = torch.where(values != 0, grad, 0)[:, None], indices[:, None]  # [E, 1]
    dx = dW_enc = db_enc = db_dec = None
    if need_x:
        dx = _op.sparse_decode(dv, indices, W_enc, None, row_offsets)
    if need_W or need_b or need_b_dec:
        xc = x if b_dec is None else x - b_dec  # [N, d]
        dW_enc, db_enc = _op.sparse_decode_backward_weight(
            xc, dv, indices, W_enc.shape[0], row_offsets
        )
    if need_b_dec:
        db_dec = -(W_enc.T @ db_enc)
    return dx, dW_enc, db_enc, db_dec


def _save_sparse_decode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    values, indices, W_dec, b_dec, row_offsets, _ = inputs
    ctx.save_for_backward(values, indices, W_dec, row_offsets)
    ctx.has_bias = b_dec is not None


def _sparse_decode(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 6
    values, indices, W_dec, row_offsets = ctx.saved_tensors
    need_values, _, need_W = ctx.needs_input_grad[:3]
    need_b = ctx.has_bias and ctx.needs_input_grad[3]
    db = grad.sum(0) if need_b else None
    if grad.dtype != W_dec.dtype:  # of partial sums
        grad, db = grad.to(W_dec.dtype), None if db is None else db.to(W_dec.dtype)
    dv = dW_dec = None
    if need_values:
        dv = _op.sparse_decode_backward_values(grad, indices, W_dec, row_offsets)
    if need_W:
        dW_dec, _ = _op.sparse_decode_backward_weight(
            grad, values, indices, W_dec.shape[0], row_offsets
        )
    return dv, None, dW_dec, db, None, None


def _save_backward_values(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _sparse_decode_backward_values(ctx: Any, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 4
    # the op is <g[n], W_dec[index]> for each entry; g may be wider than W_dec
    g, indices, W_dec, row_offsets = ctx.saved_tensors
    need_g, _, need_W = ctx.needs_input_grad[:3]
    narrow = grad.to(W_dec.dtype)
    dg = dW_dec = None
    if need_g:
        dg = _op.sparse_decode(narrow, indices, W_dec, None, row_offsets).to(g.dtype)
    if need_W:
        dW_dec, _ = _op.sparse_decode_backward_weight(
            g.to(W_dec.dtype), narrow, indices, W_dec.shape[0], row_offsets
        )
    return dg, None, dW_dec, None


def _save_backward_weight(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    g, values, indices, _, row_offsets = inputs
    ctx.save_for_backward(g, values, indices, row_offsets)


def _sparse_decode_backward_weight(
    ctx: Any, grad_W: Tensor | None, grad_sum: Tensor | None
) -> Gradients:
    if grad_W is None and grad_sum is None:
        return (None,) * 5
    g, values, indices, row_offsets = ctx.saved_tensors
    dg = dv = None
    if grad_W is not None:
        need_g, need_values = ctx.needs_input_grad[:2]
        if need_g:
            dg = _op.sparse_decode(values, indices, grad_W, None, row_offsets)
        if need_values:
            dv = _op.sparse_decode_backward_values(g, indices, grad_W, row_offsets)
    if grad_sum is not None:
        from_sum = grad_sum[indices]  # [E, k]
        dv = from_sum if dv is None else dv + from_sum
    return dg, dv, None, None, None


RULES = {
    "topk": Rule(_save_topk, _topk),
    "topk_encode": Rule(_save_topk_encode, _topk_encode),
    "threshold_encode": Rule(_save_encode_rows, _encode_rows),
    "batch_topk_encode": Rule(_save_encode_rows, _encode_rows),
    "grad_topk_encode": Rule(_save_grad_topk_encode, _grad_topk_encode),
    "sparse_decode": Rule(_save_sparse_decode, _sparse_decode),
    "sparse_decode_backward_values": Rule(_save_backward_values, _sparse_decode_backward_values),
    "sparse_decode_backward_weight": Rule(_save_backward_weight, _sparse_decode_backward_weight),
}


def kernel(op: Any, name: str) -> Callable[..., Any]:
    """What torch calls where a gradient may be wanted, as `torch.library.register_autograd` makes
    it; that one would return no derivative in forward mode, silently."""
    rule = RULES[name]
    backward_mode = make_autograd_impl(op, Info(rule.backward, rule.save))
    below, no_autograd = _C._after_autograd_keyset, _C._AutoDispatchBelowAutograd

    def run(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise NotImplementedError(
                f"{name}: has no derivative in forward mode; use torch.autograd.grad or"
                " torch.func.vjp"
            )
        if not torch.is_grad_enabled():  # what it does then, in one call instead of three
            with no_autograd():
                return op.redispatch(keyset & below, *args)
        return backward_mode(keyset, *args)

    return run


def _has_tangent(arg: Any) -> bool:
    return isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None  # type: ignore[no-untyped-call]
