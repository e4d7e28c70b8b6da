# SPDX-License-Identifier: Apache-2.0
"""Bridge from torch tensors to the native CPU kernels: the one place where tensors become pointers.

Each function has the name and meaning of its reference and names the arguments that it serves; with
others that are optional, the reference serves the call. Tensors come checked, contiguous and in
float32, bfloat16 or float16 (ksae.ops sees to it). Outputs and workspaces are torch's; the
thread count is torch.get_num_threads().

Environment, read once at import: KSAE_NATIVE=0 leaves the native code out,
KSAE_ISA=plain|avx2|avx512|avx512bf16 lowers the instruction set, KSAE_SCREEN=off switches certified
screening of float32 encodes off (on where the CPU has BF16 dot instructions).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import env
from ..reference.dtypes import MODES
from ..reference.encode import refuse_entries
from ..reference.group import rows_of

_ROUTES = ("auto", "dual", "pruned")  # of grad_topk_encode; as in ksae/cpu.h, as is MODES
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_reason = ""
screening = env.read("KSAE_SCREEN") != "off"

if env.read("KSAE_NATIVE") == "0":
    _reason = "left out by KSAE_NATIVE=0"
else:
    try:
        from .. import _cpu
    except ImportError as error:
        _reason = f"not importable: {error}"
    else:
        if isa := env.read("KSAE_ISA"):
            _cpu.set_isa(isa)


def available() -> bool:
    """Whether the native kernels can be called."""
    return not _reason


def reason() -> str:
    """Why they cannot, in one line; empty if they can."""
    return _reason


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


_MAPPED = 1 << 25  # bytes; for more, malloc maps fresh pages, which the kernel clears
_spare: dict[int, list[np.ndarray[Any, Any]]] = {}  # by size in bytes


def _large(F: int, d: int, dtype: torch.dtype) -> Tensor:
    """An [F, d] that is to be written in full.

    A training step frees its weight gradients and wants the same sizes again: a large one gets the
    memory of one that nobody holds any more. What is spare is let go once it does not serve.
    """
    size = F * d * dtype.itemsize
    if size < _MAPPED:
        return torch.empty(F, d, dtype=dtype)
    try:
        memory = _spare[size].pop()  # one step for the interpreter: threads cannot take the same
    except (KeyError, IndexError):
        _spare.clear()
        memory = np.empty(size, np.uint8)  # on Linux, NumPy asks for huge pages
    held = memory.view()  # by the tensor's storage, and by nothing else
    weakref.finalize(held, _keep, memory).atexit = False
    return torch.from_numpy(held).view(dtype).view(F, d)


def _keep(memory: np.ndarray[Any, Any]) -> None:
    _spare.setdefault(memory.nbytes, []).append(memory)


class _Workspace:
    """Allocator for the native side; the memory lives as long as this object."""

    def __call__(self, size: int) -> int:
        self.memory = torch.empty(size + 64, dtype=torch.uint8)
        return (self.memory.data_ptr() + 63) & ~63


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    N, F = x.shape
    values, indices = x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)
    _cpu.topk(
        N, F, k, _DTYPES[x.dtype], _pointer(x), _pointer(values), _pointer(indices), _Workspace(),
        torch.get_num_threads()
    )  # fmt: skip
    return values, indices


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    values, indices, _ = topk_encode_counted(x, W_enc, b_enc, k, b_dec, mask)
    return values, indices


def topk_encode_counted(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    screen: bool | None = None,
    slack: float = 1.0,
    product_only: bool = False,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """topk_encode, and rows screened, survivors, rows redone.

    scores [N, k] float32 is written. For tests, `slack` scales the bound; for benchmarks,
    `product_only` leaves out the selection and the outputs unwritten.
    """
    (N, d), F = x.shape, W_enc.shape[0]
    if screen is None:  # survivors are some 2 k a row: at F = 8 k screening took 2.7 times as long
        screen = screening and 100 * k <= F
    values, indices = x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)
    counts = _cpu.topk_encode(
        N, d, F, k, _DTYPES[x.dtype], _pointer(x), _pointer(W_enc), _pointer(b_enc),
        _pointer(b_dec), _pointer(mask), _pointer(values), _pointer(indices),
        screen, slack, product_only, _pointer(scores), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return values, indices, counts


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    values, indices, row_offsets, _ = batch_topk_encode_counted(x, W_enc, b_enc, k, b_dec)
    return values, indices, row_offsets


def batch_topk_encode_counted(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    *,
    screen: bool | None = None,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]:
    """batch_topk_encode, and rows screened, survivors, rows scored in full.

    For tests, `slack` scales the bound.
    """
    (N, d), F = x.shape, W_enc.shape[0]
    if screen is None:
        screen = screening and 100 * k <= F
    values, indices = x.new_empty(N * k), x.new_empty(N * k, dtype=torch.int64)
    row_offsets = x.new_empty(N + 1, dtype=torch.int64)
    counts = _cpu.batch_topk_encode(
        N, d, F, k, _DTYPES[x.dtype], _pointer(x), _pointer(W_enc), _pointer(b_enc),
        _pointer(b_dec), _pointer(values), _pointer(indices), _pointer(row_offsets), screen, slack,
        _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return values, indices, row_offsets, counts


def grad_topk_encode(
    x: Tensor,
    grad: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    k: int,
    beta: float,
    mode: str = "additive",
    b_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if beta == 0 and mode != "multiplicative":
        return topk_encode(x, W_enc, b_enc, k, b_dec)
    return grad_topk_encode_counted(x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)[:2]


def grad_topk_encode_counted(
    x: Tensor,
    grad: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    k: int,
    beta: float,
    mode: str = "additive",
    b_dec: Tensor | None = None,
    *,
    route: str = "auto",
    screen: bool | None = None,
    slack: float = 1.0,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    """grad_topk_encode by a route of _ROUTES, and rows with bounds, survivors, rows redone, latents
    whose product with grad was computed one by one.

    Only float32 can be pruned, and not the multiplicative mode.
    """
    (N, d), (F, d_out) = x.shape, W_dec.shape
    if screen is None:
        screen = screening and 100 * k <= F
    values, indices = x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)
    counts = _cpu.grad_topk_encode(
        N, d, F, k, _DTYPES[x.dtype], _pointer(x), _pointer(W_enc), _pointer(b_enc),
        _pointer(b_dec), _pointer(values), _pointer(indices), screen, slack,
        d_out, _pointer(grad), _pointer(W_dec), MODES.index(mode), beta, _ROUTES.index(route),
        _pointer(scores), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return values, indices, counts


def topk_encode_aux(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    k_aux: int,
    dead: Tensor,
    b_dec: Tensor | None = None,
    grad: Tensor | None = None,
    W_dec: Tensor | None = None,
    beta: float = 0.0,
    mode: str = "additive",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if grad is None or W_dec is None:
        chosen = topk_encode(x, W_enc, b_enc, k, b_dec)
    else:
        chosen = grad_topk_encode(x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)
    return (*chosen, *topk_encode(x, W_enc, b_enc, k_aux, b_dec, dead))


def scored_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    grad: Tensor | None = None,
    W_dec: Tensor | None = None,
    beta: float = 0.0,
    mode: str = "additive",
) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.empty(x.shape[0], k)
    plain = grad is None or W_dec is None or (beta == 0 and mode != "multiplicative")
    if plain:
        chosen = topk_encode_counted(x, W_enc, b_enc, k, b_dec, mask, scores=scores)[:2]
    else:
        assert grad is not None and W_dec is not None
        args = (x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)
        chosen = grad_topk_encode_counted(*args, scores=scores)[:2]
    return *chosen, scores


def encode_product(x: Tensor, W_enc: Tensor, *, screen: bool | None = None) -> None:
    """The product of topk_encode in its own microkernel, packing included, without selection."""
    bias = W_enc.new_zeros(W_enc.shape[0])
    topk_encode_counted(x, W_enc, bias, 1, screen=screen, product_only=True)


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return threshold_encode_by(x, W_enc, b_enc, theta, b_dec, screen=screening)


def threshold_encode_by(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    b_dec: Tensor | None = None,
    *,
    screen: bool,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """threshold_encode, screened or not, which gives the same bits; for tests, `slack` scales the
    bound."""
    (N, d), F, theta = x.shape, W_enc.shape[0], theta.float()
    above = torch.empty(N, (F + 31) // 32, dtype=torch.int32)  # a bit a pre-activation
    row_offsets = torch.empty(N + 1, dtype=torch.int64)
    of_all = (
        N, d, F, _DTYPES[x.dtype], _pointer(x), _pointer(W_enc), _pointer(b_enc), _pointer(b_dec),
        _pointer(theta), _pointer(above), _pointer(row_offsets),
    )  # fmt: skip
    _cpu.threshold_encode_count(*of_all, screen, slack, _Workspace(), torch.get_num_threads())
    refuse_entries(E := int(row_offsets[-1]))
    values, latents = x.new_empty(E), x.new_empty(E, dtype=torch.int64)
    _cpu.threshold_encode_fill(
        *of_all, _pointer(values), _pointer(latents), _Workspace(), torch.get_num_threads()
    )
    return values, latents, row_offsets


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
        N, d, F, k, _DTYPES[values.dtype], _pointer(values), _pointer(indices),
        indices.element_size(),
        _pointer(W_dec), _pointer(b_dec), _pointer(out), torch.get_num_threads(),
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
        N, d, F, k, _DTYPES[values.dtype], _pointer(values), _pointer(indices),
        indices.element_size(),
        _pointer(W_dec), _pointer(b_dec), _pointer(target), target.dtype == torch.float32, start,
        stop - start,
        _pointer(residual), _pointer(sq_error), _pointer(grad_values), _Workspace(),
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
        N, d, F, k, _DTYPES[values.dtype], _pointer(values), _pointer(indices),
        indices.element_size(), _pointer(W_dec), _pointer(b_dec), _pointer(target),
        target.dtype == torch.float32, _pointer(widths), _pointer(shares), len(widths), start,
        stop - start, _pointer(residual), _pointer(sq_errors), _pointer(grad_values), _Workspace(),
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
        N, d, F, k, _DTYPES[W_dec.dtype], _pointer(grad), _pointer(indices), indices.element_size(),
        _pointer(W_dec), _pointer(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def sparse_decode_backward_weight(
    grad: Tensor, values: Tensor, indices: Tensor, F: int, row_offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (N, k), d = values.shape, grad.shape[1]
    row_of = None if row_offsets is None else rows_of(row_offsets, N)
    of = k if row_of is None else (_pointer(row_of),)  # by latent, entries are tokens of one entry
    grad_W, value_sum = _large(F, d, grad.dtype), grad.new_empty(F)
    _cpu.sparse_decode_backward_weight(
        N, d, F, of, _DTYPES[grad.dtype], _pointer(grad), _pointer(values), _pointer(indices),
        indices.element_size(),
        _pointer(grad_W), _pointer(value_sum), _Workspace(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_W, value_sum


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
