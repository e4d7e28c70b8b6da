# SPDX-License-Identifier: Apache-2.0
"""Argument checks of every op: called by each kernel and by the fake function, so the text is the
same everywhere.

Each check returns the storage type T of its op. ValueError for values and shapes, TypeError for
dtypes; the form is `<op>: <arg> must be <expected>, got <actual>`. Nothing is allocated or written
before a check has passed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = ("additive", "multiplicative", "signed")  # of the score of grad_topk_encode
ENTRIES = 2**31 - 1  # flat positions are int32
_check_indices = os.environ.get("KSAE_CHECK", "0") == "1"  # read once at import


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over tensors of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def fail(op: str, arg: str, expected: str, got: object) -> ValueError:
    """The error for a bad value, in the house's form."""
    return ValueError(f"{op}: {arg} must be {expected}, got {got}")


def _matrix(op: str, arg: str, t: Tensor) -> None:
    if t.dim() != 2:
        raise fail(op, arg, "a matrix", f"shape {_text(t.shape)}")
    if t.dtype not in FLOATS:
        names = ", ".join(str(f) for f in FLOATS)
        raise TypeError(f"{op}: {arg} must be one of {names}, got {t.dtype}")


def _like(
    op: str, arg: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, first: Tensor
) -> None:
    """Shape, dtype and device of t; -1 in shape is any size."""
    if t.shape != shape and (
        t.dim() != len(shape)
        or any(n != -1 and m != n for m, n in zip(t.shape, shape, strict=True))
    ):
        want = _text(["*" if n == -1 else n for n in shape])  # type: ignore[misc]
        raise fail(op, arg, f"of shape {want}", _text(t.shape))
    if t.dtype != dtype:
        raise TypeError(f"{op}: {arg} must be {dtype}, got {t.dtype}")
    _device(op, arg, t, first)


def _device(op: str, arg: str, t: Tensor, first: Tensor) -> None:
    if t.device != first.device:
        raise fail(op, arg, f"on {first.device}", t.device)


def _k(op: str, k: int, F: int, arg: str, t: Tensor) -> None:
    if not 1 <= k <= F:
        raise fail(op, "k", f"in [1, {F}] for {arg} of shape {_text(t.shape)}", k)


def _indices(op: str, indices: Tensor, shape: Sequence[int], of: str, first: Tensor) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices must be torch.int64 or torch.int32, got {indices.dtype}")
    if indices.dim() != 2 or any(
        n != -1 and m != n for m, n in zip(indices.shape, shape, strict=True)
    ):
        want = _text(["*" if n == -1 else n for n in shape])  # type: ignore[misc]
        raise fail(op, "indices", f"of the shape of {of} {want}", _text(indices.shape))
    _device(op, "indices", indices, first)


def index_range(op: str, indices: Tensor, F: int) -> None:
    """Latent numbers lie in [0, F).

    On a GPU the look would wait for the stream: it is taken under KSAE_CHECK=1 alone, and without
    it an index out of range is undefined behaviour.
    """
    if (indices.device.type == "cpu" or _check_indices) and indices.numel():
        low, high = (int(n) for n in indices.aminmax())
        if low < 0 or high >= F:
            raise fail(op, "indices", f"in [0, {F})", low if low < 0 else high)


def topk(x: Tensor, k: int) -> torch.dtype:
    _matrix("topk", "x", x)
    _k("topk", k, x.shape[1], "x", x)
    return x.dtype


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    W_bf16: Tensor | None = None,
    norms: Tensor | None = None,
) -> torch.dtype:
    op = "topk_encode"
    T = _encoder(op, x, W_enc, b_enc, k, b_dec)
    if mask is not None:
        _like(op, "mask", mask, (W_enc.shape[0],), torch.bool, x)
    _W_bf16(op, W_enc, W_bf16, norms)
    return T


def score(op: str, beta: float, mode: str) -> None:
    """beta and mode of a gradient-aware score."""
    if mode not in MODES:
        raise fail(op, "mode", f"one of {', '.join(MODES)}", repr(mode))
    if not (math.isfinite(beta) and beta >= 0):
        raise fail(op, "beta", "a finite number >= 0", beta)


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
) -> torch.dtype:
    op = "grad_topk_encode"
    T = _encoder(op, x, W_enc, b_enc, k, b_dec)
    _downstream(op, x, grad, W_enc, W_dec, beta, mode)
    return T


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
    W_bf16: Tensor | None = None,
    norms: Tensor | None = None,
) -> torch.dtype:
    op = "topk_encode_aux"
    T = _encoder(op, x, W_enc, b_enc, k, b_dec)
    F = W_enc.shape[0]
    _like(op, "dead", dead, (F,), torch.bool, x)
    if not 1 <= k_aux <= F:
        raise fail(op, "k_aux", f"in [1, {F}] for W_enc of shape {_text(W_enc.shape)}", k_aux)
    if (grad is None) != (W_dec is None):
        raise fail(op, "grad", "given with W_dec", "one without the other")
    if grad is not None and W_dec is not None:
        _downstream(op, x, grad, W_enc, W_dec, beta, mode)
    _W_bf16(op, W_enc, W_bf16, norms)
    return T


def _W_bf16(op: str, W: Tensor, W_bf16: Tensor | None, norms: Tensor | None) -> None:
    """A bf16 copy of float32 weights and its norms, which come together."""
    if (W_bf16 is None) != (norms is None):
        raise fail(op, "norms", "given with W_bf16", "one without the other")
    if W_bf16 is not None and norms is not None:
        if W.dtype != torch.float32:
            raise fail(op, "W_bf16", f"None for {W.dtype} weights", "a tensor")
        _like(op, "W_bf16", W_bf16, W.shape, torch.bfloat16, W)
        _like(op, "norms", norms, (3, W.shape[0]), torch.float32, W)


def _encoder(
    op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None
) -> torch.dtype:
    T = x.dtype
    _matrix(op, "x", x)
    _like(op, "W_enc", W_enc, (-1, x.shape[1]), T, x)
    _like(op, "b_enc", b_enc, (W_enc.shape[0],), T, x)
    if b_dec is not None:
        _like(op, "b_dec", b_dec, (x.shape[1],), T, x)
    _k(op, k, W_enc.shape[0], "W_enc", W_enc)
    return T


def _downstream(
    op: str, x: Tensor, grad: Tensor, W_enc: Tensor, W_dec: Tensor, beta: float, mode: str
) -> None:
    _like(op, "W_dec", W_dec, (W_enc.shape[0], -1), x.dtype, x)
    _like(op, "grad", grad, (x.shape[0], W_dec.shape[1]), x.dtype, x)
    score(op, beta, mode)


def sparse_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None
) -> torch.dtype:
    op, T = "sparse_decode", values.dtype
    _matrix(op, "values", values)
    _indices(op, indices, values.shape, "values", values)
    _like(op, "W_dec", W_dec, (-1, -1), T, values)
    if b_dec is not None:
        _like(op, "b_dec", b_dec, (W_dec.shape[1],), T, values)
    return T


def sparse_decode_backward_values(grad: Tensor, indices: Tensor, W_dec: Tensor) -> torch.dtype:
    op, T = "sparse_decode_backward_values", grad.dtype
    _matrix(op, "grad", grad)
    _like(op, "W_dec", W_dec, (-1, grad.shape[1]), T, grad)
    _indices(op, indices, (grad.shape[0], -1), "the rows of grad", grad)
    return T


def sparse_decode_backward_weight(
    grad: Tensor, values: Tensor, indices: Tensor, F: int
) -> torch.dtype:
    op, T = "sparse_decode_backward_weight", grad.dtype
    _matrix(op, "grad", grad)
    _like(op, "values", values, (grad.shape[0], -1), T, grad)
    _indices(op, indices, values.shape, "values", grad)
    _latents(op, F, values)
    return T


def group_by_latent(values: Tensor, indices: Tensor, F: int) -> torch.dtype:
    op = "group_by_latent"
    _matrix(op, "values", values)
    _indices(op, indices, values.shape, "values", values)
    _latents(op, F, values)
    return values.dtype


def _latents(op: str, F: int, values: Tensor) -> None:
    if not 1 <= F <= ENTRIES:
        raise fail(op, "F", f"in [1, {ENTRIES}]", F)
    if values.shape[0] * values.shape[1] > ENTRIES:
        raise fail(op, "values", f"of at most {ENTRIES} entries", _text(values.shape))


def _residual(
    op: str, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, target: Tensor
) -> torch.dtype:
    T = values.dtype
    _matrix(op, "values", values)
    _indices(op, indices, values.shape, "values", values)
    _like(op, "W_dec", W_dec, (-1, -1), T, values)
    if b_dec is not None:
        _like(op, "b_dec", b_dec, (W_dec.shape[1],), T, values)
    wide = accumulator(T) if target.dtype == accumulator(T) else T
    _like(op, "target", target, (values.shape[0], W_dec.shape[1]), wide, values)
    return T


def sparse_residual(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    columns: int,
    column_sums: Tensor | None = None,
) -> torch.dtype:
    op = "sparse_residual"
    T = _residual(op, values, indices, W_dec, b_dec, target)
    if not 0 <= columns <= W_dec.shape[1]:
        raise fail(op, "columns", f"in [0, {W_dec.shape[1]}]", columns)
    if column_sums is not None:
        _like(op, "column_sums", column_sums, (W_dec.shape[1],), accumulator(T), values)
        if not column_sums.is_contiguous():
            got = f"strides {_text(column_sums.stride())}"
            raise fail(op, "column_sums", "contiguous, for it is written", got)
    return T


def sparse_residual_slice(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    start: int,
    stop: int,
) -> torch.dtype:
    op = "sparse_residual_slice"
    T = _residual(op, values, indices, W_dec, b_dec, target)
    if not 0 <= start <= stop <= W_dec.shape[1]:
        raise fail(op, "start and stop", f"ordered in [0, {W_dec.shape[1]}]", f"{start} and {stop}")
    return T


def _groups(
    op: str,
    first: tuple[str, Sequence[Tensor]],
    second: tuple[str, Sequence[Tensor]],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    scales: Tensor,
) -> None:
    """One tensor a group in each list; offsets and order fit the first list."""
    name, tensors = first
    if not tensors:
        raise fail(op, name, "at least one group", "none")
    for arg, group in (second, ("offsets", offsets), ("order", order)):
        if len(group) != len(tensors):
            raise fail(op, arg, f"{len(tensors)} tensors, one for each of {name}", len(group))
    _matrix(op, f"{name}[0]", tensors[0])
    N, F = tensors[0].shape[0], offsets[0].numel() - 1
    for g, t in enumerate(tensors):
        _like(op, f"{name}[{g}]", t, (N, -1), tensors[0].dtype, tensors[0])
        _like(op, f"offsets[{g}]", offsets[g], (F + 1,), torch.int32, t)
        _like(op, f"order[{g}]", order[g], (N * t.shape[1],), torch.int32, t)
    _like(op, "scales", scales, (len(tensors),), accumulator(tensors[0].dtype), tensors[0])


def latent_sums(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    scales: Tensor,
) -> torch.dtype:
    op = "latent_sums"
    _groups(op, ("values", values), ("grads", grads), offsets, order, scales)
    T = values[0].dtype
    for g, (v, t) in enumerate(zip(values, grads, strict=True)):
        _like(op, f"grads[{g}]", t, v.shape, accumulator(T), v)
    return T


def _rows(
    op: str,
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    grad_dot_w: Tensor | None,
    W: Tensor,
    start: int,
) -> torch.dtype:
    _groups(op, ("coefficients", coefficients), ("rows", rows), offsets, order, scales)
    _matrix(op, "W", W)
    T, acc = W.dtype, accumulator(W.dtype)
    F, d = W.shape
    encoder = rows[0].dtype == T
    kinds = (acc, T) if encoder else (T, acc)
    _matrix(op, "rows[0]", rows[0])
    N, columns = rows[0].shape
    _like(op, "offsets[0]", offsets[0], (F + 1,), torch.int32, W)
    for g, (c, r) in enumerate(zip(coefficients, rows, strict=True)):
        _like(op, f"coefficients[{g}]", c, (N, -1), kinds[0], W)
        _like(op, f"rows[{g}]", r, (N, columns), kinds[1], W)
    if not 0 <= start <= d - columns:
        raise fail(op, "start", f"in [0, {d - columns}] for {columns} columns of {d}", start)
    if centre is not None:
        _like(op, "centre", centre, (columns,), rows[0].dtype, W)
    if grad_dot_w is not None:
        _like(op, "grad_dot_w", grad_dot_w, (F,), acc, W)
    return T


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
) -> torch.dtype:
    op = "row_grad_sq"
    return _rows(op, coefficients, offsets, order, rows, scales, centre, grad_dot_w, W, start)


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
    W_bf16: Tensor | None = None,
    rng_state: Tensor | None = None,
    norms: Tensor | None = None,
) -> torch.dtype:
    op = "row_update"
    T = _rows(op, coefficients, offsets, order, rows, scales, centre, grad_dot_w, W, start)
    acc = accumulator(T)
    if rng_state is not None:
        if W.dtype != torch.bfloat16:
            raise TypeError(f"{op}: W must be torch.bfloat16 with rng_state, got {T}")
        _like(op, "rng_state", rng_state, (2,), torch.int64, W)
        if start % 4:  # a group of four columns shares its random words
            raise fail(op, "start", "a multiple of 4 with rng_state", start)
    if (master is None) != (acc == T or rng_state is not None):
        want = "a tensor" if master is None else "None"
        weights = f"{T} weights" + (" with rng_state" if rng_state is not None else "")
        raise fail(op, "master", f"{want} for {weights}", "None" if master is None else "a tensor")
    if W_bf16 is not None and W.dtype != torch.float32:
        raise fail(op, "W_bf16", f"None for {T} weights", "a tensor")
    if norms is not None:
        if W_bf16 is None:
            raise fail(op, "W_bf16", "given with norms", "None")
        if rows[0].shape[1] != W.shape[1]:
            raise fail(op, "rows[0]", f"{W.shape[1]} columns with norms", rows[0].shape[1])
    if (grad_b_enc is None) != (grad_b_dec is None):
        raise fail(op, "grad_b_dec", "given with grad_b_enc", "one without the other")
    if grad_b_dec is not None and rows[0].shape[1] != W.shape[1]:
        raise fail(op, "rows[0]", f"{W.shape[1]} columns with grad_b_dec", rows[0].shape[1])
    written: dict[str, Tensor] = {"W": W, "m": m, "v": v}
    if master is not None:
        written["master"] = master
    moment = acc if rng_state is None else T
    for arg, t in written.items():
        kind = moment if arg in "mv" else T if t is W else acc
        _like(op, arg, t, W.shape, kind, W)
    if W_bf16 is not None:
        _like(op, "W_bf16", W_bf16, W.shape, torch.bfloat16, W)
        written["W_bf16"] = W_bf16
    if norms is not None:
        _like(op, "norms", norms, (3, W.shape[0]), torch.float32, W)
        written["norms"] = norms
    if grad_b_enc is not None and grad_b_dec is not None:
        _like(op, "grad_b_enc", grad_b_enc, (W.shape[0],), acc, W)
        _like(op, "grad_b_dec", grad_b_dec, (W.shape[1],), acc, W)
        written["grad_b_dec"] = grad_b_dec
    if grad_dot_w is not None:
        written["grad_dot_w"] = grad_dot_w
    _like(op, "hyper", hyper, (8,), acc, W)
    _writable(op, written)
    return T


def total_variance(y: Tensor) -> torch.dtype:
    _matrix("total_variance", "y", y)
    return y.dtype


def loss_terms(
    sq_errors: Sequence[Tensor], denominators: Sequence[Tensor], shares: Sequence[float]
) -> torch.dtype:
    op = "loss_terms"
    if not denominators:
        raise fail(op, "denominators", "at least one tensor", "none")
    first = denominators[0]
    acc = _accumulated(op, "denominators[0]", first)
    for arg, given in (("sq_errors", sq_errors), ("shares", shares)):
        if len(given) != len(denominators):
            raise fail(op, arg, f"{len(denominators)}, one for each of denominators", len(given))
    for g, (e, d) in enumerate(zip(sq_errors, denominators, strict=True)):
        _like(op, f"sq_errors[{g}]", e, (-1,), torch.float64, first)
        _like(op, f"denominators[{g}]", d, (), acc, first)
    return acc


def adam_scalars(
    loss: Tensor,
    norm: Tensor | None,
    clip_norm: float | None,
    scales: Tensor,
    lr: Tensor,
    t: Tensor,
    constants: Tensor,
) -> torch.dtype:
    op = "adam_scalars"
    acc = _accumulated(op, "loss", loss)
    _like(op, "loss", loss, (), acc, loss)
    _like(op, "scales", scales, (-1,), acc, loss)
    if (norm is None) != (clip_norm is None):
        raise fail(op, "norm", "given with clip_norm", "one without the other")
    if norm is not None:
        _like(op, "norm", norm, (), acc, loss)
    for arg, number, shape in (("lr", lr, ()), ("t", t, ()), ("constants", constants, (3,))):
        _like(op, arg, number, shape, torch.float64, loss)
    return acc


def vector_update(
    grads: Sequence[Tensor],
    scales: Tensor | None,
    minus: Tensor | None,
    taken: Tensor,
    hyper: Tensor,
    p: Tensor,
    master: Tensor | None,
    m: Tensor,
    v: Tensor,
) -> torch.dtype:
    op = "vector_update"
    if p.dtype not in FLOATS:
        raise TypeError(f"{op}: p must be one of {', '.join(map(str, FLOATS))}, got {p.dtype}")
    acc = accumulator(p.dtype)
    if not grads:
        raise fail(op, "grads", "at least one tensor", "none")
    if (master is None) != (acc == p.dtype):
        want = "a tensor" if master is None else "None"
        got = "None" if master is None else "a tensor"
        raise fail(op, "master", f"{want} for {p.dtype} weights", got)
    for g, t in enumerate(grads):
        _like(op, f"grads[{g}]", t, p.shape, acc, p)
    for arg, number in (("minus", minus), ("master", master), ("m", m), ("v", v)):
        if number is not None:
            _like(op, arg, number, p.shape, acc, p)
    if scales is not None:
        _like(op, "scales", scales, (len(grads),), acc, p)
    _like(op, "taken", taken, (), torch.bool, p)
    _like(op, "hyper", hyper, (8,), acc, p)
    _writable(op, {"p": p, "m": m, "v": v} | ({} if master is None else {"master": master}))
    return p.dtype


def _writable(op: str, written: dict[str, Tensor]) -> None:
    for arg, t in written.items():
        if not t.is_contiguous():
            raise fail(op, arg, "contiguous, for it is written", f"strides {_text(t.stride())}")


def _accumulated(op: str, arg: str, t: Tensor) -> torch.dtype:
    """The dtype of t, which must be one in which sums are kept."""
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {arg} must be torch.float32 or torch.float64, got {t.dtype}")
    return t.dtype
