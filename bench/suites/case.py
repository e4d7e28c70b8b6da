# SPDX-License-Identifier: Apache-2.0
"""One shape and dtype to time ops on, and one op at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

from ksae import ops

from ..harness import data
from ..harness.costs import Cost

BETA = 0.5  # of grad_topk_encode, times the norm of the gradient
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], Any]


@dataclass
class Problem:
    """One op at one shape.

    `make(module)` gives the call of ksae.reference or ksae.ops, with state of its own; `torchs` are
    torch's ways by name, each with the same result; parts are not rivals: nothing compares them.
    """

    op: str
    mode: str
    cost: Cost
    make: Callable[[Any], Call]
    torchs: dict[str, Call] = field(default_factory=dict)
    parts: dict[str, Call] = field(default_factory=dict)
    check: Callable[[Any], list[Tensor]] = lambda result: [result]
    dense_product: bool = False  # flops at the rate of a product, not of a gather
    exchanges: bool = False  # near ties of a score may be decided either way


class Case:
    """One shape and dtype: a batch, weights, and the code of the batch."""

    def __init__(
        self, N: int, d: int, F: int, k: int, name: str, kind: str, device: str = "cpu"
    ) -> None:
        self.N, self.d, self.F, self.k, self.name = N, d, F, k, name
        self.key = (N, d, F, k)
        self.dtype = DTYPES[name]
        start = {n: t.to(device, self.dtype) for n, t in data.initial_weights(F, d).items()}
        self.W, self.b_enc, self.b_dec = start["W_enc"], start["b_enc"], start["b_dec"]
        self.x = data.batches(kind, N, d, 1)[0].to(device, self.dtype)
        generator = torch.Generator().manual_seed(2)
        self.grad = torch.randn(N, d, generator=generator).to(device, self.dtype)
        self.values, self.indices = ops.topk_encode(self.x, self.W, self.b_enc, k, self.b_dec)
        # torch accumulates some of its ways in the storage dtype
        self.tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        # In the mean: one in ten thousand of the selected exchanged for another, one in any case.
        self.exchanged = self.tolerance + (2 * max(1e-4, 1 / (N * k))) ** 0.5
        self.residual, _, self.grads = ops.sparse_residual(
            self.values, self.indices, self.W, self.b_dec, self.x, d
        )
        self.offsets, self.order = ops.group_by_latent(self.values, self.indices, F)
        self.scale = 2 / self.x.float().square().sum().reshape(1)  # [1]

    @property
    def shape(self) -> dict[str, int]:
        return {"N": self.N, "d": self.d, "F": self.F, "k": self.k}

    def __str__(self) -> str:
        return f"N={self.N} d={self.d} F={self.F} k={self.k} {self.name}"

    def dense_code(self) -> Tensor:
        """[N, F]"""
        code = self.values.new_zeros(self.N, self.F)
        dense: Tensor = code.scatter_(1, self.indices, self.values)
        return dense

    def scores(self) -> Tensor:
        """[N, F], as torch stores them."""
        return nn.linear(self.x - self.b_dec, self.W, self.b_enc)

    def index_add(self) -> tuple[Tensor, Tensor]:
        """Gradient of the decoder and sum of the values, as one writes them in torch."""
        contributions = self.values[:, :, None] * self.grad[:, None, :]  # [N, k, d]
        flat = self.indices.reshape(-1)
        grad_W = torch.zeros_like(self.W)
        grad_W.index_add_(0, flat, contributions.reshape(-1, self.d))
        value_sum = self.values.new_zeros(self.F)
        return grad_W, value_sum.index_add_(0, flat, self.values.reshape(-1))

    def sort_by_latent(self) -> tuple[Tensor, Tensor]:
        """Offsets and order of the entries with a value; the others count for a latent F."""
        latent = torch.where(self.values != 0, self.indices, self.F).reshape(-1)
        sorted_, order = latent.sort(stable=True)
        bounds = torch.arange(self.F + 1, device=latent.device)
        return torch.searchsorted(sorted_, bounds), order
