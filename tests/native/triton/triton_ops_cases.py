# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter; test_triton_ops.py runs this file in a process of its
own. What of ../../ops is quick there is marked in its place; here are cases that only these kernels
have."""

from __future__ import annotations

from typing import Any

import triton_interpreter  # noqa: F401  first: sets the mode

# isort: split
import pytest
import torch
from cases import (
    SCORES,
    Implementation,
    assert_close,
    assert_same,
    clone_all,
    integers,
    norm_arguments,
    randn,
    row_arguments,
    scores,
    to_float64,
    written,
)
from implementations import INTERPRETED
from triton.runtime import interpreter

from ksae import reference
from ksae.backends import product as products
from ksae.backends.triton import Kernels
from ksae.kernels import gate
from ksae.kernels import topk as select
from ksae.ops import straight
from ksae.ops.specs import BY_NAME

T32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


pytestmark = pytest.mark.implementations(INTERPRETED)


def same(got: Any, want: Any) -> None:
    for name, g, w in zip(("first", "second"), got, want, strict=True):
        assert_same(name, g, w)


# ------------------------------------------------------------------------------------------- select


HALF = ("ties", "infinite", "nan", "zeros")


@pytest.mark.parametrize(
    ("kind", "T"), [(k, T32) for k in SCORES] + [(k, T) for k in HALF for T in (B16, F16)]
)
def test_topk(impl: Implementation, T: torch.dtype, kind: str) -> None:
    for F, k in ((1, 1), (33, 33), (130, 5), (700, 30)):
        x = scores(kind, 2, F, T)
        same(impl.topk(x, k), reference.topk(x, k))


def test_topk_with_its_own_sort(impl: Implementation) -> None:
    x = scores("few values", 2, 130, T32)
    same(impl.topk(x, 9), reference.topk(x, 9))


def test_topk_of_no_row_and_of_many_columns(impl: Implementation, dtype: torch.dtype) -> None:
    x = randn(1, 5_001, dtype=dtype)
    same(impl.topk(x, 9), reference.topk(x, 9))
    same(impl.topk(x[:0], 3), reference.topk(x[:0], 3))


@pytest.mark.parametrize("kind", ["descending", "ascending", "all equal", "nan"])
def test_buffer_of_candidates_overflows(impl: Implementation, kind: str) -> None:
    """The buffer is cut to the best k, several times a row."""
    N, F, k = 2, 1_500, 60
    x = scores("descending" if kind == "ascending" else kind, N, F, torch.float32)
    x = x.flip(1) if kind == "ascending" else x
    same(impl.topk(x, k), reference.topk(x, k))


@pytest.mark.parametrize("kind", ["ties", "nan", "zeros"])
def test_k_beyond_the_buffer(impl: Implementation, dtype: torch.dtype, kind: str) -> None:
    k = select.MAX_K + 1
    x = scores(kind, 2, 300, dtype)
    same(impl.topk(x, k), reference.topk(x, k))
    x, W, b = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(3, 5), (300, 5), (300,)]))
    mask = torch.arange(300) % 3 == 0
    args = (x, W, b, k, None, mask)
    same(impl.topk_encode(*args), reference.topk_encode(*args))


@pytest.mark.parametrize(("F", "k"), [(24576, 32), (131072, 64), (131072, 512), (9, 9), (2**24, 1)])
def test_groups_of_columns(F: int, k: int) -> None:
    group = select.group_of(F, k)
    assert group & (group - 1) == 0 and 1 <= group <= select.ROUND


# ------------------------------------------------------------------------------------------- encode


def test_encode_in_chunks_of_rows(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    N, d, F, k = 7, 5, 40, 6
    x, W, b = (integers(*s, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    for rows in (0, 1, 3):
        monkeypatch.setattr(products, "chunk_bytes", rows * F * 8 + 3)
        same(impl.topk_encode(x, W, b, k), reference.topk_encode(x, W, b, k))
        args = (x, x.flip(0), W, b, W.flip(0), k, 0.5)
        same(impl.grad_topk_encode(*args), reference.grad_topk_encode(*args))


@pytest.mark.parametrize("mode", ["additive", "multiplicative", "signed"])
def test_gradient_aware_encode(impl: Implementation, dtype: torch.dtype, mode: str) -> None:
    """Halves and integers: scores are exact. Rows without a usable gradient are scored by u."""
    N, d, F, k = 5, 9, 150, 11
    x, W, b = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    g, W_dec = integers(N, 7, dtype=dtype, seed=3), integers(F, 7, dtype=dtype, seed=4)
    g[1], g[2, 3], g[3, 0] = 0, torch.nan, torch.inf
    W_dec[4, 2] = torch.inf  # 0 * inf: a NaN score comes first
    b_dec = integers(d, dtype=dtype, seed=5)
    for beta, centre in ((0.5, None), (0.0, b_dec)):
        args = (x, g, W, b, W_dec, k, beta, mode, centre)
        same(impl.grad_topk_encode(*args), reference.grad_topk_encode(*args))


@pytest.mark.parametrize("T", [T32, F16])
def test_fused_encodes(impl: Implementation, T: torch.dtype) -> None:
    """The other way to encode; a k that it does not take goes the way of the product."""
    N, d, F = 2, 5, 1_030
    x, W, b = (integers(*s, dtype=T, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    for W_, b_, k in ((W[:40], b[:40], 3), (W, b, 1_025)):
        args = (x, W_, b_, k, x[0], b_ > 0)
        same(impl.fused_topk_encode(*args), reference.topk_encode(*args))
        args = (x, x.flip(0), W_, b_, W_.flip(0), k, 0.5, "signed", x[0])
        same(impl.fused_grad_topk_encode(*args), reference.grad_topk_encode(*args))


@pytest.mark.parametrize("way", ["product", "fused", "fused, k_aux too large"])
def test_both_selections_of_a_step(
    impl: Implementation, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, d, F, k = 2, 5, 60, 4
    if "large" in way:
        monkeypatch.setattr(gate, "MAX_K", 11)
    encode = impl.topk_encode_aux if way == "product" else impl.fused_topk_encode_aux
    x, W, b = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    dead = torch.arange(F) % 7 == 0
    for downstream in ((), (x.flip(0), W.flip(0), 0.5, "additive")):
        args = (x, W, b, k, 12, dead, x[0], *downstream)
        got, want = encode(*args), reference.topk_encode_aux(*args)
        same(got[:2], want[:2])
        same(got[2:], want[2:])


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 70, 33), (3, 130, 65), (0, 4, 5)])
def test_float32_products_of_any_strides(impl: Implementation, shape: tuple[int, int, int]) -> None:
    M, K, N = shape
    a, b = integers(K, M).T, integers(K, 2 * N, seed=1)[:, ::2]
    assert_same("product", products._without_tf32(a, b), a @ b)
    assert_same(
        "transposed", products._without_tf32(a.contiguous(), integers(N, K).T), a @ integers(N, K).T
    )


# --------------------------------------------------------------------------------- decode and group


def test_residual_in_chunks_of_rows(
    impl: Implementation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, d, F, k = 5, 9, 20, 3
    values, W = integers(N, k, dtype=dtype).abs(), integers(F, d, dtype=dtype, seed=1)
    indices = torch.arange(N * k).reshape(N, k) % F
    args = (values, indices, W, W[0], integers(N, d, dtype=dtype, seed=2), 4)
    for rows in (0, 2, 5):
        monkeypatch.setattr(products, "chunk_bytes", 4 * d * rows)
        for got, want in zip(
            impl.sparse_residual(*args), reference.sparse_residual(*args), strict=True
        ):
            assert_same(f"{rows} rows", got, want)


@pytest.mark.parametrize("lengths", [None, [2, 0, 5]], ids=["k a row", "row offsets"])
def test_decode_loads_nothing_past_the_end(
    impl: Implementation, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what it would not use: on a GPU it may be another's memory."""
    offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    values, indices = integers(3, 5).abs() + 1, torch.arange(15).reshape(3, 5) % 9
    if offsets is not None:
        values, indices = values.reshape(-1, 1)[:7].clone(), indices.reshape(-1, 1)[:7].clone()
    W, target = integers(9, 21, seed=1), integers(3, 21, seed=2)
    given = [t for t in (values, indices, W, target, offsets) if t is not None]
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in given]
    load, outside, loads = interpreter.InterpreterBuilder.create_masked_load, [], []

    def looked_at(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        live = ptrs.data[mask.data]
        loads.append(live.size)
        outside.extend(a for a in live if not any(low <= a < high for low, high in spans))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", looked_at)
    recon = impl.sparse_decode(values, indices, W, None, offsets)
    part = impl.sparse_residual_slice(values, indices, W, None, target, 3, 21, offsets)
    if offsets is None:
        impl.sparse_decode_backward_values(target, indices, W)
    monkeypatch.undo()
    assert sum(loads) > 300 and not outside
    assert torch.equal(recon, reference.sparse_decode(values, indices, W, None, offsets))
    assert torch.equal(part, (recon - target)[:, 3:])


# -------------------------------------------------------------------------------------- latent pass


def test_rng_state_is_left_to_the_reference(impl: Implementation) -> None:
    """The kernel declares it by naming no such argument."""
    assert straight.unserved(Kernels().row_update, BY_NAME["row_update"]) == ("rng_state",)


def test_the_shadow_in_slices_is_the_rounded_weight(impl: Implementation) -> None:
    a = row_arguments(T32, "decoder")
    W_bf16 = torch.zeros_like(a["W"]).bfloat16()
    for start, stop in ((0, 12), (12, 23)):
        part = [r[:, start:stop].contiguous() for r in a["rows"]]
        last = {"rows": part, "start": start, "normalize": stop == 23}
        impl.row_update(*(a | last).values(), W_bf16)
    assert_same("W_bf16", W_bf16, a["W"].bfloat16())


def test_one_latent_takes_every_token(impl: Implementation, dtype: torch.dtype) -> None:
    N, d, F = 70, 9, 33
    grad, values = integers(N, d, dtype=dtype), integers(N, 1, dtype=dtype, seed=1).abs()
    args = (grad, values, torch.full((N, 1), 32), F)
    got = impl.sparse_decode_backward_weight(*args)
    same(got, reference.sparse_decode_backward_weight(*args))
    assert (got[0][:32] == 0).all()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_hot_latents_are_cut(impl: Implementation, side: str) -> None:
    """Segments of several cuts that begin and end inside of them, and two that share one."""
    N, F, d = 60, 7, 23
    a = row_arguments(torch.float32, side, N=N, d=d, F=F, ks=(2, 3))
    for g, k in enumerate((2, 3)):
        values = torch.rand(N, k, generator=torch.Generator().manual_seed(g))
        indices = torch.full((N, k), 2)
        indices[:, 1] = 4
        indices[::9] = 5
        indices[1::9, 0] = 0
        a["offsets"][g], a["order"][g] = reference.group_by_latent(values, indices, F)
        a["coefficients"][g] = values
    plain, exact = clone_all(a), to_float64(a)
    got, want = (i.row_grad_sq(*norm_arguments(a)) for i in (impl, reference))
    eps = torch.finfo(torch.float32).eps
    assert_close("grad_sq", got, want, reference.row_grad_sq(*norm_arguments(exact)), eps)
    impl.row_update(*a.values())
    reference.row_update(*plain.values())
    reference.row_update(*exact.values())
    for name, t in written(a).items():
        assert_close(name, t, written(plain)[name], written(exact)[name])
