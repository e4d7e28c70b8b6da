# SPDX-License-Identifier: Apache-2.0
"""The gradient and the update of one latent's row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decode import sparse_decode_backward_weight
from .group import _ungroup
from .rounding import stochastic_bfloat16

__all__ = ["bf16_norms", "row_grad_sq", "row_update"]


def _row_gradient(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    along: Tensor | None,
    W: Tensor,
    start: int,
    row_of: Sequence[Tensor] | None,
) -> Tensor:
    """Gradient of columns [start, start + columns) of W: [F, columns] in the accumulator's type."""
    acc, F = scales.dtype, W.shape[0]
    gradient = torch.zeros(F, rows[0].shape[1], dtype=acc, device=W.device)
    for g, (c, off, o, r) in enumerate(zip(coefficients, offsets, order, rows, strict=True)):
        row, scale = r.to(acc), scales[g]
        if centre is not None:
            row = row - centre.to(acc)
        if row_of is not None:  # entries in flat order: each a token of one entry
            c, row = c.reshape(-1, 1), row[row_of[g]]
        gradient += sparse_decode_backward_weight(
            row, scale * c.to(acc), _ungroup(off, o, c.shape), F
        )[0]
    if along is not None:
        gradient -= along[:, None] * W[:, start : start + gradient.shape[1]].to(acc)
    return gradient


def _along(grad_dot_w: Tensor | None, W: Tensor) -> Tensor | None:
    """The gradient along each row in units of the row: grad_dot_w / |W[i]|^2, 0 for a zero row."""
    if grad_dot_w is None:
        return None
    square = W.to(grad_dot_w.dtype).square().sum(1)
    return torch.where(square > 0, grad_dot_w / square, 0)


def row_grad_sq(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    grad_dot_w: Tensor | None,
    W: Tensor,
    start: int,
    row_of: Sequence[Tensor] | None = None,
) -> Tensor:
    """Row sums of squares of the gradient of `row_update`, before grad_scale: [F] float64.

    Zeros if a scale is not finite.
    """
    if not bool(scales.isfinite().all()):
        return torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
    along = _along(grad_dot_w, W)
    groups = (coefficients, offsets, order, rows)
    gradient = _row_gradient(*groups, scales, centre, along, W, start, row_of)
    return gradient.double().square().sum(1)


def row_update(
    # G of [N, k_g], or [N_g, k_g] with row_of: for the encoder the values' gradients float32, for
    # the decoder the values T
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],  # G of [F+1] int32, from group_by_latent
    order: Sequence[Tensor],  # G of [N*k_g] int32
    # G of [N, columns]: for the encoder x T, for the decoder columns of the residual float32
    rows: Sequence[Tensor],
    scales: Tensor,  # [G] float32: dL/drecon = scale * residual
    centre: Tensor | None,  # [columns] T, subtracted from rows (encoder)
    # [F] float32, <gradient, W[i]> over all columns, 0 without entries; None: no projection
    grad_dot_w: Tensor | None,
    grad_b_enc: Tensor | None,  # [F] float32, with grad_b_dec, 0 without entries
    W: Tensor,  # [F, d] T, written in columns [start, start + columns)
    master: Tensor | None,  # [F, d] float32 where T is not float32
    m: Tensor,  # [F, d] float32
    v: Tensor,  # [F, d] float32
    # [8] float32: lr/bc1, sqrt(bc2), beta1, beta2, eps, grad_scale, 1 - beta1, 1 - beta2
    hyper: Tensor,
    grad_b_dec: Tensor | None,  # [d] float32, written: W.T @ grad_b_enc with W as it was
    start: int,
    normalize: bool,
    W_bf16: Tensor | None = None,  # [F, d] bfloat16 copy of a float32 W, written with it
    # [2] int64, seed and step: W (without a master), m and v are bfloat16, rounded stochastically
    rng_state: Tensor | None = None,
    norms: Tensor | None = None,  # [3, F] float32 of `bf16_norms`, written with a bf16 copy
    # G of [N_g*k_g] int32: the row of each entry, where codes have row offsets (`rows_of`)
    row_of: Sequence[Tensor] | None = None,
) -> None:
    """Gradient, projection and Adam of the rows of one matrix, in place; then, if asked, unit rows.

    gradient_i = sum over groups and entries of scale * coefficient * (row_n - centre), less
    grad_dot_w_i / |W_i|^2 W_i. W_i is the row of T that the forward used, not its master. A latent
    without an entry has gradient 0 and still moves (dense Adam). Where the columns are a slice, the
    slice that starts at 0 comes first and divides `grad_dot_w` by |W_i|^2 in place: later slices
    see W half updated. A scale that is not finite writes nothing but zeros into grad_b_dec.

    With rng_state, m, v and W are rounded by draws 0, 1 and 2 of `stochastic_bfloat16`, and unit
    rows, which are taken of the rounded W, by draw 3. Norms need all columns of W in one call.
    """
    if not bool(scales.isfinite().all()):
        if grad_b_dec is not None:
            grad_b_dec.zero_()
        return
    along = _along(grad_dot_w, W) if start == 0 else grad_dot_w
    if (
        grad_dot_w is not None
        and along is not None
        and start == 0
        and rows[0].shape[1] < W.shape[1]
    ):
        grad_dot_w.copy_(along)
    groups = (coefficients, offsets, order, rows)
    g = _row_gradient(*groups, scales, centre, along, W, start, row_of)
    if grad_b_dec is not None and grad_b_enc is not None:
        grad_b_dec.copy_(W.to(scales.dtype).T @ grad_b_enc)
    theta = W if master is None else master
    part = slice(start, start + g.shape[1])
    # 1 - beta2 comes rounded from float64: in float32 it would be off by 1e-5
    step, root_bc2, b1, b2, eps, grad_scale, rest1, rest2 = hyper
    g = g * grad_scale
    m_new = b1 * m[:, part].to(g.dtype) + rest1 * g
    v_new = b2 * v[:, part].to(g.dtype) + rest2 * g * g
    moved = theta[:, part].to(g.dtype) - step * m_new / (v_new.sqrt() / root_bc2 + eps)
    rounded = [m_new, v_new, moved]
    if rng_state is not None:
        rounded = [stochastic_bfloat16(t, rng_state, i, start) for i, t in enumerate(rounded)]
    m[:, part], v[:, part], theta[:, part] = rounded
    if normalize:
        norm = theta.double().norm(dim=1, keepdim=True).to(g.dtype)
        unit = theta / torch.where(norm > 0, norm, 1)
        theta.copy_(unit if rng_state is None else stochastic_bfloat16(unit, rng_state, 3, 0))
    if master is not None:
        W.copy_(master)
    if W_bf16 is not None:
        W_bf16.copy_(W)
        if norms is not None:
            norms.copy_(bf16_norms(W, W_bf16))


def bf16_norms(W: Tensor, W_bf16: Tensor) -> Tensor:
    """Upper bounds [3, F] float32 of the norms of the rows of W [F, d] float32, of what its copy in
    bfloat16 lost and of the copy; an encode may screen by them.

    A kernel's bounds are others: at most 1 + 2^-16 + d 2^-22 times the norm, plus sqrt(d) 2^-62.
    The three of a row are infinite where it has a NaN or the first is above 2^60: a float32 sum of
    squares might overflow.
    """
    wide, copy = W.double(), W_bf16.double()
    norms = torch.stack([t.norm(dim=1) for t in (wide, wide - copy, copy)])
    bounds = norms * (1 + 2.0**-18) + 2.0**-126  # and then rounded to float32
    return torch.where(bounds[0] <= 2.0**60, bounds, torch.inf).float()
