# SPDX-License-Identifier: Apache-2.0
"""Encode without the N x F matrix: a product whose epilogue keeps what can be among the k largest.

The algorithm and its cost are told in gate.py, the tile and its epilogue in product.py. Three
entries: the k largest of each row, the k largest a row of the whole batch (BatchTopK), and, for
callers who want every pre-activation, the matrix with maxima of groups of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gate import MAX_K, capacity_of, gated, guess, pick, redo
from .product import Operands, tile_of

ACTIVATIONS = ("relu", "none", "abs")


def _check(op: str, k: int, activation: str) -> None:
    if k > MAX_K:
        raise ValueError(f"{op}: k must be at most {MAX_K} in the Triton kernel, got {k}")
    if activation not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {expected}, got {activation!r}")


def _operands(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    theta: Tensor | None,
) -> Operands:
    x = x if b_dec is None else x - b_dec
    return Operands(
        x.contiguous(),
        W_enc.contiguous(),
        b_enc.contiguous(),
        x.shape[0],
        W_enc.shape[0],
        x.shape[1],
        scale=None if scale is None else scale.float().contiguous(),
        mask=None if mask is None else mask.contiguous().view(torch.int8),
        theta=None if theta is None else theta.float().contiguous(),
    )


def topk_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    k: int,
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool
    *,
    activation: str = "relu",
    scale: Tensor | None = None,  # [F]
    theta: Tensor | None = None,  # [F]
    tau: Tensor | None = None,  # [N] float32: a guess of the caller's, in place of the sample's
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row -> values [N, k] T, indices [N, k] int64.

    With u = ((x - b_dec) @ W_enc.T + b_enc) * scale, a score is u, or |u| with "abs"; it is -inf
    where mask is False and where u <= theta (JumpReLU: at most k of a row). Values are relu(u), or
    u itself with "none" and "abs", and 0 where the score is -inf.

    Args:
        x, W_enc, b_enc, b_dec: float32, bfloat16 or float16, all of one dtype T.
        k: at most 1024; ValueError above it.
        activation: "relu", "none" or "abs".
        scale, theta: of any floating dtype; used in float32.
        tau, capacity: change the way, never the result: any guess is verified by the count. The
            capacity is a power of two, at least k plus a tile of latents.

    Numerics: sums in float32 whatever T, and so is the selection. Order as in `ksae.topk`.
    """
    _check("topk_encode", k, activation)
    if x.shape[0] == 0:
        return x.new_empty(0, k), x.new_empty(0, k, dtype=torch.int64)
    op, tile = _operands(x, W_enc, b_enc, b_dec, mask, scale, theta), tile_of(x)
    score = "abs" if activation == "abs" else "plain"
    if tau is None:
        tau = guess(op, k, score, tile)
    found = gated(op, tau, score, tile, capacity or capacity_of(k, tile.f))
    redo(op, tau, found, k, score, tile)
    return pick(found, k, x.dtype, activation == "relu")
