# SPDX-License-Identifier: Apache-2.0
"""Gradient-aware encode: x @ W_enc.T and g @ W_dec.T in two accumulators of one tile, the score in
the epilogue, the same gate and the same proof as topk_encode (gate.py). Neither product is stored.

The values are the pre-activations, which travel beside the keys. Cost: 2 + 2 p products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate import MAX_K, capacity_of, gated, guess, pick
from .product import Operands, tile_of
from .redo import redo
from .topk_encode import topk_encode


@triton.jit
def informed_kernel(
    g_ptr,  # [N, d]
    informed_ptr,  # [N] int8
    d,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether a row of the gradient says anything: not all zero, all finite."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    some = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, d, BLOCK):
        g = tl.load(g_ptr + n * d + start + c, start + c < d, 0.0).to(tl.float32)
        finite = tl.abs(g) < float("inf")
        some = some | (g != 0).to(tl.int32)
        bad = bad | (finite == 0).to(tl.int32)
    informed = (tl.max(some) != 0) & (tl.max(bad) == 0)
    tl.store(informed_ptr + n, informed.to(tl.int8))


def grad_topk_encode(
    x: Tensor,  # [N, d_in]
    grad: Tensor,  # [N, d_out] of the downstream loss, where the decoder writes
    W_enc: Tensor,  # [F, d_in]
    b_enc: Tensor,  # [F]
    W_dec: Tensor,  # [F, d_out]
    k: int,
    beta: float,
    mode: str = "additive",
    b_dec: Tensor | None = None,  # [d_in]
    *,
    tau: Tensor | None = None,  # [N] float32: a guess of the caller's, in place of the sample's
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest gradient-aware scores of each row -> values [N, k] T, indices [N, k] int64.

    With a = <W_dec[i], grad[n]> the score is u where u <= 0, elsewhere u (1 + beta |a|), u |a| or
    u (1 + beta relu(-a)) by mode ("additive", "multiplicative", "signed"). A row whose gradient is
    zero or not finite is scored by u; so are all with beta = 0 in a mode that has a beta, and then
    one product is taken. Values are relu(u), in the order of the score (arXiv 2411.10397).

    k is at most 1024; ValueError above it. `tau` and `capacity` as in `topk_encode`.
    """
    if k > MAX_K:
        raise ValueError(
            f"grad_topk_encode: k must be at most {MAX_K} in the Triton kernel, got {k}"
        )
    if beta == 0 and mode != "multiplicative":
        return topk_encode(x, W_enc, b_enc, k, b_dec, tau=tau, capacity=capacity)
    N, d_out = grad.shape
    if N == 0:
        return x.new_empty(0, k), x.new_empty(0, k, dtype=torch.int64)
    x = x if b_dec is None else x - b_dec
    grad = grad.contiguous()
    informed = grad.new_empty(N, dtype=torch.int8)
    informed_kernel[(N,)](grad, informed, d_out, BLOCK=min(1024, triton.next_power_of_2(d_out)))
    op = Operands(
        x.contiguous(),
        W_enc.contiguous(),
        b_enc.contiguous(),
        N,
        W_enc.shape[0],
        x.shape[1],
        g=grad,
        w_dec=W_dec.contiguous(),
        informed=informed,
        d_out=d_out,
        beta=float(beta),
    )
    tile = tile_of(x, carries=True)
    if tau is None:
        tau = guess(op, k, mode, tile)
    found = gated(op, tau, mode, tile, capacity or capacity_of(k, tile.f))
    redo(op, tau, found, k, mode, tile)
    return pick(found, k, x.dtype, relu=True)
