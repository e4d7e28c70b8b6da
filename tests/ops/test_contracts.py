# SPDX-License-Identifier: Apache-2.0
"""What every op promises: opcheck, compile, second order, autocast, vmap."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import F, N, arguments, d, k, threshold_coder
from cases import (
    NAMES,
    norm_arguments,
    randn,
    row_arguments,
    written,
)
from implementations import takes_arguments_of
from torch import Tensor
from torch.library import opcheck

import ksae
from ksae import ops, reference
from ksae.backends import cpu as native
from ksae.ops.specs import BY_NAME


def op(name: str) -> Any:
    return getattr(ops, name)


each_op = pytest.mark.parametrize("name", NAMES)


@each_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    opcheck(op(name), arguments(name, dtype, grad=dtype != torch.bfloat16))


@pytest.mark.parametrize("variant", ["no b_dec", "int32", "no bias", "empty"])
def test_opcheck_of_the_other_signatures(variant: str) -> None:
    x, W, b = (randn(*s, seed=i).requires_grad_() for i, s in enumerate([(N, d), (F, d), (F,)]))
    values, indices = reference.topk_encode(x.detach(), W.detach(), b.detach(), k)
    match variant:
        case "no b_dec":
            opcheck(ops.topk_encode, (x, W, b, k))
        case "int32":
            opcheck(ops.sparse_decode, (values.requires_grad_(), indices.int(), W, b[:d].detach()))
        case "no bias":
            opcheck(ops.sparse_decode, (values.requires_grad_(), indices, W))
        case "empty":
            opcheck(ops.topk_encode, (x[:0].detach().requires_grad_(), W, b, k))


@each_op
def test_one_signature_in_every_layer(name: str) -> None:
    schema = [a.name for a in op(name)._schema.arguments]
    assert schema == list(inspect.signature(getattr(reference, name)).parameters)
    assert schema == list(BY_NAME[name].names)
    if (kernel := native.kernel(BY_NAME[name])) is not None:
        takes_arguments_of(kernel, name)
    assert ops.serving()[name]["default"] == "reference"


def test_a_call_that_a_kernel_does_not_serve_is_declared() -> None:
    """By the arguments that it does not name; then the reference serves, and the table says so."""
    if not native.available():
        pytest.skip("no native kernels")
    served = ops.serving()
    assert served["row_update"]["cpu"] == "native; reference with W_bf16 or rng_state or norms"
    assert served["sparse_residual"]["cpu"] == "native; reference with column_sums or rounded"
    assert served["topk_encode"]["cpu"] == "native"  # hints change no result
    values, indices, W, target = torch.ones(3, 1), torch.ones(3, 1).long(), randn(2, 4), randn(3, 4)
    want = reference.sparse_residual(values, indices, W, None, target, 4, torch.zeros(4))
    sums = torch.zeros(4)
    got = ops.sparse_residual(values, indices, W, None, target, 4, sums)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert torch.allclose(sums, want[0].sum(0))


# ------------------------------------------------------------------------------------------ compile


@each_op
def test_compile_fullgraph(name: str) -> None:
    """Forward and backward equal to eager; AOT without a code generator, for speed."""
    torch.compiler.reset()

    def call(args: tuple[Any, ...]) -> list[Tensor]:
        out = op(name)(*args)
        out = list(out) if isinstance(out, tuple) else [] if out is None else [out]
        inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        total = sum(((t * t).sum() for t in out if t.requires_grad), torch.zeros(()))
        return [*out, *(torch.autograd.grad(total, inputs) if total.requires_grad else [])]

    def forward(args: tuple[Any, ...]) -> Any:
        return op(name)(*args)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    eager, traced = arguments(name, torch.float32, True), arguments(name, torch.float32, True)
    want = call(eager)
    out = compiled(traced)
    got = list(out) if isinstance(out, tuple) else [] if out is None else [out]
    inputs = [a for a in traced if isinstance(a, Tensor) and a.requires_grad]
    total = sum(((t * t).sum() for t in got if t.requires_grad), torch.zeros(()))
    got += torch.autograd.grad(total, inputs) if total.requires_grad else []
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    if name in ("row_update", "vector_update", "count_tokens"):  # what was written
        for g, w in zip(traced, eager, strict=True):
            torch.testing.assert_close(g, w)


def test_compile_with_a_changing_batch() -> None:
    torch.compiler.reset()
    W, b = randn(F, d), randn(F)

    def coder(x: Tensor) -> Tensor:
        return ksae.sparse_decode(*ksae.topk_encode(x, W, b, k), W)

    compiled = torch.compile(coder, fullgraph=True, dynamic=True)
    for rows in (4, 9, 17):
        x = randn(rows, d, seed=rows)
        torch.testing.assert_close(compiled(x), coder(x))


# ----------------------------------------------------------------------------------------- autograd


def autoencoder(x: Tensor, W: Tensor, b: Tensor, b_dec: Tensor) -> Tensor:
    return ksae.sparse_decode(*ksae.topk_encode(x, W, b, k, b_dec), W, b_dec)


def test_gradcheck_to_second_order() -> None:
    t = [
        randn(*s, seed=i).double().requires_grad_()
        for i, s in enumerate([(3, 4), (9, 4), (9,), (4,)])
    ]
    assert torch.autograd.gradcheck(autoencoder, t)
    assert torch.autograd.gradgradcheck(autoencoder, t)
    assert torch.autograd.gradcheck(lambda W: ksae.topk(W, 4)[0], t[1])
    assert torch.autograd.gradgradcheck(lambda W: ksae.topk(W, 4)[0].square(), t[1])
    assert torch.autograd.gradcheck(threshold_coder, t)
    assert torch.autograd.gradgradcheck(threshold_coder, t)
    values = randn(3, k, seed=7).double().requires_grad_()
    indices = torch.tensor([[0, 0, 8], [3, 2, 3], [8, 8, 8]])  # repeats
    assert torch.autograd.gradcheck(ops.sparse_decode, (values, indices, t[1], t[3]))
    assert torch.autograd.gradcheck(ops.sparse_decode_backward_values, (t[0], indices, t[1]))
    assert torch.autograd.gradcheck(ops.sparse_decode_backward_weight, (t[0], values, indices, 9))


@pytest.mark.parametrize("coder", [autoencoder, threshold_coder])
def test_gradients_only_where_wanted(coder: Callable[..., Tensor]) -> None:
    """Each subset of inputs that want a gradient gets the one it gets together."""
    shapes = [(N, d), (F, d), (F,), (d,)]
    whole = [randn(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    want = torch.autograd.grad(coder(*whole).square().sum(), whole)
    for i in range(4):
        t = [p.detach().requires_grad_(i == j) for j, p in enumerate(whole)]
        (got,) = torch.autograd.grad(coder(*t).square().sum(), [t[i]])
        torch.testing.assert_close(got, want[i])


def test_zero_slots_pass_no_gradient() -> None:
    x, W = torch.ones(1, 2), torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-2.0, 0.0]]).requires_grad_()
    values, indices = ksae.topk_encode(x, W, torch.zeros(3), 3)
    assert values.tolist() == [[2, 0, 0]] and indices.tolist() == [[0, 1, 2]]
    values.sum().backward()
    assert W.grad is not None and W.grad.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_indices_carry_no_gradient() -> None:
    values, indices = ksae.topk(randn(3, 9).requires_grad_(), 2)
    assert values.requires_grad and not indices.requires_grad


def test_the_written_tensors_are_marked() -> None:
    """A tensor saved for backward and then updated in place is noticed."""
    for side in ("encoder", "decoder"):
        a = row_arguments(torch.bfloat16, side)
        a["W"].requires_grad_()
        loss = (a["W"] * a["W"]).sum()
        versions = {name: t._version for name, t in written(a).items()}
        with torch.no_grad():
            ops.row_update(*a.values())
        assert all(t._version > versions[name] for name, t in written(a).items())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ----------------------------------------------------------------------------------------- autocast


def test_autocast() -> None:
    x, W, b = randn(N, d), randn(F, d), randn(F)
    low = [t.bfloat16() for t in (x, W, b)]
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = ksae.topk_encode(x, W, low[2], k)  # mixed dtypes are cast to one
        want = ops.topk_encode(*low, k)
        assert torch.equal(values, want[0]) and torch.equal(indices, want[1])
        recon = ksae.sparse_decode(values.float(), indices, W)
        assert recon.dtype == torch.bfloat16 and torch.equal(
            recon, ops.sparse_decode(*want, low[1])
        )
        assert ksae.topk(W, 2)[0].dtype == torch.float32  # a selection sees what it is given
        assert ksae.topk_encode(x.double(), W.double(), b.double(), k)[0].dtype == torch.float64
    with torch.autocast("cpu", torch.float16):
        assert ksae.topk_encode(x, W, b, k)[0].dtype == torch.float16


def test_autocast_leaves_the_latent_pass_in_float32() -> None:
    want, got = (row_arguments(torch.float32, "encoder") for _ in range(2))
    ops.row_update(*want.values())
    with torch.autocast("cpu", torch.bfloat16):
        ops.row_update(*got.values())
        assert ops.row_grad_sq(*norm_arguments(got)).dtype == torch.float64
    assert all(map(torch.equal, written(want).values(), written(got).values()))


# --------------------------------------------------------------------------------------------- vmap


def test_vmap_over_rows() -> None:
    x, W, b = randn(4, N, d), randn(F, d), randn(F)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of its slow loop
        values, indices = torch.vmap(lambda x: ksae.topk_encode(x, W, b, k))(x)
        recon = torch.vmap(ksae.sparse_decode, in_dims=(0, 0, None))(values, indices, W)
        shared = torch.vmap(ksae.sparse_decode, in_dims=(1, None, None))(
            values.movedim(0, 1), indices[0], W
        )
        top = torch.vmap(lambda x: ksae.topk(x, 2)[0], in_dims=2)(x.movedim(0, 2))
        none = torch.vmap(lambda x: ksae.topk(x, 2)[0])(x[:, :0])
        variance = torch.vmap(ops.total_variance, in_dims=1)(x.movedim(0, 1))
    want = ksae.topk_encode(x, W, b, k)
    assert torch.equal(values, want[0]) and torch.equal(indices, want[1])
    assert torch.equal(recon, ksae.sparse_decode(*want, W))
    assert torch.equal(shared[2], ksae.sparse_decode(want[0][2], want[1][0], W))
    assert torch.equal(top, ksae.topk(x, 2)[0]) and none.shape == (4, 0, 2)
    assert torch.equal(variance, torch.stack([ops.total_variance(rows) for rows in x]))


@pytest.mark.parametrize("coder", [autoencoder, threshold_coder])
def test_vmap_over_gradients(coder: Callable[..., Tensor]) -> None:
    """is_grads_batched puts the backward under vmap."""
    t = [randn(*s, seed=i).requires_grad_() for i, s in enumerate([(N, d), (F, d), (F,), (d,)])]
    out = coder(*t)
    cotangents = randn(7, N, d, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched = torch.autograd.grad(out, t, cotangents, is_grads_batched=True, retain_graph=True)
    for i, c in enumerate(cotangents):
        for got, want in zip(
            batched, torch.autograd.grad(out, t, c, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got[i], want)


def test_vmap_refuses_batched_weights() -> None:
    x, W, b = randn(N, d), randn(2, F, d), randn(F)
    with pytest.raises(
        ValueError, match="topk_encode: W_enc must be unbatched under vmap, got a batch"
    ):
        torch.vmap(lambda W: ksae.topk_encode(x, W, b, k))(W)
    with pytest.raises(NotImplementedError, match="group_by_latent: has no meaning under vmap"):
        torch.vmap(lambda v: ops.group_by_latent(v, torch.zeros(N, k, dtype=torch.int64), F))(
            randn(2, N, k)
        )
