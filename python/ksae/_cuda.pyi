# SPDX-License-Identifier: Apache-2.0
# Built only where nvcc was found. Functions raise RuntimeError with the reason, such as no driver.
from collections.abc import Callable, Sequence
from typing import Any

architectures: str
# Of the ops that state their native parameters themselves: those of each. They are functions of
# the module too, called by ksae.backends.bridge.
fields: dict[str, tuple[Any, ...]]

def runtime_version() -> int: ...
def driver_version() -> int: ...
def device_count() -> int: ...

# Pointers and streams are integers; `allocate` turns a number of bytes into a pointer.
_Allocate = Callable[[int], int]
# Entries a row, or a tuple of the address of row offsets, or where entries are taken one by one of
# the row of each.
_Code = int | tuple[int]

def select(
    rows: int,
    F: int,
    k: int,
    score_dtype: int,
    dtype: int,
    scores: int,
    second: int,
    mode: int,
    beta: float,
    informed: int,
    bias: int,
    scale: int,
    columns: int,
    relu: bool,
    values: int,
    indices: int,
    allocate: _Allocate,
    stream: int,
) -> None: ...
def list_columns(F: int, mask: int, columns: int, stream: int) -> None: ...
def bf16_copy(rows: int, d: int, t: int, copy: int, norms: int, stream: int) -> None: ...
def screened_groups(F: int, k: int) -> int: ...
def screened(
    step: str,
    N: int,
    d: int,
    F: int,
    k: int,
    first: int,
    rows: int,
    capacity: int,
    scores: int,
    given: list[int],
    allocate: _Allocate,
    stream: int,
) -> None: ...
def sparse_decode(
    N: int,
    d: int,
    F: int,
    k: _Code,
    dtype: int,
    values: int,
    indices: int,
    index_bytes: int,
    W_dec: int,
    b_dec: int,
    out: int,
    out_float: bool,
    stream: int,
) -> None: ...
def sparse_residual(
    N: int,
    d: int,
    F: int,
    k: _Code,
    dtype: int,
    values: int,
    indices: int,
    index_bytes: int,
    W_dec: int,
    b_dec: int,
    target: int,
    target_float: bool,
    start: int,
    columns: int,
    residual: int,
    sq_error: int,
    grad_values: int,
    column_sums: int,
    rounded: int,
    allocate: _Allocate,
    stream: int,
) -> None: ...
def sparse_decode_backward_values(
    N: int,
    d: int,
    F: int,
    k: _Code,
    dtype: int,
    grad: int,
    indices: int,
    index_bytes: int,
    W_dec: int,
    out: int,
    grad_float: bool,
    stream: int,
) -> None: ...
def sparse_decode_backward_weight(
    N: int,
    d: int,
    F: int,
    k: _Code,
    dtype: int,
    grad: int,
    values: int,
    offsets: int,
    order: int,
    grad_W: int,
    value_sum: int,
    allocate: _Allocate,
    stream: int,
) -> None: ...
def group_by_latent(
    N: int,
    F: int,
    k: int,
    dtype: int,
    values: int,
    indices: int,
    index_bytes: int,
    offsets: int,
    order: int,
    allocate: _Allocate,
    stream: int,
) -> None: ...
def total_variance(
    N: int, d: int, dtype: int, y: int, variance: int, allocate: _Allocate, stream: int
) -> None: ...
def loss_terms(
    terms: Sequence[tuple[int, int, int, float]],
    errors: int,
    of_terms: int,
    loss: int,
    scales: int,
    stream: int,
) -> None: ...
def adam_scalars(
    loss: int,
    norm: int,
    clip_norm: float,
    scales: int,
    n_scales: int,
    lr: int,
    t: int,
    constants: int,
    decoder_lr: float,
    always: bool,
    hyper: int,
    taken: int,
    taken_scales: int,
    of_decoder: int,
    stream: int,
) -> None: ...
def vector_update(
    size: int,
    dtype: int,
    grads: Sequence[int],
    scales: int,
    minus: int,
    taken: int,
    hyper: int,
    p: int,
    master: int,
    m: int,
    v: int,
    stream: int,
) -> None: ...
