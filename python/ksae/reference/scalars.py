# SPDX-License-Identifier: Apache-2.0
"""Small ops of a step: variance, loss terms, Adam's scalars, the update of a vector, counters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtypes import accumulator

__all__ = ["adam_scalars", "count_tokens", "loss_terms", "total_variance", "vector_update"]


def total_variance(y: Tensor) -> Tensor:
    """sum (y - mean over the batch of y)^2: y [N, d] T -> [] float32; the denominator of the FVU.

    Centred before squaring: activations have dimensions whose mean is far larger than their spread.
    """
    acc = accumulator(y.dtype)
    pieces = torch.split(y, 512)  # a training step has no room for a second [N, d]
    mean = torch.stack([rows.sum(0, dtype=acc) for rows in pieces]).sum(0) / len(y)  # [d]
    norms = torch.cat([torch.linalg.vector_norm(rows - mean, dim=1) for rows in pieces])  # [N]
    return norms.double().square().sum().to(acc)


def loss_terms(
    sq_errors: Sequence[Tensor],  # G of [N] float64, from sparse_residual
    denominators: Sequence[Tensor],  # G of [] float32
    shares: Sequence[float],  # G: what each term counts in the loss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of a loss: error / denominator each, where error is the sum of sq_errors.

    Returns:
        errors [G], terms [G], loss [] and scales [G], float32: loss = sum of shares * terms, and
        dloss/drecon = scales * residual in each term. A term after the first whose denominator is
        not positive counts nothing: it has nothing to predict.
    """
    below = torch.stack(list(denominators))
    weights = 1 / below
    weights[1:] = torch.where(below[1:] > 0, weights[1:], 0)
    errors = torch.stack([e.sum() for e in sq_errors]).to(below.dtype)
    terms = errors * weights
    share = torch.tensor(shares, dtype=below.dtype, device=below.device)
    return errors, terms, (share * terms).sum(), 2 * share * weights


def adam_scalars(
    loss: Tensor,  # [] float32
    norm: Tensor | None,  # [] float32: of all gradients, with clip_norm
    clip_norm: float | None,
    scales: Tensor,  # [G] float32
    lr: Tensor,  # [] float64
    t: Tensor,  # [] float64: steps taken before this one
    constants: Tensor,  # [3] float64: beta1, beta2, eps
    decoder_lr: float = 1.0,  # the rate of the decoder as a multiple of lr
    always: bool = False,  # gradients are scaled to clip_norm, also smaller ones
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers of one step of Adam, without a look at the loss from outside of the device.

    Returns:
        hyper [8] float32: what the row pass takes; [] bool whether the step is taken: loss and norm
        are finite; scales [G] float32: as they were, or NaN for a step that is not taken; hyper of
        the decoder.
    """
    taken, grad_scale = loss.isfinite(), torch.ones_like(loss)
    if norm is not None and clip_norm is not None:
        taken = taken & norm.isfinite()
        if always:
            grad_scale = scale_to(clip_norm, norm)
        else:
            grad_scale = (clip_norm / (norm + 1e-6)).clamp(max=1)
    betas, eps = constants[:2], constants[2:]
    bc1, bc2 = (1 - betas ** (t + 1)).unbind()
    first = torch.stack([lr / bc1, bc2.sqrt()])
    hyper = torch.cat([first, betas, eps, grad_scale.double()[None], 1 - betas]).to(scales.dtype)
    decoder = hyper.clone()
    decoder[0] *= decoder_lr
    return hyper, taken, torch.where(taken, scales, torch.nan), decoder


def scale_to(length: float, norm: Tensor) -> Tensor:
    """The factor that takes gradients of global norm `norm` [] to `length`; finite where the norm
    is 0, so that gradients of 0 stay 0."""
    limits = torch.finfo(norm.dtype)
    return (length / norm.clamp(min=limits.tiny)).clamp(max=limits.max)


def vector_update(
    grads: Sequence[Tensor],  # G of p's shape, float32
    scales: Tensor | None,  # [G] float32
    minus: Tensor | None,  # of p's shape, float32
    taken: Tensor,  # [] bool: nothing is written if it is False
    hyper: Tensor,  # [8] float32, as the row pass takes it
    p: Tensor,  # [...] T
    master: Tensor | None,  # of p's shape, float32, where T is not float32
    m: Tensor,  # of p's shape, float32
    v: Tensor,  # of p's shape, float32
) -> None:
    """Adam of one dense parameter, in place. Its gradient: sum of scales * grads, less `minus`."""
    factors: Sequence[Tensor | int] = [1] * len(grads) if scales is None else scales.unbind()
    g = sum((s * t for s, t in zip(factors[1:], grads[1:], strict=True)), factors[0] * grads[0])
    if minus is not None:
        g = g - minus
    step, root_bc2, b1, b2, eps, grad_scale, rest1, rest2 = hyper
    theta = p if master is None else master
    g = g * grad_scale
    m_new = b1 * m + rest1 * g
    v_new = b2 * v + rest2 * g * g
    moved = theta - step * m_new / (v_new.sqrt() / root_bc2 + eps)
    for old, new in ((m, m_new), (v, v_new), (theta, moved)):
        old.copy_(torch.where(taken, new, old))
    if master is not None:
        p.copy_(torch.where(taken, master.to(p.dtype), p))


def count_tokens(
    loss: Tensor,  # [] float32: whose type the shares have
    taken: Tensor,  # [] bool: nothing is written if it is False
    offsets: Tensor,  # [F+1] int32, from group_by_latent
    since: Tensor,  # [F] int64: tokens since each latent fired, written
    t: Tensor,  # [] float64: steps taken, written
    tokens: int,  # of this step
    dead_after: int,
    within: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The counters of a step, after it.

    Returns:
        l0 [] float32: entries a token; dead [] float32: the share of latents that were dead before
        the step, which have not fired for more than dead_after tokens; soon [] int64: how many may
        be dead after `within` more tokens.
    """
    dead = (since > dead_after).sum()
    fired = offsets[1:] > offsets[:-1]
    since.add_(taken, alpha=tokens).masked_fill_(fired & taken, 0)
    t += taken
    soon = (since > dead_after - within).sum()
    return offsets[-1].to(loss.dtype) / tokens, dead.to(loss.dtype) / len(since), soon
