# SPDX-License-Identifier: Apache-2.0
"""Sparse encoders: the k largest pre-activations of each row, plain and gradient-aware."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import ENTRIES, accumulator
from .topk import _largest

__all__ = [
    "grad_topk_encode",
    "scored_encode",
    "threshold_encode",
    "topk_encode",
    "topk_encode_aux",
]


def _scaled(value: Tensor, row: Tensor) -> Tensor:
    """value [N] times row [N, d], exactly zero where the value is zero."""
    value = value[:, None]
    return torch.where(value == 0, 0, value * row)


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """u [N, F], accumulated."""
    acc = accumulator(x.dtype)
    xc = x if b_dec is None else x - b_dec  # rounded to T
    return xc.to(acc) @ W_enc.to(acc).T + b_enc.to(acc)


def _score(u: Tensor, grad: Tensor, W_dec: Tensor, beta: float, mode: str) -> Tensor:
    """The score [N, F] of `grad_topk_encode`."""
    score, g = u, grad.to(u.dtype)
    if beta > 0 or mode == "multiplicative":
        a = g @ W_dec.to(u.dtype).T  # [N, F]
        match mode:
            case "additive":
                score = u * (1 + beta * a.abs())
            case "multiplicative":
                score = u * a.abs()
            case "signed":
                score = u * (1 + beta * (-a).relu())
        informed = ((g != 0).any(1) & g.isfinite().all(1))[:, None]
        score = torch.where((u <= 0) | ~informed, u, score)
    return score


def topk_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    k: int,
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool, False: never selected before a True one, value 0
    W_bf16: Tensor | None = None,  # [F, d] bfloat16 copy of a float32 W_enc
    norms: Tensor | None = None,  # [3, F] float32 of `bf16_norms`, with W_bf16
) -> tuple[Tensor, Tensor]:
    """ReLU of the k largest pre-activations a row -> values [N, k] T, indices [N, k] int64.

    A kernel that screens reads W_bf16 and norms, as the row pass writes them, where it would make
    them; they must be those of this very W_enc, and change no result. Here they are not read.
    """
    return scored_encode(x, W_enc, b_enc, k, b_dec, mask)[:2]


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
) -> tuple[Tensor, Tensor]:
    """`topk_encode` with the k largest scores instead of the k largest pre-activations.

    The score is u where u <= 0, and there only u counts; elsewhere u (1 + beta |a|), u |a| or
    u (1 + beta relu(-a)) by mode, a = <W_dec[i], grad[n]>. A row whose grad is zero or not finite,
    and with beta = 0 every row of a mode that has a beta, is scored by u. The values are
    relu(u), not the score, in the order of the score.
    """
    return scored_encode(x, W_enc, b_enc, k, b_dec, None, grad, W_dec, beta, mode)[:2]


def scored_encode(
    x: Tensor,  # [N, d_in]
    W_enc: Tensor,  # [F, d_in]
    b_enc: Tensor,  # [F]
    k: int,
    b_dec: Tensor | None = None,  # [d_in]
    mask: Tensor | None = None,  # [F] bool, without grad
    grad: Tensor | None = None,  # [N, d_out]
    W_dec: Tensor | None = None,  # [F, d_out]
    beta: float = 0.0,
    mode: str = "additive",
) -> tuple[Tensor, Tensor, Tensor]:
    """`topk_encode`, or `grad_topk_encode` where grad and W_dec are given, with what was compared.

    Returns values [N, k] T, indices [N, k] int64, and scores [N, k] in the accumulator's type, by
    which selections of shards of the latents are made one.
    """
    u = _pre_activations(x, W_enc, b_enc, b_dec)
    if mask is not None:
        u = torch.where(mask, u, -torch.inf)
    score = u if grad is None or W_dec is None else _score(u, grad, W_dec, beta, mode)
    indices = _largest(score, k)
    v = u.gather(1, indices)
    return torch.where(v <= 0, 0, v).to(x.dtype), indices, score.gather(1, indices)


def topk_encode_aux(
    x: Tensor,  # [N, d_in]
    W_enc: Tensor,  # [F, d_in]
    b_enc: Tensor,  # [F]
    k: int,
    k_aux: int,
    dead: Tensor,  # [F] bool
    b_dec: Tensor | None = None,  # [d_in]
    grad: Tensor | None = None,  # [N, d_out]
    W_dec: Tensor | None = None,  # [F, d_out]
    beta: float = 0.0,
    mode: str = "additive",
    W_bf16: Tensor | None = None,  # [F, d] bfloat16, as `topk_encode`
    norms: Tensor | None = None,  # [3, F] float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selection of a training step and that of AuxK, which share a product.

    Values and indices [N, k] of `topk_encode`, or of `grad_topk_encode` where grad and W_dec are
    given; then those [N, k_aux] of `topk_encode` with the mask `dead`.
    """
    if grad is None or W_dec is None:
        chosen = topk_encode(x, W_enc, b_enc, k, b_dec)
    else:
        chosen = grad_topk_encode(x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)
    return (*chosen, *topk_encode(x, W_enc, b_enc, k_aux, b_dec, dead))


def threshold_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    theta: Tensor,  # [F] T or the accumulator's type
    b_dec: Tensor | None = None,  # [d]
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations above their latent's threshold -> values [E] T, latents [E] int64, and
    row_offsets [N+1] int64.

    Token n has the entries row_offsets[n] to row_offsets[n+1] - 1, in the order of latents. The
    pre-activation is compared before it is rounded to T. NaN is not above.
    """
    acc = accumulator(x.dtype)
    xc = x if b_dec is None else x - b_dec  # rounded to T
    u = xc.to(acc) @ W_enc.to(acc).T + b_enc.to(acc)  # [N, F]
    chosen = u > theta.to(acc)
    row_offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    row_offsets[1:] = chosen.sum(1).cumsum(0)
    refuse_entries(int(row_offsets[-1]))
    latents = torch.arange(W_enc.shape[0], device=x.device).expand_as(u)[chosen]
    return u[chosen].to(x.dtype), latents, row_offsets


def refuse_entries(E: int) -> None:
    """Raises ValueError for more entries than flat positions can number."""
    if E > ENTRIES:
        raise ValueError(
            f"threshold_encode: theta must be below at most {ENTRIES} pre-activations, got {E}"
        )
