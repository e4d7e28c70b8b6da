# SPDX-License-Identifier: Apache-2.0
"""The ops that select: the largest pre-activations of each row, of a batch, or above thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import env
from ...reference.dtypes import MODES
from ...reference.encode import refuse_entries
from ..bridge import DTYPES, pointer
from .calls import _cpu, _Workspace

_ROUTES = ("auto", "dual", "pruned")  # of grad_topk_encode; as in ksae/cpu.h, as is MODES
screening = env.read("KSAE_SCREEN") != "off"


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    N, F = x.shape
    values, indices = x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)
    _cpu.topk(
        N, F, k, DTYPES[x.dtype], pointer(x), pointer(values), pointer(indices), _Workspace(),
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
        N, d, F, k, DTYPES[x.dtype], pointer(x), pointer(W_enc), pointer(b_enc),
        pointer(b_dec), pointer(mask), pointer(values), pointer(indices),
        screen, slack, product_only, pointer(scores), _Workspace(), torch.get_num_threads(),
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
        N, d, F, k, DTYPES[x.dtype], pointer(x), pointer(W_enc), pointer(b_enc),
        pointer(b_dec), pointer(values), pointer(indices), pointer(row_offsets), screen, slack,
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
        N, d, F, k, DTYPES[x.dtype], pointer(x), pointer(W_enc), pointer(b_enc),
        pointer(b_dec), pointer(values), pointer(indices), screen, slack,
        d_out, pointer(grad), pointer(W_dec), MODES.index(mode), beta, _ROUTES.index(route),
        pointer(scores), _Workspace(), torch.get_num_threads(),
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
        N, d, F, DTYPES[x.dtype], pointer(x), pointer(W_enc), pointer(b_enc), pointer(b_dec),
        pointer(theta), pointer(above), pointer(row_offsets),
    )  # fmt: skip
    _cpu.threshold_encode_count(*of_all, screen, slack, _Workspace(), torch.get_num_threads())
    refuse_entries(E := int(row_offsets[-1]))
    values, latents = x.new_empty(E), x.new_empty(E, dtype=torch.int64)
    _cpu.threshold_encode_fill(
        *of_all, pointer(values), pointer(latents), _Workspace(), torch.get_num_threads()
    )
    return values, latents, row_offsets
