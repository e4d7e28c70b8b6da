# SPDX-License-Identifier: Apache-2.0
"""Encoders other than TopK's: the largest of a batch, above a threshold, with their scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..harness import costs
from .case import Case, Problem


def forward(case: Case) -> Iterator[Problem]:
    """Each takes about k entries a row."""
    N, d, F, k, s = case.N, case.d, case.F, case.k, case.dtype.itemsize
    arguments = (case.x, case.W, case.b_enc)
    cost = costs.topk_encode(N, d, F, k, s)
    yield Problem(
        "batch_topk_encode",
        "forward",
        cost,
        lambda impl: partial(impl.batch_topk_encode, *arguments, k, case.b_dec),
        {"F.linear + flat topk": lambda: (case.scores().flatten().topk(N * k).values.relu(),)},
        check=lambda r: [r[0].float().sort(descending=True).values],
        dense_product=True,
    )
    theta = float(case.values[:, -1].float().mean())  # about the k-th of a row

    def above() -> tuple[Tensor, Tensor]:
        u = case.scores()
        chosen = (u > theta).nonzero()
        return u[chosen[:, 0], chosen[:, 1]], chosen[:, 1]

    yield Problem(
        "threshold_encode",
        "forward",
        cost,
        lambda impl: partial(
            impl.threshold_encode, *arguments, thresholds(case, theta), case.b_dec
        ),
        {"F.linear + nonzero": above},
        check=lambda r: [r[0].float().sum()[None]],  # near ties may be on either side
        dense_product=True,
    )
    yield Problem(
        "scored_encode",
        "forward",
        cost,
        lambda impl: partial(impl.scored_encode, *arguments, k, case.b_dec),
        {"F.linear + topk": lambda: case.scores().topk(k)},
        check=lambda r: [r[0].relu()],
        dense_product=True,
    )


def thresholds(case: Case, theta: float) -> Tensor:
    """theta for each latent: [F] float32."""
    return torch.full((case.F,), theta, device=case.x.device)
