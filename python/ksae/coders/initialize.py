# SPDX-License-Identifier: Apache-2.0
"""The start of training, from a sample of activations (arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import accumulator
from .coder import SparseCoder


@torch.no_grad()
def geometric_median(x: Tensor, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """The point with the smallest sum of distances to the rows of x [N, d] -> [d], in float32
    (float64).

    Weiszfeld's iteration from the mean. At a point that coincides with rows of x, where 1/distance
    has no value, it takes the step of Vardi and Zhang (2000). Ends when a step is shorter than
    `tol` times the mean distance.

    Raises:
        ValueError: x is not a matrix with rows, or not finite.
    """
    if x.dim() != 2 or x.shape[0] == 0:
        got = list(x.shape)
        raise ValueError(f"geometric_median: x must be of shape [N, d] with N >= 1, got {got}")
    x = x.to(accumulator(x.dtype))
    if not x.isfinite().all():
        raise ValueError("geometric_median: x must be finite, got an infinite or NaN entry")
    guess = x.mean(0)
    for _ in range(max_iter):
        distance = torch.cdist(guess[None], x, compute_mode="donot_use_mm_for_euclid_dist")[0]
        here = distance == 0
        weight = torch.where(here, 0, 1 / distance)  # [N]
        total = weight.sum()
        if total == 0:  # every row is here
            break
        away = weight @ x / total  # where the other rows pull
        pull = (away - guess).norm() * total
        stay = (
            (here.sum() / pull).clamp(max=1) if here.any() and pull > 0 else here.any().to(x.dtype)
        )
        new = stay * guess + (1 - stay) * away
        moved = (new - guess).norm()
        guess = new
        if moved <= tol * distance.mean():
            break
    return guess


@torch.no_grad()
def is_new(model: SparseCoder) -> bool:
    """Whether the parameters are as the constructor left them: biases 0, and a decoder that is that
    of an SAE's encoder or a transcoder's 0. A loaded or trained model is not, nor one whose weights
    somebody has set."""
    if model.b_enc.any() or model.b_dec.any():
        return False
    if model.centred:
        return torch.equal(model.W_dec, model.W_enc)
    return not (model.W_dec.any() or (model.W_skip is not None and model.W_skip.any()))


@torch.no_grad()
def initialize_from(
    model: SparseCoder, x: Tensor, y: Tensor | None = None, *, encoder_scale: float = 0.1
) -> None:
    """Set the biases from a sample x [..., d_in] (and y [..., d_out]), before training.

    TopKSAE: b_dec is the geometric median of x, and W_enc = encoder_scale * W_dec if it is W_dec,
    as the constructor leaves it: short rows turn faster towards the data at the same learning rate,
    and k of them reconstruct too little at first, not too much. 1 leaves it; so do activations with
    a penalty (JumpReLU, ReLU, Gated), which choose by the size of values. Transcoder: b_dec is the
    mean of y, and b_enc = -W_enc mean(x), so that the pre-activations start centred.

    Raises:
        ValueError: shapes that do not fit, an empty or non-finite sample, no y for a transcoder, or
            encoder_scale not a finite number above 0.
    """
    if not 0 < encoder_scale < float("inf"):
        want = "a finite number above 0"
        raise ValueError(f"initialize_from: encoder_scale must be {want}, got {encoder_scale}")
    rows = model.rows("x", x, model.d_in)
    if model.centred:
        model.b_dec.copy_(geometric_median(rows))
        if torch.equal(model.W_enc, model.W_dec) and not model.activation.penalized:
            model.W_enc.mul_(encoder_scale)
        return
    target = model.targets(x, rows, y)
    if target is None:
        raise ValueError("initialize_from: y must be given for a transcoder, got None")
    acc = accumulator(rows.dtype)
    for arg, sample in (("x", rows), ("y", target)):
        if sample.shape[0] == 0 or not sample.isfinite().all():
            raise ValueError(
                f"initialize_from: {arg} must be a finite sample of at least one row,"
                f" got shape {list(sample.shape)}"
            )
    model.b_dec.copy_(target.mean(0, dtype=acc))
    model.b_enc.copy_(-(model.W_enc.to(acc) @ rows.mean(0, dtype=acc)))
