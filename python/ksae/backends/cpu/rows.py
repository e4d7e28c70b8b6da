# SPDX-License-Identifier: Apache-2.0
"""The pass over latents: a code grouped by latent, sums, gradient norms and the update of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import _DTYPES, _cpu, _pointer, _Workspace


def group_by_latent(values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    N, k = values.shape
    offsets = values.new_empty(F + 1, dtype=torch.int32)
    order = values.new_empty(N * k, dtype=torch.int32)
    _cpu.group_by_latent(
        N, F, k, _DTYPES[values.dtype], _pointer(values), _pointer(indices), indices.element_size(),
        _pointer(offsets), _pointer(order), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return offsets, order


def latent_sums(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    F = offsets[0].numel() - 1
    grad_b_enc, grad_dot_w = scales.new_zeros(F), scales.new_zeros(F)
    _cpu.latent_sums(
        F, _DTYPES[values[0].dtype], _groups(values, offsets, order, grads), _pointer(scales),
        _pointer(grad_b_enc),
        _pointer(grad_dot_w), torch.get_num_threads(),
    )  # fmt: skip
    return grad_b_enc, grad_dot_w


def _groups(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    row_of: Sequence[Tensor] | None = None,
) -> list[tuple[int, int, int, int, int | tuple[int]]]:
    each: list[Any] = [c.shape[1] for c in coefficients]
    if row_of is not None:
        each = [(_pointer(n),) for n in row_of]
    return [
        (_pointer(f), _pointer(o), _pointer(c), _pointer(r), k)
        for c, f, o, r, k in zip(coefficients, offsets, order, rows, each, strict=True)
    ]


def row_grad_sq(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    grad_dot_w: Tensor | None,
    W: Tensor,
    start: int,
    row_of: Sequence[Tensor] | None = None,
) -> Tensor:
    F, d = W.shape
    grad_sq = scales.new_empty(F, dtype=torch.float64)
    _cpu.row_grad_sq(
        F, d, start, rows[0].shape[1], _DTYPES[W.dtype], rows[0].dtype == W.dtype,
        _groups(coefficients, offsets, order, rows, row_of), _pointer(scales), _pointer(centre),
        _pointer(grad_dot_w),
        _pointer(W), _pointer(grad_sq), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_sq


def row_update(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    grad_dot_w: Tensor | None,
    grad_b_enc: Tensor | None,
    W: Tensor,
    master: Tensor | None,
    m: Tensor,
    v: Tensor,
    hyper: Tensor,
    grad_b_dec: Tensor | None,
    start: int,
    normalize: bool,
    row_of: Sequence[Tensor] | None = None,
) -> None:
    F, d = W.shape
    _cpu.row_update(
        F, d, start, rows[0].shape[1], _DTYPES[W.dtype], rows[0].dtype == W.dtype,
        _groups(coefficients, offsets, order, rows, row_of), _pointer(scales), _pointer(centre),
        _pointer(grad_dot_w),
        _pointer(grad_b_enc), _pointer(grad_b_dec), _pointer(W), _pointer(master), _pointer(m),
        _pointer(v),
        _pointer(hyper), normalize, _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
