# SPDX-License-Identifier: Apache-2.0
"""Every op, stated once: a line each in the grammar of spec.py.

N tokens, d width, F latents, k active latents per token, G terms of a loss, P prefixes. What the
arguments mean is said where the meaning is, in `ksae.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.dtypes import ENTRIES, MODES
from .messages import fail, text, wrong_type
from .spec import Spec


def _bf16_of_float32(op: str, W_bf16: Tensor | None, T: torch.dtype) -> None:
    """A copy in bfloat16 is one of float32 weights."""
    if W_bf16 is not None and T is not torch.float32:
        raise fail(op, "W_bf16", f"None for {T} weights", "a tensor")


def _one_choice(op: str, mask: Tensor | None, grad: Tensor | None) -> None:
    if mask is not None and grad is not None:
        raise fail(op, "mask", "None with grad", "a tensor")


def _entries(op: str, E: int, k: int, values: Tensor) -> None:
    if E * k > ENTRIES:
        raise fail(op, "values", f"of at most {ENTRIES} entries", text(values.shape))


def _batch(op: str, N: int, k: int) -> None:
    if N * k > ENTRIES:
        raise fail(op, "k", f"at most {ENTRIES // N} for {N} rows", k)


def _ordered(op: str, start: int, stop: int, d: int) -> None:
    if not 0 <= start <= stop <= d:
        raise fail(op, "start and stop", f"ordered in [0, {d}]", f"{start} and {stop}")


def _rows(
    op: str,
    coefficients: Sequence[Tensor],
    rows: Sequence[Tensor],
    W: Tensor,
    scales: Tensor,
    start: int,
    d: int,
    columns: int,
    row_of: Sequence[Tensor] | None,
) -> None:
    """Coefficients are stored ones, or wide where rows are stored; rows lie within W."""
    stored, wide, kind = W.dtype, scales.dtype, rows[0].dtype
    want = stored
    if kind == stored and len(coefficients) > 0 and coefficients[0].dtype == wide:
        want = wide
    for g, t in enumerate(coefficients):
        if t.dtype != want:
            raise wrong_type(op, f"coefficients[{g}]", str(want), t)
    for g, t in enumerate(rows):
        if t.dtype != kind:
            raise wrong_type(op, f"rows[{g}]", str(kind), t)
    for g, t in enumerate(coefficients):
        if row_of is None and len(t) != len(rows[g]):
            shape = f"of shape [{len(rows[g])}, {t.shape[1]}]"
            raise fail(op, f"coefficients[{g}]", shape, text(t.shape))
    if not 0 <= start <= d - columns:
        raise fail(op, "start", f"in [0, {d - columns}] for {columns} columns of {d}", start)


def _master(
    op: str, master: Tensor | None, T: torch.dtype, A: torch.dtype, rounded: bool = False
) -> None:
    """A master is kept of weights that are narrower than sums, unless they are rounded randomly."""
    if (master is None) != (A == T or rounded):
        weights = f"{T} weights" + (" with rng_state" if rounded else "")
        want, got = ("a tensor", "None") if master is None else ("None", "a tensor")
        raise fail(op, "master", f"{want} for {weights}", got)


def _kept(op: str, master: Tensor | None, T: torch.dtype, A: torch.dtype) -> None:
    _master(op, master, T, A)


def _update(
    op: str,
    master: Tensor | None,
    rng_state: Tensor | None,
    W_bf16: Tensor | None,
    norms: Tensor | None,
    T: torch.dtype,
    A: torch.dtype,
) -> None:
    if rng_state is not None and T is not torch.bfloat16:
        raise TypeError(f"{op}: W must be torch.bfloat16 with rng_state, got {T}")
    _master(op, master, T, A, rng_state is not None)
    _bf16_of_float32(op, W_bf16, T)
    if norms is not None and W_bf16 is None:
        raise fail(op, "W_bf16", "given with norms", "None")


def _updated_rows(
    op: str,
    coefficients: Sequence[Tensor],
    rows: Sequence[Tensor],
    W: Tensor,
    scales: Tensor,
    start: int,
    d: int,
    columns: int,
    row_of: Sequence[Tensor] | None,
    rng_state: Tensor | None,
    norms: Tensor | None,
    grad_b_dec: Tensor | None,
    grad_dot_w: Tensor | None,
    normalize: bool,
) -> None:
    _rows(op, coefficients, rows, W, scales, start, d, columns, row_of)
    if grad_b_dec is not None and (grad_dot_w is not None or normalize):
        raise fail(op, "grad_b_dec", "None with grad_dot_w or normalize", "a tensor")
    stored = coefficients[0].dtype if coefficients else scales.dtype
    if grad_b_dec is not None and stored != scales.dtype and rows[0].dtype == stored:
        want = f"{scales.dtype} with grad_b_dec and rows of {stored}"
        raise wrong_type(op, "coefficients[0]", want, coefficients[0])
    if rng_state is not None and start % 4:  # four columns share their random words
        raise fail(op, "start", "a multiple of 4 with rng_state", start)
    if columns != d:
        for name, t in (("norms", norms), ("grad_b_dec", grad_b_dec)):
            if t is not None:
                raise fail(op, "rows[0]", f"{d} columns with {name}", columns)


_MODE = f"mode:{'|'.join(MODES)}=additive"
_ENCODER = "x:T[N,d] W_enc:T[F,d] b_enc:T[F] k:1..F@W_enc"
_BF16 = "W_bf16:bf16[F,d]?~ norms:f32[3,F]?W_bf16~"
# Products with a residual, which is float32, are of narrower weights too.
_WEIGHT = (
    "T if W_dec.dtype is T or T is not A or not W_dec.is_floating_point()"
    " or W_dec.itemsize != 2 or T.itemsize != 4 else W_dec.dtype"
)
_CODE = "values:T[E,k] indices:index(F)[E,k]"
_OFFSETS = "row_offsets:offsets(E)[N+1]?"
_RESIDUAL = f"{_CODE} W_dec:T[F,d] b_dec:T[d]? target:T|A[N,d]"
_PREFIXES = "widths:i64[P] shares:A[P]"
_GROUPED = "offsets:i32[F+1]* order:i32[N_g*k_g]*"
_ROW_OF = "row_of:i32[N_g*k_g]*?"
_ROWS = (
    f"coefficients:T|A[N_g,k_g]* {_GROUPED} rows:A|T[R_g,columns]* scales:A[G]"
    " centre:rows[columns]?"
)

SPECS = (
    Spec("topk", "x:T[N,F] k:1..F@x -> values:T[N,k] indices:i64[N,k]"),
    Spec(
        "topk_encode",
        f"{_ENCODER} b_dec:T[d]? mask:bool[F]? {_BF16} -> values:T[N,k] indices:i64[N,k]",
        given=_bf16_of_float32,
    ),
    Spec(
        "grad_topk_encode",
        "x:T[N,d] grad:T[N,d_out] W_enc:T[F,d] b_enc:T[F] W_dec:T[F,d_out=] k:1..F@W_enc"
        f" beta:0..inf {_MODE} b_dec:T[d]? -> values:T[N,k] indices:i64[N,k]",
    ),
    Spec(
        "topk_encode_aux",
        f"{_ENCODER} k_aux:1..F@W_enc dead:bool[F] b_dec:T[d]? grad:T[N,d_out]?W_dec"
        f" W_dec:T[F,d_out=]? beta:0..inf=0 {_MODE} {_BF16}"
        " -> values:T[N,k] indices:i64[N,k] aux_values:T[N,k_aux] aux_indices:i64[N,k_aux]",
        given=_bf16_of_float32,
    ),
    Spec(
        "scored_encode",
        f"{_ENCODER} b_dec:T[d]? mask:bool[F]? grad:T[N,d_out]?W_dec W_dec:T[F,d_out=]?"
        f" beta:0..inf=0 {_MODE} -> values:T[N,k] indices:i64[N,k] scores:A[N,k]",
        given=_one_choice,
    ),
    Spec(
        "batch_topk_encode",
        f"{_ENCODER} b_dec:T[d]? -> values:T[N*k] indices:i64[N*k] row_offsets:i64[N+1]",
        relations=_batch,
    ),
    Spec(
        "threshold_encode",
        "x:T[N,d] W_enc:T[F,d] b_enc:T[F] theta:T|A[F] b_dec:T[d]?"
        " -> values:T[E] latents:i64[E] row_offsets:i64[N+1]",
    ),
    Spec(
        "sparse_decode",
        f"{_CODE} W_dec:T[F,d] b_dec:T[d]? {_OFFSETS} partial:bool=False -> recon:sum[N,d]",
        types={"sum": "A if partial else T"},
    ),
    Spec(
        "sparse_decode_backward_values",
        f"grad:T[N,d] indices:index(F)[E,k] W_dec:weight[F,d] {_OFFSETS} -> grad_values:T[E,k]",
        types={"weight": _WEIGHT},
    ),
    Spec(
        "sparse_decode_backward_weight",
        f"grad:T[N,d] {_CODE} F:1..{ENTRIES} {_OFFSETS} -> grad_W:T[F,d] value_sum:T[F]",
        relations=_entries,
    ),
    Spec(
        "group_by_latent",
        f"{_CODE} F:1..{ENTRIES} -> offsets:i32[F+1] order:i32[E*k]",
        relations=_entries,
    ),
    Spec(
        "sparse_residual",
        f"{_RESIDUAL} columns:0..d column_sums!:A[d]? {_OFFSETS} rounded!:T[N,d]?"
        " -> residual:A[N,columns] sq_error:f64[N] grad_values:A[E,k]",
    ),
    Spec(
        "sparse_residual_slice",
        f"{_RESIDUAL} start:int stop:int {_OFFSETS} -> residual:A[N,stop-start]",
        relations=_ordered,
    ),
    Spec(
        "prefix_residual",
        f"{_RESIDUAL} {_PREFIXES} columns:0..d {_OFFSETS}"
        " -> residual:A[P,N,columns] sq_errors:f64[P,N] grad_values:A[E,k]",
    ),
    Spec(
        "prefix_residual_slice",
        f"{_RESIDUAL} {_PREFIXES} start:int stop:int {_OFFSETS} -> residual:A[P,N,stop-start]",
        relations=_ordered,
    ),
    Spec(
        "latent_sums",
        f"values:T[N_g,k_g]* grads:A[N_g,k_g]* {_GROUPED} scales:A[G]"
        " -> grad_b_enc:A[F] grad_dot_w:A[F]",
    ),
    Spec(
        "row_grad_sq",
        f"{_ROWS} grad_dot_w:A[F]? W:T[F,d] start:int {_ROW_OF} -> grad_sq:f64[F]",
        relations=_rows,
    ),
    Spec(
        "row_update",
        f"{_ROWS} grad_dot_w!:A[F]? grad_b_enc:A[F]? W!:T[F,d] master!:A[F,d]? m!:moment[F,d]"
        " v!:moment[F,d] hyper:A[8] grad_b_dec!:A[d]?grad_b_enc start:int normalize:bool"
        " W_bf16!:bf16[F,d]? rng_state:i64[2]? norms!:f32[3,F]?"
        f" {_ROW_OF} ->",
        given=_update,
        relations=_updated_rows,
        types={"moment": "A if rng_state is None else T"},
    ),
    Spec("total_variance", "y:T[N,d] -> variance:A[]"),
    Spec(
        "loss_terms",
        "sq_errors:f64[n_g]* denominators:A[]* shares:float*"
        " -> errors:A[G] terms:A[G] loss:A[] scales:A[G]",
    ),
    Spec(
        "adam_scalars",
        "loss:A[] norm:A[]?clip_norm clip_norm:float? scales:A[S] lr:f64[] t:f64[]"
        " constants:f64[3] decoder_lr:0..inf=1 always:bool=False"
        " -> hyper:A[8] taken:bool[] taken_scales:A[S] of_decoder:A[8]",
    ),
    Spec(
        "count_tokens",
        "loss:A[] taken:bool[] offsets:i32[F+1] since!:i64[F] t!:f64[] tokens:int dead_after:int"
        " within:int -> l0:A[] dead:A[] soon:i64[]",
    ),
    Spec(
        "vector_update",
        "grads:A[...]* scales:A[G]? minus:A[...]? taken:bool[] hyper:A[8] p!:T[...]"
        " master!:A[...]? m!:A[...] v!:A[...] ->",
        given=_kept,
    ),
)
BY_NAME = {spec.name: spec for spec in SPECS}
