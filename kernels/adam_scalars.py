# SPDX-License-Identifier: Apache-2.0
"""What Adam's passes want to know of a step: bias corrections, clipping, whether it is taken.

One program: it replaces tens of launches on single numbers.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal number
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _rest(beta, t):
    """1 - beta^t in float64, for t > 0."""
    return 1 - tl.where(beta > 0, tl.exp(t * tl.log(tl.where(beta > 0, beta, 1.0))), 0.0)


@triton.jit
def _store(hyper_ptr, rate, root, beta1, beta2, eps, grad_scale):
    tl.store(hyper_ptr, rate)
    tl.store(hyper_ptr + 1, root.to(tl.float32))
    tl.store(hyper_ptr + 2, beta1.to(tl.float32))
    tl.store(hyper_ptr + 3, beta2.to(tl.float32))
    tl.store(hyper_ptr + 4, eps.to(tl.float32))
    tl.store(hyper_ptr + 5, grad_scale)
    tl.store(hyper_ptr + 6, (1 - beta1).to(tl.float32))
    tl.store(hyper_ptr + 7, (1 - beta2).to(tl.float32))


@triton.jit
def adam_kernel(
    loss_ptr,
    norm_ptr,  # or None
    clip_norm,
    scales_ptr,  # [SCALES]
    lr_ptr, t_ptr, constants_ptr,  # float64
    hyper_ptr,  # [8]
    taken_ptr,  # int8
    taken_scales_ptr,  # [SCALES]
    of_decoder_ptr,  # [8]
    decoder_lr,
    SCALES: tl.constexpr, ALWAYS: tl.constexpr,
):  # fmt: skip
    beta1 = tl.load(constants_ptr)
    beta2 = tl.load(constants_ptr + 1)
    t = tl.load(t_ptr) + 1
    taken = tl.abs(tl.load(loss_ptr)) < float("inf")
    grad_scale = tl.full((), 1.0, tl.float32)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        taken = taken & (tl.abs(norm) < float("inf"))
        wide = clip_norm + tl.zeros_like(norm)
        if ALWAYS:
            limit = tl.div_rn(wide, tl.where(norm < TINY, TINY, norm))  # NaN stays
            grad_scale = tl.where(limit > LARGEST, LARGEST, limit)
        else:
            limit = tl.div_rn(wide, norm + 1e-6)
            grad_scale = tl.where(limit > 1, 1.0, limit)
    rate = (tl.load(lr_ptr) / _rest(beta1, t)).to(tl.float32)
    root, eps = tl.sqrt(_rest(beta2, t)), tl.load(constants_ptr + 2)
    _store(hyper_ptr, rate, root, beta1, beta2, eps, grad_scale)
    _store(of_decoder_ptr, rate * decoder_lr, root, beta1, beta2, eps, grad_scale)
    tl.store(taken_ptr, taken.to(tl.int8))
    for g in tl.static_range(SCALES):
        tl.store(taken_scales_ptr + g, tl.where(taken, tl.load(scales_ptr + g), float("nan")))


def adam_scalars(
    loss: Tensor,
    norm: Tensor | None,
    clip_norm: float | None,
    scales: Tensor,
    lr: Tensor,
    t: Tensor,
    constants: Tensor,
    decoder_lr: float = 1.0,
    always: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference: hyper, whether the step is taken, the scales if so, and the decoder's."""
    hyper, taken_scales = loss.new_empty(8), torch.empty_like(scales)
    of_decoder = torch.empty_like(hyper)
    taken = loss.new_empty((), dtype=torch.bool)
    adam_kernel[(1,)](
        loss, norm, float(clip_norm or 0), scales, lr, t, constants, hyper, taken.view(torch.int8),
        taken_scales, of_decoder, float(decoder_lr), SCALES=scales.numel(), ALWAYS=always,
        num_warps=1,
    )  # fmt: skip
    return hyper, taken, taken_scales, of_decoder
