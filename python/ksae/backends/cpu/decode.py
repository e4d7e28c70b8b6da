# SPDX-License-Identifier: Apache-2.0
"""The decoder: reconstructions, residuals and the gradients of values and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.group import rows_of
from ..bridge import DTYPES, pointer
from .calls import _cpu, _large, _Workspace


def _rows(row_offsets: Tensor) -> tuple[int, tuple[int]]:
    """Tokens, and their row offsets as the native side takes them instead of k."""
    return row_offsets.shape[0] - 1, (row_offsets.data_ptr(),)


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_offsets: Tensor | None = None,
    partial: bool = False,
) -> Tensor:
    N, k = indices.shape if row_offsets is None else _rows(row_offsets)
    F, d = W_dec.shape
    out = values.new_empty(N, d, dtype=torch.float32 if partial else values.dtype)
    decode = _cpu.sparse_decode_partial if partial else _cpu.sparse_decode
    decode(
        N, d, F, k, DTYPES[values.dtype], pointer(values), pointer(indices),
        indices.element_size(),
        pointer(W_dec), pointer(b_dec), pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def sparse_residual(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    columns: int,
    row_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    sq_error = target.new_empty(target.shape[0], dtype=torch.float64)
    grad_values = target.new_empty(values.shape, dtype=torch.float32)
    of = (target, 0, columns, row_offsets)
    residual = _residual(values, indices, W_dec, b_dec, *of, sq_error, grad_values)
    return residual, sq_error, grad_values


def sparse_residual_slice(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    start: int,
    stop: int,
    row_offsets: Tensor | None = None,
) -> Tensor:
    of = (target, start, stop, row_offsets)
    return _residual(values, indices, W_dec, b_dec, *of, None, None)


def _residual(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    start: int,
    stop: int,
    row_offsets: Tensor | None,
    sq_error: Tensor | None,
    grad_values: Tensor | None,
) -> Tensor:
    N, k = indices.shape if row_offsets is None else _rows(row_offsets)
    F, d = W_dec.shape
    residual = target.new_empty(N, stop - start, dtype=torch.float32)
    _cpu.sparse_residual(
        N, d, F, k, DTYPES[values.dtype], pointer(values), pointer(indices),
        indices.element_size(),
        pointer(W_dec), pointer(b_dec), pointer(target), target.dtype == torch.float32, start,
        stop - start,
        pointer(residual), pointer(sq_error), pointer(grad_values), _Workspace(),
        torch.get_num_threads(),
    )  # fmt: skip
    return residual


def prefix_residual(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    widths: Tensor,
    shares: Tensor,
    columns: int,
    row_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    sq_errors = target.new_empty(len(widths), len(target), dtype=torch.float64)
    grad_values = torch.empty(values.shape, dtype=torch.float32)
    of = (values, indices, W_dec, b_dec, target, widths, shares)
    residual = _prefix_residual(*of, 0, columns, row_offsets, sq_errors, grad_values)
    return residual, sq_errors, grad_values


def prefix_residual_slice(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    widths: Tensor,
    shares: Tensor,
    start: int,
    stop: int,
    row_offsets: Tensor | None = None,
) -> Tensor:
    of = (values, indices, W_dec, b_dec, target, widths, shares)
    return _prefix_residual(*of, start, stop, row_offsets, None, None)


def _prefix_residual(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    widths: Tensor,
    shares: Tensor,
    start: int,
    stop: int,
    row_offsets: Tensor | None,
    sq_errors: Tensor | None,
    grad_values: Tensor | None,
) -> Tensor:
    N, k = indices.shape if row_offsets is None else _rows(row_offsets)
    F, d = W_dec.shape
    residual = torch.empty(len(widths), N, stop - start, dtype=torch.float32)
    _cpu.prefix_residual(
        N, d, F, k, DTYPES[values.dtype], pointer(values), pointer(indices),
        indices.element_size(), pointer(W_dec), pointer(b_dec), pointer(target),
        target.dtype == torch.float32, pointer(widths), pointer(shares), len(widths), start,
        stop - start, pointer(residual), pointer(sq_errors), pointer(grad_values), _Workspace(),
        torch.get_num_threads(),
    )  # fmt: skip
    return residual


def sparse_decode_backward_values(
    grad: Tensor, indices: Tensor, W_dec: Tensor, row_offsets: Tensor | None = None
) -> Tensor:
    N, k = indices.shape if row_offsets is None else _rows(row_offsets)
    F, d = W_dec.shape
    out = grad.new_empty(indices.shape)
    wider = grad.dtype != W_dec.dtype
    products = _cpu.residual_products if wider else _cpu.sparse_decode_backward_values
    products(
        N, d, F, k, DTYPES[W_dec.dtype], pointer(grad), pointer(indices), indices.element_size(),
        pointer(W_dec), pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def sparse_decode_backward_weight(
    grad: Tensor, values: Tensor, indices: Tensor, F: int, row_offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (N, k), d = values.shape, grad.shape[1]
    row_of = None if row_offsets is None else rows_of(row_offsets, N)
    of = k if row_of is None else (pointer(row_of),)  # by latent, entries are tokens of one entry
    grad_W, value_sum = _large(F, d, grad.dtype), grad.new_empty(F)
    _cpu.sparse_decode_backward_weight(
        N, d, F, of, DTYPES[grad.dtype], pointer(grad), pointer(values), pointer(indices),
        indices.element_size(),
        pointer(grad_W), pointer(value_sum), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_W, value_sum
