# SPDX-License-Identifier: Apache-2.0
"""Encode without the N x F matrix: a product whose epilogue keeps what can be among the k largest.

The algorithm and its cost are told in gate.py, the tile and its epilogue in product.py. Three
entries: the k largest of each row, the k largest a row of the whole batch (BatchTopK), and, for
callers who want every pre-activation, the matrix with maxima of groups of columns.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .gate import LOWEST, MAX_K, capacity_of, gated, guess, maxima_kernel, pick
from .product import Operands, tile_of
from .redo import redo

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
    op = _operands(x, W_enc, b_enc, b_dec, mask, scale, theta)
    score = "abs" if activation == "abs" else "plain"
    tile = tile_of(x, carries=score == "abs")
    if tau is None:
        tau = guess(op, k, score, tile)
    found = gated(op, tau, score, tile, capacity or capacity_of(k, tile.f))
    redo(op, tau, found, k, score, tile)
    return pick(found, k, x.dtype, activation == "relu")


def dense_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool
    *,
    activation: str = "relu",
    scale: Tensor | None = None,  # [F]
    theta: Tensor | None = None,  # [F]
    group: int = 64,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The value of every latent, and the best score of each group of latents.

    The k-th largest maximum of a row is a lower bound of its k-th score, and each of the k largest
    scores lies in a group whose maximum reaches it: a selection need not read the other groups.

    Args:
        group: consecutive latents that share a maximum; a power of two, at most 64.
        dtype: of the values; x's by default.
        others: as in `topk_encode`.

    Returns:
        values [N, F], as `topk_encode` would return them; maxima [N, ceil(F / group)] float32.
    """
    if group not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError(f"dense_encode: group must be a power of two up to 64, got {group}")
    _check("dense_encode", 1, activation)
    op = _operands(x, W_enc, b_enc, b_dec, mask, scale, theta)
    tile = tile_of(x, carries=activation == "abs")
    values = x.new_empty(op.N, op.F, dtype=dtype or x.dtype)
    maxima = x.new_empty(op.N, triton.cdiv(op.F, group), dtype=torch.float32)
    tiles = triton.cdiv(op.F, tile.f)
    if op.N:
        maxima_kernel[(triton.cdiv(op.N, tile.n) * tiles,)](
            op, maxima, values, tiles, maxima.shape[1], 1,
            SCORE="abs" if activation == "abs" else "plain",
            RELU=activation == "relu", GROUP=group, **tile.meta(),
        )  # fmt: skip
    return values, maxima


def batch_topk_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    k: int,
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool
    *,
    most: int | None = None,
    scale: Tensor | None = None,  # [F]
    tau: Tensor | None = None,  # [] float32: a guess of the caller's, as of the batch before
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The N k largest scores of the batch, at most `most` of one row (BatchTopK, arXiv 2412.06410).

    Scores, `mask` and `scale` as in `topk_encode`; of equal scores the earlier row, then the
    smaller latent.

    Args:
        k: latents a row on average.
        most: latents of one row at most, in [k, 1024]; 4 k by default.
        tau: a guess somewhat below the threshold of this batch. Any guess is verified: where fewer
            than N k scores reach it, each row's `most` best are found anew.

    Returns:
        values [N, most] T: relu of the selected scores, sorted within a row; 0 elsewhere.
        indices [N, most] int64: distinct within a row.
        threshold [] float32: the least selected score.
    """
    N, F = x.shape[0], W_enc.shape[0]
    most = min(4 * k, F, MAX_K) if most is None else most
    if not k <= most <= min(F, MAX_K):
        raise ValueError(
            f"batch_topk_encode: most must be in [{k}, {min(F, MAX_K)}] for k = {k}, got {most}"
        )
    op, tile = _operands(x, W_enc, b_enc, b_dec, mask, scale, None), tile_of(x)
    if N == 0:
        empty = x.new_empty(0, most)
        return empty, empty.long(), x.new_full((), math.inf, dtype=torch.float32)
    taus = (_batch_guess(op, k) if tau is None else tau.float()).expand(N).contiguous()
    found = gated(op, taus, "plain", tile, capacity or capacity_of(most, tile.f))
    short = (found.counts[:N].clamp(max=most).sum() < N * k).to(torch.int8)
    redo(op, taus, found, most, "plain", tile, short)
    u, indices = pick(found, most, torch.float32, relu=False)
    held = torch.arange(most, device=x.device) < found.counts[:N, None]
    flat = u.masked_fill(~held, -math.inf).flatten()
    # rows are sorted by score and latent: a stable sort keeps that order among equal scores
    ordered, places = flat.sort(descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, places[: N * k], True)
    selected = chosen.view(N, most) & held & ~(u <= 0)  # a NaN stays
    return torch.where(selected, u, 0).to(x.dtype), indices, ordered[N * k - 1]


def _batch_guess(op: Operands, k: int) -> Tensor:
    """A threshold [] that somewhat more than k scores a row reach, from some of the rows."""
    every = max(1, op.N // 256)
    x = op.x[::every].contiguous()
    tile = tile_of(x)
    tiles = triton.cdiv(op.F, tile.f)
    stride = min(16, max(1, tiles // 16))
    sampled = triton.cdiv(tiles, stride)
    sample = x.new_empty(x.shape[0], sampled * tile.f, dtype=torch.float32)
    maxima_kernel[(triton.cdiv(x.shape[0], tile.n) * sampled,)](
        op._replace(x=x, N=x.shape[0]), sample, None, sampled, sample.shape[1], stride,
        SCORE="plain", RELU=False, GROUP=1, **tile.meta(),
    )  # fmt: skip
    expected = x.shape[0] * k / stride
    # rows differ more than chance: a quarter above what the sample should hold
    r = min(math.ceil(1.25 * expected + 4 * math.sqrt(expected)), sample.numel())
    guess_of = sample.flatten().topk(r).values[-1]
    return torch.where(guess_of < LOWEST.value, LOWEST.value, guess_of)
