# SPDX-License-Identifier: Apache-2.0
"""One right call of each op, and a coder with a variable number of latents a row."""

from __future__ import annotations

from typing import Any

import torch
from cases import (
    count_arguments,
    norm_arguments,
    randn,
    row_arguments,
    scalars_arguments,
    sums_arguments,
    terms_arguments,
    vector_arguments,
)
from torch import Tensor

import ksae
from ksae import reference

N, d, F, k = 6, 5, 20, 3


def arguments(name: str, dtype: torch.dtype, grad: bool = False) -> tuple[Any, ...]:
    """A call of each op; floating inputs want gradients if asked."""

    def leaf(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, seed=seed).requires_grad_(grad)

    x, W, b, b_dec = leaf(N, d, seed=0), leaf(F, d, seed=1), leaf(F, seed=2), leaf(d, seed=3)
    values, indices = reference.topk_encode(x.detach(), W.detach(), b.detach(), k)
    values = values.requires_grad_(grad)
    update = row_arguments(dtype, "decoder", N=N, F=F)
    W_bf16: tuple[Tensor, ...] = ()
    if dtype == torch.float32:
        rounded = W.detach().bfloat16()
        W_bf16 = rounded, reference.bf16_norms(W.detach(), rounded)
    residual = (values.detach(), indices, W.detach(), b_dec.detach(), x.detach())
    acc = reference.accumulator(dtype)
    prefixes = torch.tensor([2, F // 2, F]), torch.tensor([0.5, 2.0, 1.0], dtype=acc)
    return {
        "topk": (W, k),
        "topk_encode": (x, W, b, k, b_dec, torch.arange(F) % 2 == 0, *W_bf16),
        "grad_topk_encode": (x, x.detach().flip(0), W, b, W.detach(), k, 0.5, "signed", b_dec),
        "scored_encode": (
            x.detach(),
            W.detach(),
            b.detach(),
            k,
            b_dec.detach(),
            None,
            x.detach(),
            W.detach(),
            0.5,
            "signed",
        ),
        "batch_topk_encode": (x, W, b, k, b_dec),
        "threshold_encode": (x, W, b, 0.1 + b.detach().abs(), b_dec),
        "topk_encode_aux": tuple(
            t.detach() if isinstance(t, Tensor) else t
            for t in (x, W, b, k, 2 * k, torch.arange(F) % 3 == 0, b_dec, x.flip(0), W, 0.5)
        )
        + (("additive", *W_bf16) if W_bf16 else ()),
        "sparse_decode": (values, indices, W, b_dec),
        "sparse_decode_backward_values": (x, indices, W),
        "sparse_decode_backward_weight": (x, values, indices, F),
        "group_by_latent": (values.detach(), indices, F),
        "sparse_residual": (*residual, 3),
        "sparse_residual_slice": (*residual, 1, 4),
        "prefix_residual": (*residual, *prefixes, 3),
        "prefix_residual_slice": (*residual, *prefixes, 1, 4),
        "latent_sums": tuple(sums_arguments(dtype, N=N, F=F).values()),
        "row_grad_sq": tuple(norm_arguments(update)),
        "row_update": tuple(update.values()),
        "total_variance": (x.detach(),),
        "loss_terms": tuple(terms_arguments(dtype).values()),
        "adam_scalars": tuple(scalars_arguments(dtype).values()),
        "count_tokens": tuple(count_arguments(dtype, F).values()),
        "vector_update": tuple(vector_arguments(dtype, F).values()),
    }[name]


def threshold_coder(x: Tensor, W: Tensor, b: Tensor, b_dec: Tensor) -> Tensor:
    values, latents, offsets = ksae.threshold_encode(x, W, b, 0.3, b_dec)
    return ksae.sparse_decode(values, latents, W, b_dec, offsets)
