# SPDX-License-Identifier: Apache-2.0
"""CPU kernels of codes with row offsets, and of the halves of `sparse_residual`.

Names, arguments and meanings are those of reference/ragged.py; tensors come checked and contiguous.
`group_by_latent` and `latent_sums` are those of cpu.py, with codes as [E, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cpu
from ..reference.ragged import rows_of
from .cpu import _DTYPES, _pointer, _Workspace


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor | float, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    (N, d), F = x.shape, W_enc.shape[0]
    theta = torch.as_tensor(theta, dtype=torch.float32).expand(F).contiguous()
    above = torch.empty(N, (F + 31) // 32, dtype=torch.int32)
    row_offsets = torch.empty(N + 1, dtype=torch.int64)
    of_all = (
        N, d, F, _DTYPES[x.dtype], _pointer(x), _pointer(W_enc), _pointer(b_enc), _pointer(b_dec),
        _pointer(theta), _pointer(above), _pointer(row_offsets),
    )  # fmt: skip
    _cpu.threshold_encode_count(*of_all, _Workspace(), torch.get_num_threads())
    E = int(row_offsets[-1])
    values, latents = x.new_empty(E), x.new_empty(E, dtype=torch.int64)
    _cpu.threshold_encode_fill(
        *of_all, _pointer(values), _pointer(latents), _Workspace(), torch.get_num_threads()
    )
    return values, latents, row_offsets


def sparse_decode(
    values: Tensor,
    latents: Tensor,
    row_offsets: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    partial: bool = False,
) -> Tensor:
    N, (F, d) = row_offsets.numel() - 1, W_dec.shape
    out = torch.empty(N, d, dtype=torch.float32 if partial else values.dtype)
    decode = _cpu.sparse_decode_partial if partial else _cpu.sparse_decode
    decode(
        N, d, F, (_pointer(row_offsets),), _DTYPES[values.dtype], _pointer(values),
        _pointer(latents), latents.element_size(), _pointer(W_dec), _pointer(b_dec), _pointer(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def sparse_residual(
    values: Tensor,
    latents: Tensor,
    row_offsets: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    N, (F, d) = row_offsets.numel() - 1, W_dec.shape
    residual = torch.empty(N, d, dtype=torch.float32)
    sq_error = torch.empty(N, dtype=torch.float64)
    grad_values = torch.empty(values.numel(), dtype=torch.float32)
    _cpu.sparse_residual(
        N, d, F, (_pointer(row_offsets),), _DTYPES[values.dtype], _pointer(values),
        _pointer(latents), latents.element_size(), _pointer(W_dec), _pointer(b_dec),
        _pointer(target), target.dtype == torch.float32, 0, d, _pointer(residual),
        _pointer(sq_error), _pointer(grad_values), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return residual, sq_error, grad_values


def sparse_decode_backward_values(
    grad: Tensor, latents: Tensor, row_offsets: Tensor, W_dec: Tensor
) -> Tensor:
    N, (F, d) = row_offsets.numel() - 1, W_dec.shape
    out = grad.new_empty(latents.numel())
    products = (
        _cpu.sparse_decode_backward_values if grad.dtype == W_dec.dtype else _cpu.residual_products
    )
    products(
        N, d, F, (_pointer(row_offsets),), _DTYPES[W_dec.dtype], _pointer(grad), _pointer(latents),
        latents.element_size(), _pointer(W_dec), _pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def sparse_decode_backward_weight(
    grad: Tensor, values: Tensor, latents: Tensor, row_offsets: Tensor, F: int
) -> tuple[Tensor, Tensor]:
    E, d, row_of = values.numel(), grad.shape[1], rows_of(row_offsets)
    grad_W, value_sum = grad.new_empty(F, d), grad.new_empty(F)
    _cpu.sparse_decode_backward_weight(
        E, d, F, (_pointer(row_of),), _DTYPES[grad.dtype], _pointer(grad), _pointer(values),
        _pointer(latents), latents.element_size(), _pointer(grad_W), _pointer(value_sum),
        _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_W, value_sum


Group = tuple[int, int, int, int, tuple[int]]


def _groups(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    row_of: Sequence[Tensor],
) -> list[Group]:
    return [
        (_pointer(o), _pointer(p), _pointer(c), _pointer(r), (_pointer(n),))
        for c, o, p, r, n in zip(coefficients, offsets, order, rows, row_of, strict=True)
    ]


def row_update(
    coefficients: Sequence[Tensor],  # G of [E_g]
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],  # G of [N_g, columns]
    row_of: Sequence[Tensor],  # G of [E_g] int32, the row of each entry
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
) -> None:
    """`row_update` of the reference, whose groups have entries of any rows."""
    F, d = W.shape
    _cpu.row_update(
        F, d, start, rows[0].shape[1], _DTYPES[W.dtype], rows[0].dtype == W.dtype,
        _groups(coefficients, offsets, order, rows, row_of), _pointer(scales), _pointer(centre),
        _pointer(grad_dot_w), _pointer(grad_b_enc), _pointer(grad_b_dec), _pointer(W),
        _pointer(master), _pointer(m), _pointer(v), _pointer(hyper), normalize, _Workspace(),
        torch.get_num_threads(),
    )  # fmt: skip


def row_grad_sq(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    row_of: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    grad_dot_w: Tensor | None,
    W: Tensor,
    start: int,
) -> Tensor:
    """`row_grad_sq` of the reference, whose groups have entries of any rows."""
    (F, d), out = W.shape, torch.empty(W.shape[0], dtype=torch.float64)
    _cpu.row_grad_sq(
        F, d, start, rows[0].shape[1], _DTYPES[W.dtype], rows[0].dtype == W.dtype,
        _groups(coefficients, offsets, order, rows, row_of), _pointer(scales), _pointer(centre),
        _pointer(grad_dot_w), _pointer(W), _pointer(out), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return out
