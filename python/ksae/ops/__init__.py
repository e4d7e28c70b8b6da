# SPDX-License-Identifier: Apache-2.0
"""The table of ops: the only place that registers anything with torch (namespace `ksae`).

An op is its meaning in reference.py, its checks in checks.py and one row at the end of this file.
The reference is the default kernel on every device; the native function of the same name, where
there is one, serves its device above it. Inputs are 2-D; kernels make them contiguous, except
written ones, which must be. The products of `topk_encode` and `sparse_decode` are closed under
differentiation: the gradient of each is made of the same ops, to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import cpu as native
from ..backends import serving as gpu
from . import checks
from .checks import accumulator

_serving: dict[str, dict[str, str]] = {}


def serving() -> dict[str, dict[str, str]]:
    """Who serves each op: {op: {device: name}}; "default" is every device not named."""
    return {name: dict(devices) for name, devices in _serving.items()}


# ------------------------------------------------------------------------------------------ kernels


def _contiguous(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.contiguous()
    if isinstance(arg, list | tuple):
        return [_contiguous(a) for a in arg]
    return arg


def _kernel(
    name: str, check: Callable[..., torch.dtype], function: Callable[..., Any], native_: bool
) -> Callable[..., Any]:
    """`function` behind the checks. Native leaves float64, the oracle's type, to the reference."""
    oracle = getattr(reference, name)
    arguments = getattr(torch.ops.ksae, name).default._schema.arguments
    writes = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def kernel(*args: Any) -> Any:
        dtype = check(*args)
        _index_range(name, args)
        serve = oracle if dtype == torch.float64 else function
        result = serve(*(map(_contiguous, args) if native_ else args))
        if result is NotImplemented:  # arguments that the kernel does not know
            result = oracle(*args)
        if writes:  # below autograd: tell it
            written = [args[i] for i in writes if i < len(args) and args[i] is not None]
            torch.autograd.graph.increment_version(written)
        return result

    return kernel


def _index_range(name: str, args: tuple[Any, ...]) -> None:
    match name:
        case "sparse_decode_backward_weight":
            checks.index_range(name, args[2], args[3])
        case "group_by_latent":
            checks.index_range(name, args[1], args[2])
        case _ if name.startswith("sparse_"):  # (values or grad, indices, W_dec, ...)
            checks.index_range(name, args[1], args[2].shape[0])


# ----------------------------------------------------------------------------------- fake functions


def _fake_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _fake_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    W_bf16: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _fake_topk(x, k)


def _fake_grad_topk_encode(
    x: Tensor,
    grad: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    k: int,
    beta: float,
    mode: str = "additive",
    b_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _fake_topk(x, k)


def _fake_topk_encode_aux(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    k_aux: int,
    dead: Tensor,
    b_dec: Tensor | None = None,
    grad: Tensor | None = None,
    W_dec: Tensor | None = None,
    beta: float = 0.0,
    mode: str = "additive",
    W_bf16: Tensor | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_fake_topk(x, k), *_fake_topk(x, k_aux))


def _fake_sparse_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None
) -> Tensor:
    return values.new_empty(values.shape[0], W_dec.shape[1])


def _fake_backward_values(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return grad.new_empty(indices.shape)


def _fake_backward_weight(
    grad: Tensor, values: Tensor, indices: Tensor, F: int
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(F, grad.shape[1]), grad.new_empty(F)


def _fake_group_by_latent(values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    entries = values.shape[0] * values.shape[1]
    return (
        values.new_empty(F + 1, dtype=torch.int32),
        values.new_empty(entries, dtype=torch.int32),
    )


def _fake_sparse_residual(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    columns: int,
    column_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    N, acc = values.shape[0], accumulator(values.dtype)
    return (
        target.new_empty(N, columns, dtype=acc),
        target.new_empty(N, dtype=torch.float64),
        target.new_empty(values.shape, dtype=acc),
    )


def _fake_sparse_residual_slice(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    return target.new_empty(values.shape[0], stop - start, dtype=accumulator(values.dtype))


def _fake_latent_sums(
    values: list[Tensor],
    grads: list[Tensor],
    offsets: list[Tensor],
    order: list[Tensor],
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    F = offsets[0].shape[0] - 1
    return scales.new_empty(F), scales.new_empty(F)


def _fake_row_grad_sq(*args: Any) -> Tensor:
    W: Tensor = args[7]
    return W.new_empty(W.shape[0], dtype=torch.float64)


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_total_variance(y: Tensor) -> Tensor:
    return y.new_empty((), dtype=accumulator(y.dtype))


def _fake_loss_terms(
    sq_errors: list[Tensor], denominators: list[Tensor], shares: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, G = denominators[0], len(shares)
    return first.new_empty(G), first.new_empty(G), first.new_empty(()), first.new_empty(G)


def _fake_adam_scalars(loss: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    taken, scales = loss.new_empty((), dtype=torch.bool), torch.empty_like(args[2])
    return loss.new_empty(8), taken, scales


# ----------------------------------------------------------------------------------------- autograd
# Saved are tensors only; a gradient that nobody asked for is None and its product is not formed.


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.F = inputs[0].shape[1]


def _backward_topk(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    (indices,) = ctx.saved_tensors
    return grad.new_zeros(grad.shape[0], ctx.F).scatter(1, indices, grad), None


def _save_topk_encode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, W_enc, _, _, b_dec, *_ = inputs
    ctx.save_for_backward(x, W_enc, b_dec, *output)


def _backward_topk_encode(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    b_dec = ctx.saved_tensors[2]
    need_x, need_W, need_b = ctx.needs_input_grad[:3]
    need_b_dec = (
        b_dec is not None and ctx.needs_input_grad[4]
    )  # the dispatcher drops default arguments
    needs = need_x, need_W, need_b, need_b_dec
    dx, dW_enc, db_enc, db_dec = _encoder_gradients(ctx.saved_tensors, grad, needs)
    return dx, dW_enc, db_enc, None, db_dec, None, None, None


def _save_grad_topk_encode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    x, _, W_enc, *_, b_dec = inputs
    ctx.save_for_backward(x, W_enc, b_dec, *output)


def _backward_grad_topk_encode(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    need_x, _, need_W, need_b = ctx.needs_input_grad[:4]
    b_dec = ctx.saved_tensors[2]
    needs = need_x, need_W, need_b, b_dec is not None and ctx.needs_input_grad[8]
    dx, dW_enc, db_enc, db_dec = _encoder_gradients(ctx.saved_tensors, grad, needs)
    # nothing through the score: not to the downstream gradient, not to W_dec
    return dx, None, dW_enc, db_enc, None, None, None, None, db_dec


def _encoder_gradients(
    saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, W_enc, b_enc and b_dec where the selection is fixed."""
    x, W_enc, b_dec, values, indices = saved
    need_x, need_W, need_b, need_b_dec = needs
    dv = torch.where(values > 0, grad, 0)  # [N, k]: a slot at zero passes nothing
    dx = dW_enc = db_enc = db_dec = None
    if need_x:
        dx = _sparse_decode(dv, indices, W_enc)
    if need_W or need_b or need_b_dec:
        xc = x if b_dec is None else x - b_dec  # [N, d]
        dW_enc, db_enc = _backward_weight(xc, dv, indices, W_enc.shape[0])
    if need_b_dec:
        db_dec = -(W_enc.T @ db_enc)
    return dx, dW_enc, db_enc, db_dec


def _save_sparse_decode(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.has_bias = inputs[3] is not None


def _backward_sparse_decode(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    values, indices, W_dec = ctx.saved_tensors
    need_values, _, need_W = ctx.needs_input_grad[:3]
    need_b = ctx.has_bias and ctx.needs_input_grad[3]
    dv = _backward_values(grad, indices, W_dec) if need_values else None
    dW_dec = _backward_weight(grad, values, indices, W_dec.shape[0])[0] if need_W else None
    return dv, None, dW_dec, grad.sum(0) if need_b else None


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])


def _backward_backward_values(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 3
    g, indices, W_dec = ctx.saved_tensors  # the op is <g[n], W_dec[indices[n, j]]>
    need_g, _, need_W = ctx.needs_input_grad
    dg = _sparse_decode(grad, indices, W_dec) if need_g else None
    return dg, None, _backward_weight(g, grad, indices, W_dec.shape[0])[0] if need_W else None


def _backward_backward_weight(
    ctx: Any, grad_W: Tensor | None, grad_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    g, values, indices = ctx.saved_tensors
    dg = dv = None
    if grad_W is not None:
        need_g, need_values, _, _ = ctx.needs_input_grad
        dg = _sparse_decode(values, indices, grad_W) if need_g else None
        dv = _backward_values(g, indices, grad_W) if need_values else None
    if grad_sum is not None:
        from_sum = grad_sum[indices]  # [N, k]
        dv = from_sum if dv is None else dv + from_sum
    return dg, dv, None, None


# --------------------------------------------------------------------------------------------- vmap


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """A per-row argument with its batch dimension folded into the rows: [size * N, ...]."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _by_row(op: str, rows: tuple[int, ...]) -> Callable[..., Any]:
    """vmap rule of an op whose output rows depend on the rows of arguments `rows` alone."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        for i, dim in enumerate(in_dims):
            if dim is not None and i not in rows:
                arg = getattr(torch.ops.ksae, op).default._schema.arguments[i].name
                raise ValueError(f"{op}: {arg} must be unbatched under vmap, got a batch of it")
        size = info.batch_size
        folded = [
            _fold(a, in_dims[i], size).contiguous() if i in rows else a for i, a in enumerate(args)
        ]
        out = getattr(torch.ops.ksae, op).default(*folded)
        if isinstance(out, Tensor):
            return _unfold(out, size), 0
        return tuple(_unfold(t, size) for t in out), (0,) * len(out)

    return rule


def _unfold(t: Tensor, size: int) -> Tensor:
    return t.reshape(size, t.shape[0] // size, *t.shape[1:])


def _backward_weight_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """A batch of weight gradients: batch b owns the latents [b*F, (b+1)*F)."""
    size, F = info.batch_size, args[3]
    grad, values, indices = (
        a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
        for a, dim in zip(args[:3], in_dims[:3], strict=True)
    )
    own = F * torch.arange(size, device=indices.device)[:, None, None]
    folded = (t.flatten(0, 1).contiguous() for t in (grad, values, indices + own))
    grad_W, value_sum = _backward_weight(*folded, size * F)
    return (_unfold(grad_W, size), _unfold(value_sum, size)), (0, 0)


def _total_variance_vmap(info: Any, in_dims: tuple[Any, ...], y: Tensor) -> Any:
    return torch.stack([total_variance(rows) for rows in y.movedim(in_dims[0], 0)]), 0


def _refuse_vmap(op: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise NotImplementedError(f"{op}: has no meaning under vmap; call it once per batch entry")

    return refuse


# ------------------------------------------------------------------------------------- registration


def _autocast(op: Any, device: str, cast: bool) -> Callable[..., Any]:
    """Under autocast: cast floating inputs (not float64) if `cast`; off inside the op.

    What is kept of float32 weights is not that of cast ones, and dropped.
    """
    of_float32 = {"W_bf16", "norms"} if cast else set()
    dropped = [a.name in of_float32 for a in op._schema.arguments]

    def to(arg: Any, dtype: torch.dtype) -> Any:
        floating = isinstance(arg, Tensor) and arg.is_floating_point()
        return arg.to(dtype) if floating and arg.dtype != torch.float64 else arg

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            args = tuple(None if drop else a for a, drop in zip(args, dropped, strict=False))
            return op(*(to(a, dtype) if cast else a for a in args))

    return kernel


def _op(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    autocast: bool = False,
) -> Any:
    """Register one op: kernels, shapes, gradient, vmap and autocast."""
    qualified = f"ksae::{name}"
    check = getattr(checks, name)
    torch.library.define(qualified, schema)
    op = getattr(torch.ops.ksae, name).default

    default = _kernel(name, check, getattr(reference, name), native_=False)
    torch.library.register_kernel(qualified, None, default)
    _serving[name] = {"default": "reference"}
    if native.available() and hasattr(native, name):
        torch.library.register_kernel(
            qualified, "cpu", _kernel(name, check, getattr(native, name), native_=True)
        )
        _serving[name]["cpu"] = "native"
    if (on_gpu := gpu.kernel(name)) is not None:
        served = _kernel(name, check, on_gpu[0], native_=True)
        torch.library.register_kernel(qualified, "cuda", served)
        _serving[name]["cuda"] = on_gpu[1]

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    torch.library.register_fake(qualified, checked_fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=save)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap)
    else:
        torch.library.impl(qualified, "FuncTorchBatched", _refuse_vmap(name))
    for device in ("cpu", "cuda"):
        rule = _autocast(op, device, autocast)
        torch.library.impl(qualified, f"Autocast{device.upper()}", rule)
    return op


topk = _op(
    "topk",
    "(Tensor x, int k) -> (Tensor values, Tensor indices)",
    fake=_fake_topk,
    save=_save_topk,
    backward=_backward_topk,
    vmap=_by_row("topk", (0,)),
)
topk_encode = _op(
    "topk_encode",
    "(Tensor x, Tensor W_enc, Tensor b_enc, int k, Tensor? b_dec=None, Tensor? mask=None,"
    " Tensor? W_bf16=None, Tensor? norms=None) -> (Tensor values, Tensor indices)",
    fake=_fake_topk_encode,
    save=_save_topk_encode,
    backward=_backward_topk_encode,
    vmap=_by_row("topk_encode", (0,)),
    autocast=True,
)
grad_topk_encode = _op(
    "grad_topk_encode",
    "(Tensor x, Tensor grad, Tensor W_enc, Tensor b_enc, Tensor W_dec, int k, float beta,"
    ' str mode="additive", Tensor? b_dec=None) -> (Tensor values, Tensor indices)',
    fake=_fake_grad_topk_encode,
    save=_save_grad_topk_encode,
    backward=_backward_grad_topk_encode,
    vmap=_by_row("grad_topk_encode", (0, 1)),
    autocast=True,
)
topk_encode_aux = _op(
    "topk_encode_aux",
    "(Tensor x, Tensor W_enc, Tensor b_enc, int k, int k_aux, Tensor dead, Tensor? b_dec=None,"
    ' Tensor? grad=None, Tensor? W_dec=None, float beta=0.0, str mode="additive",'
    " Tensor? W_bf16=None, Tensor? norms=None)"
    " -> (Tensor values, Tensor indices, Tensor aux_values, Tensor aux_indices)",
    fake=_fake_topk_encode_aux,
)
_sparse_decode = sparse_decode = _op(
    "sparse_decode",
    "(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec=None) -> Tensor",
    fake=_fake_sparse_decode,
    save=_save_sparse_decode,
    backward=_backward_sparse_decode,
    vmap=_by_row("sparse_decode", (0, 1)),
    autocast=True,
)
_backward_values = sparse_decode_backward_values = _op(
    "sparse_decode_backward_values",
    "(Tensor grad, Tensor indices, Tensor W_dec) -> Tensor",
    fake=_fake_backward_values,
    save=_save_inputs,
    backward=_backward_backward_values,
    vmap=_by_row("sparse_decode_backward_values", (0, 1)),
)
_backward_weight = sparse_decode_backward_weight = _op(
    "sparse_decode_backward_weight",
    "(Tensor grad, Tensor values, Tensor indices, int F) -> (Tensor, Tensor)",
    fake=_fake_backward_weight,
    save=_save_inputs,
    backward=_backward_backward_weight,
    vmap=_backward_weight_vmap,
)
group_by_latent = _op(
    "group_by_latent",
    "(Tensor values, Tensor indices, int F) -> (Tensor offsets, Tensor order)",
    fake=_fake_group_by_latent,
)
sparse_residual = _op(
    "sparse_residual",
    "(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec, Tensor target, int columns,"
    " Tensor(a!)? column_sums=None) -> (Tensor residual, Tensor sq_error, Tensor grad_values)",
    fake=_fake_sparse_residual,
)
sparse_residual_slice = _op(
    "sparse_residual_slice",
    "(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec, Tensor target, int start,"
    " int stop) -> Tensor",
    fake=_fake_sparse_residual_slice,
)
latent_sums = _op(
    "latent_sums",
    "(Tensor[] values, Tensor[] grads, Tensor[] offsets, Tensor[] order, Tensor scales)"
    " -> (Tensor grad_b_enc, Tensor grad_dot_w)",
    fake=_fake_latent_sums,
)
_ROWS = (
    "Tensor[] coefficients, Tensor[] offsets, Tensor[] order, Tensor[] rows, Tensor scales,"
    " Tensor? centre"
)
row_grad_sq = _op(
    "row_grad_sq",
    f"({_ROWS}, Tensor? grad_dot_w, Tensor W, int start) -> Tensor grad_sq",
    fake=_fake_row_grad_sq,
)
row_update = _op(
    "row_update",
    f"({_ROWS}, Tensor(f!)? grad_dot_w, Tensor? grad_b_enc, Tensor(a!) W, Tensor(b!)? master,"
    " Tensor(c!) m, Tensor(d!) v, Tensor hyper, Tensor(e!)? grad_b_dec, int start, bool normalize,"
    " Tensor(g!)? W_bf16=None, Tensor? rng_state=None, Tensor(h!)? norms=None) -> ()",
    fake=_fake_nothing,
)
total_variance = _op(
    "total_variance",
    "(Tensor y) -> Tensor",
    fake=_fake_total_variance,
    vmap=_total_variance_vmap,
)
loss_terms = _op(
    "loss_terms",
    "(Tensor[] sq_errors, Tensor[] denominators, float[] shares)"
    " -> (Tensor errors, Tensor terms, Tensor loss, Tensor scales)",
    fake=_fake_loss_terms,
)
adam_scalars = _op(
    "adam_scalars",
    "(Tensor loss, Tensor? norm, float? clip_norm, Tensor scales, Tensor lr, Tensor t,"
    " Tensor constants) -> (Tensor hyper, Tensor taken, Tensor taken_scales)",
    fake=_fake_adam_scalars,
)
vector_update = _op(
    "vector_update",
    "(Tensor[] grads, Tensor? scales, Tensor? minus, Tensor taken, Tensor hyper, Tensor(a!) p,"
    " Tensor(b!)? master, Tensor(c!) m, Tensor(d!) v) -> ()",
    fake=_fake_nothing,
)
