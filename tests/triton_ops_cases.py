# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter; test_triton_ops.py runs this file in a process of its
own. The tests of test_ops.py that are quick there, and cases that only these kernels have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import triton_interpreter  # noqa: F401  first: sets the mode

# isort: split
import pytest
import test_bf16_copy
import test_contracts
import test_ops
import torch
import triton.language as tl
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
from test_bf16_copy import (  # noqa: F401
    test_a_step_that_is_not_taken_leaves_both,
    test_norms_are_of_the_row_as_it_is_stored,
    test_norms_of_special_rows,
)
from test_ops import (  # noqa: F401  (collected here with the `impl` below)
    test_decode_of_special_numbers,
    test_latent_sums,
)
from test_small_ops import (  # noqa: F401  (collected here with the `impl` below)
    test_adam_scalars,
    test_adam_scalars_of_a_step_that_is_not_taken,
    test_loss_terms,
    test_loss_terms_without_a_denominator,
    test_total_variance,
    test_total_variance_of_large_numbers,
    test_total_variance_of_what_is_not_finite,
    test_vector_update,
    test_vector_update_that_is_not_taken,
)
from triton_sort import numpy_sort

from ksae import reference
from ksae.backends import product as products
from ksae.backends.triton import Kernels
from ksae.kernels import gate, select
from ksae.ops import register

T32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


class Interpreted(Implementation):
    """The kernels as ops.py calls them: with contiguous tensors."""

    def __init__(self) -> None:
        super().__init__("triton-interpreted")
        self.kernels = Kernels()

    def __getattr__(self, op: str) -> Any:
        kernel = getattr(self.kernels, op)
        return lambda *args: kernel(*map(contiguous, args))


class Fused(Interpreted):
    """Encodes the other way."""

    def __getattr__(self, op: str) -> Any:
        fused = f"fused_{op}"
        return super().__getattr__(fused if hasattr(self.kernels, fused) else op)


def contiguous(arg: Any) -> Any:
    if isinstance(arg, list):
        return [contiguous(a) for a in arg]
    return arg.contiguous() if isinstance(arg, torch.Tensor) else arg


@pytest.fixture(params=["triton-interpreted"])
def impl(poison: None) -> Iterator[Implementation]:
    yield Interpreted()


def same(got: Any, want: Any) -> None:
    for name, g, w in zip(("first", "second"), got, want, strict=True):
        assert_same(name, g, w)


@pytest.fixture(autouse=True)
def quick_sort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's sort for Triton's, which takes the interpreter a second; one test has the latter."""
    if "own_sort" not in request.node.name:
        monkeypatch.setattr(tl, "sort", numpy_sort)


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


@pytest.mark.parametrize("shape", [(0, 7, 33, 4), (1, 1, 33, 1), (2, 17, 33, 33), (2, 20, 130, 5)])
def test_encode(impl: Implementation, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    test_ops.test_encode_of_integers_is_the_reference_bit_by_bit(impl, dtype, shape)


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


# --------------------------------------------------------------------------------- decode and group


@pytest.mark.parametrize(
    ("shape", "index_dtype"),
    [
        ((0, 7, 33, 4), torch.int64),
        ((1, 1, 33, 1), torch.int32),
        ((2, 140, 33, 9), torch.int32),
        ((3, 17, 40, 5), torch.int64),
    ],
)
def test_decode(
    impl: Implementation,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    index_dtype: torch.dtype,
) -> None:
    test_ops.test_decode(impl, dtype, shape, index_dtype)


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


# -------------------------------------------------------------------------------------- latent pass


@pytest.mark.parametrize(
    ("T", "ks", "extras", "side"),
    [
        (T32, (5,), True, "encoder"),
        (T32, (5, 9, 1), True, "decoder"),
        (T32, (5,), False, "decoder"),
        (B16, (5, 9, 1), True, "encoder"),
        (B16, (5,), True, "decoder"),
        (F16, (5,), False, "encoder"),
        (F16, (5, 9, 1), True, "decoder"),
    ],
)
def test_row_update(
    impl: Implementation, T: torch.dtype, ks: tuple[int, ...], extras: bool, side: str
) -> None:
    test_ops.test_row_update(impl, T, ks, extras, side)


@pytest.mark.parametrize("T", [T32, B16])
def test_row_update_in_slices_is_the_whole(impl: Implementation, T: torch.dtype) -> None:
    test_ops.test_row_update_in_slices_is_the_whole(impl, T)


@pytest.mark.parametrize(
    ("T", "bad", "side"),
    [(T32, torch.nan, "encoder"), (B16, torch.inf, "decoder"), (F16, -torch.inf, "encoder")],
)
def test_a_scale_that_is_not_finite_writes_nothing(
    impl: Implementation, T: torch.dtype, bad: float, side: str
) -> None:
    test_ops.test_a_scale_that_is_not_finite_writes_nothing(impl, T, bad, side)


@pytest.mark.parametrize(("T", "side"), [(T32, "encoder"), (B16, "decoder")])
def test_latent_pass_without_tokens(impl: Implementation, T: torch.dtype, side: str) -> None:
    test_ops.test_latent_pass_without_tokens(impl, T, side)


def test_rng_state_is_left_to_the_reference(impl: Implementation) -> None:
    a = row_arguments(T32, "decoder", N=5, d=6, F=8, ks=(2,))
    W_bf16, before = torch.zeros(8, 6, dtype=B16), clone_all(a)
    assert impl.row_update(*a.values(), W_bf16, torch.zeros(2, dtype=torch.int64)) is NotImplemented
    assert torch.equal(a["W"], before["W"])


def test_the_shadow_in_slices_is_the_rounded_weight(impl: Implementation) -> None:
    a = row_arguments(T32, "decoder")
    W_bf16 = torch.zeros_like(a["W"]).bfloat16()
    for start, stop in ((0, 12), (12, 23)):
        part = [r[:, start:stop].contiguous() for r in a["rows"]]
        last = {"rows": part, "start": start, "normalize": stop == 23}
        impl.row_update(*(a | last).values(), W_bf16)
    assert_same("W_bf16", W_bf16, a["W"].bfloat16())


def test_a_shadow_changes_no_encode_of_either_way(impl: Implementation) -> None:
    for way in (impl, Fused()):
        test_bf16_copy.test_a_shadow_changes_no_encode(way)


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


# ------------------------------------------------------------------------------------------- errors

(BAD,) = (m.args for m in test_contracts.test_bad_arguments.pytestmark if m.name == "parametrize")


@pytest.mark.parametrize("way", ["product", "fused"])
@pytest.mark.parametrize(BAD[0], BAD[1])
def test_bad_arguments(
    impl: Implementation,
    call: tuple[str, int, Any],
    error: type[Exception],
    message: str,
    way: str,
) -> None:
    """The message of every other implementation."""
    name, position, value = call
    served = getattr(Fused() if way == "fused" else impl, name)
    kernel = register.kernel(name, served, native_=True)
    args = list(test_contracts.arguments(name, torch.float32))
    args[position] = value(args[position]) if callable(value) else value
    with pytest.raises(error, match=re.escape(message)):
        kernel(*args)
