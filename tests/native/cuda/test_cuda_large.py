# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 numbers on a GPU: what lies past that place is found there.

Each case compares rows or latents at the end of a large tensor with the same ones alone. Needs some
40 GB of the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_same
from implementations import as_op
from torch import Tensor

from ksae import ops
from ksae.backends import triton
from ksae.reference.dtypes import ENTRIES

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PAST = 2**31  # numbers of the large tensor, at least
WIDE = 2**16
LAST = 5  # rows or latents that are compared
T = torch.bfloat16


class Kernels:
    """The ops by the kernels of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getattr__(self, op: str) -> Any:
        if self.kind == "ops":
            return getattr(ops, op)
        fused = f"fused_{op}"
        own = fused if self.kind == "triton-fused" and hasattr(triton.kernels, fused) else op
        return as_op(op, getattr(triton.kernels, own))


@pytest.fixture(params=["ops", "triton", "triton-fused"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param)


def integers(*shape: int) -> Tensor:
    """Small integers: sums are exact in any order."""
    return torch.randint(-2, 3, shape, device=DEVICE).to(T)


def large(rows: int, columns: int) -> Tensor:
    """Zeros but for the last rows."""
    t = torch.zeros(rows, columns, dtype=T, device=DEVICE)
    t[-LAST:] = integers(LAST, columns)
    return t


def rows_past() -> int:
    return PAST // WIDE + LAST


def test_scores_of_more_rows_than_int32_counts_numbers(kernels: Kernels) -> None:
    x = large(rows_past(), WIDE)
    got, want = kernels.topk(x, 9), kernels.topk(x[-LAST:].contiguous(), 9)
    for g, w in zip(got, want, strict=True):
        assert_same("topk", g[-LAST:], w)
    assert (got[1][:-LAST] == torch.arange(9, device=DEVICE)).all()


def test_an_encode_of_more_weights_than_int32_counts(kernels: Kernels) -> None:
    F, k = rows_past(), 3
    W, x = large(F, WIDE), integers(2, WIDE)
    b = torch.zeros(F, dtype=T, device=DEVICE)
    b[:-LAST] = -1e4
    values, indices = kernels.topk_encode(x, W, b, k)
    alone = kernels.topk_encode(x, W[-LAST:].contiguous(), b[-LAST:].contiguous(), k)
    assert_same("values", values, alone[0])
    assert_same("indices", indices, alone[1] + F - LAST)


def test_an_encode_of_more_activations_than_int32_counts(kernels: Kernels) -> None:
    x, W, b = large(rows_past(), WIDE), integers(40, WIDE), integers(40)
    got, want = (kernels.topk_encode(t, W, b, 3) for t in (x, x[-LAST:].contiguous()))
    for g, w in zip(got, want, strict=True):
        assert_same("topk_encode", g[-LAST:], w)


def code_of_the_last(N: int, F: int, k: int) -> tuple[Tensor, Tensor]:
    """Of the last latents alone."""
    values = torch.randint(0, 3, (N, k), device=DEVICE).to(T)
    return values, F - LAST + torch.randint(0, LAST, (N, k), device=DEVICE)


def test_a_decoder_of_more_weights_than_int32_counts(kernels: Kernels) -> None:
    N, k, F = 7, 3, rows_past()
    (values, indices), W = code_of_the_last(N, F, k), large(F, WIDE)
    few, own = W[-LAST:].contiguous(), indices - F + LAST
    target = integers(N, WIDE)
    assert_same(
        "decode", kernels.sparse_decode(values, indices, W), kernels.sparse_decode(values, own, few)
    )
    got, want = (
        kernels.sparse_residual(values, i, w, None, target, WIDE)
        for i, w in ((indices, W), (own, few))
    )
    for g, w in zip(got, want, strict=True):
        assert_same("residual", g, w)
    assert_same(
        "gradient of values",
        kernels.sparse_decode_backward_values(target, indices, W),
        kernels.sparse_decode_backward_values(target, own, few),
    )
    del W
    got, want = (
        kernels.sparse_decode_backward_weight(target, values, i, n)
        for i, n in ((indices, F), (own, LAST))
    )
    assert_same("gradient of W", got[0][-LAST:], want[0])
    assert_same("sum of values", got[1][-LAST:], want[1])


def test_reconstructions_of_more_tokens_than_int32_counts(kernels: Kernels) -> None:
    N, F, k = rows_past(), 9, 2
    W, target = integers(F, WIDE), integers(1, WIDE).expand(N, WIDE).contiguous()
    values = torch.randint(0, 3, (N, k), device=DEVICE).to(T)
    indices = torch.randint(0, F, (N, k), device=DEVICE)
    last = (values[-LAST:].contiguous(), indices[-LAST:].contiguous(), W)
    assert_same(
        "decode", kernels.sparse_decode(values, indices, W)[-LAST:], kernels.sparse_decode(*last)
    )
    got = kernels.sparse_residual(values, indices, W, None, target, 4)
    want = kernels.sparse_residual(*last, None, target[-LAST:].contiguous(), 4)
    for g, w in zip(got, want, strict=True):
        assert_same("residual", g[-LAST:], w)
    only = torch.zeros_like(values)
    only[-LAST:] = values[-LAST:]
    grad_W, _ = kernels.sparse_decode_backward_weight(target, only, indices, F)
    alone, _ = kernels.sparse_decode_backward_weight(target[-LAST:].contiguous(), *last[:2], F)
    assert_same("gradient of W", grad_W, alone)


def test_a_code_of_more_slots_than_int32_counts_is_decoded(kernels: Kernels) -> None:
    """N * k past 2^31: positions of a row are counted from its first slot."""
    N, F, d = rows_past(), 9, 8
    values, W = large(N, WIDE).abs(), integers(F, d)
    indices = torch.zeros(N, WIDE, dtype=torch.int32, device=DEVICE)
    indices[-LAST:] = torch.randint(0, F, (LAST, WIDE), device=DEVICE, dtype=torch.int32)
    want = kernels.sparse_decode(values[-LAST:].contiguous(), indices[-LAST:].contiguous(), W)
    assert_same("decode", kernels.sparse_decode(values, indices, W)[-LAST:], want)
    rows = torch.zeros(N, d, dtype=T, device=DEVICE)
    rows[-LAST:] = integers(LAST, d)
    products = kernels.sparse_decode_backward_values(rows, indices, W)
    alone = (rows[-LAST:].contiguous(), indices[-LAST:].contiguous(), W)
    assert_same("products", products[-LAST:], kernels.sparse_decode_backward_values(*alone))


def test_as_many_entries_as_are_allowed_are_grouped(kernels: Kernels) -> None:
    """One latent has nearly all of them, the last two are another's: no loop steps past 2^31."""
    values = torch.ones(ENTRIES, 1, dtype=T, device=DEVICE)
    indices = torch.zeros(ENTRIES, 1, dtype=torch.int32, device=DEVICE)
    indices[-2:] = 1
    offsets, order = kernels.group_by_latent(values, indices, 2)
    assert offsets.tolist() == [0, ENTRIES - 2, ENTRIES]
    assert order[-3:].tolist() == [ENTRIES - 3, ENTRIES - 2, ENTRIES - 1]
    _, sums = kernels.sparse_decode_backward_weight(values, values, indices, 2)
    assert sums.tolist() == [torch.tensor(float(ENTRIES - 2)).to(T), 2]


def test_a_matrix_of_more_numbers_than_int32_counts_is_updated(kernels: Kernels) -> None:
    """The row pass over the last rows, which are those with a gradient."""
    F = rows_past()
    values, last = torch.ones(LAST, 1, device=DEVICE), torch.arange(LAST, device=DEVICE)[:, None]
    rows, W = integers(LAST, WIDE).float(), large(F, WIDE).float()
    results = []
    for n in (LAST, F):
        w = W[-n:].clone() if n < F else W
        offsets, order = kernels.group_by_latent(values, n - LAST + last, n)
        m, v = torch.zeros_like(w), torch.ones_like(w)
        kernels.row_update(
            coefficients=[values], offsets=[offsets], order=[order], rows=[rows],
            scales=torch.ones(1, device=DEVICE), centre=None, grad_dot_w=None,
            grad_b_enc=None, W=w, master=None, m=m, v=v,
            hyper=torch.tensor([1e-2, 0.7, 0.9, 0.99, 1e-8, 1.0, 0.1, 0.01], device=DEVICE),
            grad_b_dec=None, start=0, normalize=True,
        )  # fmt: skip
        results.append([t[-LAST:].clone() for t in (w, m, v)])
        del w, m, v
    for name, alone, got in zip(("W", "m", "v"), *results, strict=True):
        assert_same(name, got, alone)
    assert (results[0][1] != 0).any()
