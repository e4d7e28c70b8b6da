# SPDX-License-Identifier: Apache-2.0
"""What the drop-in classes share below the surface: codes on ksae's ops.

Libraries differ in what they select by (a score) and in what passes the gradient (a gate). Both
are covered by `at`: given any selection, the pre-activations there, differentiable with sparse
gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, ops


def plain() -> bool:
    """Whether tensors are dense from the start, for a graph is being recorded."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def flat(x: Tensor) -> Tensor:
    """[..., d] -> contiguous [N, d]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def scatter(values: Tensor, indices: Tensor, F: int) -> Tensor:
    """The code with its zeros, [..., F]."""
    return values.new_zeros(*values.shape[:-1], F).scatter(-1, indices, values)


def latent_rows(p: Tensor) -> Tensor:
    """A parameter [d, F] as [F, d], one contiguous row a latent.

    The library's shape is a transposed view of that storage, so nothing is copied in a step. Where
    something gave the parameter other storage (load_state_dict with assign, .to, .data), it is laid
    out again, once; it stays the same Parameter, and optimizers keep theirs.
    """
    if not plain() and p.is_leaf and not p.T.is_contiguous():
        p.data = p.data.T.contiguous().T
    return p.T


def transposed(p: Tensor) -> nn.Parameter:
    """A new parameter of the same numbers, laid out for `latent_rows`."""
    return nn.Parameter(p.detach().T.contiguous().T)


class _At(torch.autograd.Function):
    """values = (x - b_dec) @ W_enc[indices] + b_enc[indices], computed before; the gradient is
    sparse and passes where `gate` is True (None: everywhere)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, d]
        W_enc: Tensor,  # [F, d]
        b_enc: Tensor,  # [F]
        b_dec: Tensor | None,  # [d]
        values: Tensor,  # [N, k]
        indices: Tensor,  # [N, k]
        gate: Tensor | None,  # [N, k]
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, indices, gate)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, W_enc, b_dec, indices, gate = ctx.saved_tensors
        need_x, need_W, need_b, need_b_dec = ctx.needs_input_grad[:4]
        (grad,) = grads
        grad = grad.to(x.dtype)
        dv = (grad if gate is None else torch.where(gate, grad, 0)).contiguous()
        dx = dW = db = db_dec = None
        if need_x:
            dx = ops.sparse_decode(dv, indices, W_enc)
        if need_W or need_b or need_b_dec:
            xc = x if b_dec is None else x - b_dec
            dW, db = ops.sparse_decode_backward_weight(xc, dv, indices, W_enc.shape[0])
        if need_b_dec:
            db_dec = -(W_enc.T @ db)
        return dx, dW, db, db_dec, None, None, None


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes of floats on a kind of device; None where it is off or has no meaning, as
    for meta tensors."""
    known = torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else None


def without_autocast(device: str) -> Any:
    """A block without it; no block where it is off, which a recorded graph would keep."""
    return (
        nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)
    )


def _cast(*tensors: Tensor | None) -> list[Any]:
    """Floating tensors as autocast wants them."""
    dtype = autocast_dtype(next(t.device.type for t in tensors if t is not None))
    if dtype is None:
        return list(tensors)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _detached(*tensors: Tensor | None) -> list[Any]:
    """Without gradients; a block without them would keep a recorded graph from being saved."""
    return [None if t is None else t.detach() for t in tensors]


def at(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    indices: Tensor,
    *,
    values: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Pre-activations [N, k] of x [N, d] at a selection [N, k], with sparse gradients.

    `values`, where they are known already, are not computed again; no gradient passes where `gate`
    is False.
    """
    x, W_enc, b_enc, b_dec = _cast(x, W_enc, b_enc, b_dec)
    if values is None:
        with without_autocast(x.device.type):
            plain_x, W, b, c = _detached(x, W_enc, b_enc, b_dec)
            centred = plain_x if c is None else plain_x - c
            values = ops.sparse_decode_backward_values(centred, indices, W) + b[indices]
    out: Tensor = _At.apply(x, W_enc, b_enc, b_dec, values, indices, gate)  # type: ignore[no-untyped-call]
    return out


def scaled_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    scale: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selection by u * scale, activation relu(u): values, indices [N, k].

    With scale the decoder's row norms, the scaled code over the norm is relu(u), in value and in
    gradient, so that no gradient goes through the scale.
    """
    x, W_enc, b_enc, scale, b_dec = _cast(x, W_enc, b_enc, scale, b_dec)
    with without_autocast(x.device.type):
        plain_x, W, b, n, c = _detached(x, W_enc, b_enc, scale, b_dec)
        score, indices = ops.topk_encode(plain_x, W * n[:, None], b * n, k, c, mask)
        values = torch.where(score == 0, 0, score / n[indices])  # NaN stays
    return at(x, W_enc, b_enc, b_dec, indices, values=values, gate=score > 0), indices


def signed_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest u (or u * scale) without an activation: values u, indices [N, k]."""
    plain_x, W, b, c = _detached(x, W_enc, b_enc, b_dec)
    if scale is None:
        _, indices = ops.topk_encode(plain_x, W, b, k, c, mask)
    else:
        _, indices = scaled_topk(plain_x, W, b, scale.detach(), k, c, mask)
    return at(x, W_enc, b_enc, b_dec, indices), indices


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`ksae.sparse_decode` in the weights' dtype."""
    return functional.sparse_decode(values.to(W_dec.dtype), indices, W_dec, b_dec)


@torch.no_grad()
def project_(grad: Tensor, W: Tensor) -> None:
    """Take from each row of grad [F, d] its component along the (unit) row of W [F, d]."""
    own = torch.arange(W.shape[0], device=W.device)[:, None]
    along = ops.sparse_decode_backward_values(grad, own, W)  # [F, 1], without an [F, d] product
    grad.addcmul_(along, W, value=-1)
