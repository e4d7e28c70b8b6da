# SPDX-License-Identifier: Apache-2.0
"""What ops promise of codes with row offsets: opcheck, compile, gradients, vmap, messages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from calls import F, N, d, threshold_coder
from cases import integers, norm_arguments, randn, row_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import ksae
from ksae import ops, reference
from ksae.ops.specs import BY_NAME
from ksae.reference.dtypes import ENTRIES


def ragged(wants_gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A code with row offsets: values and latents [E, 1], offsets of N rows."""
    offsets = torch.tensor([0, 4, 4, 5, 5, 11, 13])
    values = randn(13, 1, seed=5).requires_grad_(wants_gradient)
    latents = torch.arange(13)[:, None] * 7 % F
    return values, latents, offsets


@pytest.mark.parametrize(
    "name",
    [
        "sparse_decode",
        "partial",
        "sparse_decode_backward_values",
        "wide gradient",
        "sparse_decode_backward_weight",
        "sparse_residual",
        "row_grad_sq",
        "row_update",
    ],
)
def test_opcheck_of_codes_with_row_offsets(name: str) -> None:
    x, W, b_dec = (randn(*s, seed=i).requires_grad_() for i, s in enumerate([(N, d), (F, d), (d,)]))
    values, latents, offsets = ragged(wants_gradient=True)
    pair = (values.detach(), latents, W.detach(), None, x.detach())
    update = row_arguments(torch.float32, "decoder", N=N, F=F)
    row_of = [
        reference.rows_of(c.shape[1] * torch.arange(N + 1), c.numel())
        for c in update["coefficients"]
    ]
    half = W.detach().bfloat16().requires_grad_()
    cases: dict[str, tuple[Any, ...]] = {
        "sparse_decode": (values, latents, W, b_dec, offsets),
        "partial": (values.detach().bfloat16(), latents, half, None, offsets, True),
        "sparse_decode_backward_values": (x, latents, W, offsets),
        "wide gradient": (x, latents, half, offsets),
        "sparse_decode_backward_weight": (x, values, latents, F, offsets),
        "sparse_residual": (*pair, 3, None, offsets),
        "row_grad_sq": (*norm_arguments(update), row_of),
        "row_update": (*update.values(), None, None, None, row_of),
    }
    names = {"partial": "sparse_decode", "wide gradient": "sparse_decode_backward_values"}
    opcheck(getattr(ops, names.get(name, name)), cases[name])


def test_compile_a_coder_with_thresholds() -> None:
    torch.compiler.reset()
    t = [randn(*s, seed=i).requires_grad_() for i, s in enumerate([(N, d), (F, d), (F,), (d,)])]
    compiled = torch.compile(threshold_coder, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(threshold_coder(*t).square().sum(), t)
    out = compiled(*t)
    torch.testing.assert_close(out, threshold_coder(*t))
    for got, w in zip(torch.autograd.grad(out.square().sum(), t), want, strict=True):
        torch.testing.assert_close(got, w)


def test_gradients_of_thresholds_are_those_of_the_dense_coder() -> None:
    t = [
        randn(*s, seed=i).double().requires_grad_()
        for i, s in enumerate([(N, d), (F, d), (F,), (d,)])
    ]
    x, W, b, b_dec = t
    u = (x - b_dec) @ W.T + b
    dense = torch.where(u > 0.3, u, 0) @ W + b_dec
    torch.testing.assert_close(threshold_coder(*t), dense)
    want = torch.autograd.grad(dense.square().sum(), t)
    for got, w in zip(
        torch.autograd.grad(threshold_coder(*t).square().sum(), t), want, strict=True
    ):
        torch.testing.assert_close(got, w)
    theta = torch.full((F,), 0.3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        ksae.threshold_encode(x, W, b, theta)[0].sum(), theta, allow_unused=True
    )
    assert grad is None  # its estimate is the coder's


def test_gradients_of_partial_sums() -> None:
    """What backward of the unrounded sum gives is what that of the rounded one gives."""
    values, latents, offsets = ragged()
    t = [values.bfloat16().requires_grad_(), randn(F, d, seed=1).bfloat16().requires_grad_()]
    b = randn(d).bfloat16().requires_grad_()
    grad = integers(N, d)
    whole = ops.sparse_decode(t[0], latents, t[1], b, offsets)
    part = ops.sparse_decode(t[0], latents, t[1], b, offsets, True)
    assert part.dtype == torch.float32
    want = torch.autograd.grad(whole, [*t, b], grad.bfloat16())
    for got, w in zip(torch.autograd.grad(part, [*t, b], grad), want, strict=True):
        assert torch.equal(got, w)


def test_vmap_over_codes_with_row_offsets() -> None:
    values, latents, offsets = ragged()
    W, more = randn(F, d), torch.stack([values, 2 * values, values.flip(0)])
    other = torch.stack(
        [offsets, torch.tensor([0, 0, 13, 13, 13, 13, 13]), offsets.flip(0)[0] - offsets.flip(0)]
    )
    got = torch.vmap(lambda v, o: ops.sparse_decode(v, latents, W, None, o))(more, other)
    for i in range(3):
        assert torch.equal(got[i], ops.sparse_decode(more[i], latents, W, None, other[i]))


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        (
            torch.tensor([0, 13]).int(),
            TypeError,
            "row_offsets must be torch.int64, got torch.int32",
        ),
        (torch.empty(0).long(), ValueError, "row_offsets must be of shape [N + 1], got [0]"),
        (torch.zeros(2, 7).long(), ValueError, "row_offsets must be of shape [N + 1], got [2, 7]"),
        (torch.tensor([0, 12]), ValueError, "row_offsets must be from 0 to 13, got from 0 to 12"),
        (torch.tensor([1, 13]), ValueError, "row_offsets must be from 0 to 13, got from 1 to 13"),
        (torch.tensor([0, 9, 8, 13]), ValueError, "row_offsets must be in ascending order, got"),
        (torch.tensor([0, 13]).to("meta"), ValueError, "row_offsets must be on cpu, got meta"),
    ],
)
def test_bad_row_offsets(offsets: Tensor, error: type[Exception], message: str) -> None:
    values, latents, _ = ragged()
    with pytest.raises(error, match=re.escape(message)):
        ops.sparse_decode(values, latents, randn(F, d), None, offsets)


def test_messages_of_codes_with_row_offsets() -> None:
    values, latents, offsets = ragged()
    W, x = randn(F, d), randn(N, d)
    with pytest.raises(ValueError, match=re.escape("row_offsets must be of shape [6], got [7]")):
        ops.sparse_decode_backward_values(x[1:], latents, W, offsets)
    with pytest.raises(ValueError, match=re.escape("target must be of shape [6, 5], got [5, 5]")):
        ops.sparse_residual(values, latents, W, None, x[1:], d, None, offsets)
    wide = values.expand(13, 2).contiguous()
    with pytest.raises(
        ValueError, match=re.escape("values must be of shape [*, 1] with row_offsets, got [13, 2]")
    ):
        ops.sparse_decode(wide, latents.expand(13, 2), W, None, offsets)
    with pytest.raises(
        ValueError, match=re.escape("values must be of shape [E] with row_offsets, got [13, 1]")
    ):
        ksae.sparse_decode(values, latents, W, None, offsets)
    update = row_arguments(torch.float32, "decoder", N=N, F=F)
    update["coefficients"][1] = update["coefficients"][1][1:].contiguous()
    update["order"][1] = update["order"][1][9:].contiguous()
    with pytest.raises(
        ValueError, match=re.escape("coefficients[1] must be of shape [6, 9], got [5, 9]")
    ):
        ops.row_update(*update.values())
    with pytest.raises(ValueError, match=re.escape("row_of must be 2 tensors, one for each")):
        ops.row_update(*update.values(), None, None, None, [offsets.int()])


@pytest.mark.parametrize(
    "op",
    [
        "sparse_decode",
        "sparse_decode_backward_values",
        "sparse_decode_backward_weight",
        "sparse_residual",
        "sparse_residual_slice",
        "prefix_residual",
        "prefix_residual_slice",
        "group_by_latent",
    ],
)
def test_more_entries_than_kernels_can_number_are_refused(op: str) -> None:
    """Positions are int32 there, and loops count past the last."""
    spec = BY_NAME[op]
    with FakeTensorMode():
        W, rows, sums = torch.empty(F, d), torch.empty(N, d), torch.empty(2)
        values, latents = torch.empty(ENTRIES + 1, 1), torch.empty(ENTRIES + 1, 1, dtype=torch.long)
        given = {
            "values": values, "indices": latents, "W_dec": W, "grad": rows, "target": rows, "F": F,
            "columns": d, "start": 0, "stop": d, "widths": sums.long(), "shares": sums,
            "row_offsets": torch.empty(N + 1, dtype=torch.long),
        }  # fmt: skip
        arguments = spec.defaults | {name: given.get(name) for name in spec.names}
        arguments |= {"partial": False} if op == "sparse_decode" else {}
        with pytest.raises(
            ValueError, match=f"^{op}: .* must be of at most {ENTRIES} entries, got"
        ):
            spec.check(arguments)
        for name in ("values", "indices"):
            if name in spec.names:
                arguments[name] = given[name][:-1]
        spec.check(arguments)


@pytest.mark.parametrize(
    "op",
    ["sparse_decode", "sparse_residual", "sparse_residual_slice", "prefix_residual",
     "prefix_residual_slice", "sparse_decode_backward_values"],
)  # fmt: skip
def test_a_call_with_so_many_entries_is_refused_before_they_are_read(op: str) -> None:
    """Which memory could not hold: one number, that many times."""
    spec = BY_NAME[op]
    values = torch.zeros(1, 1).expand(ENTRIES + 1, 1)
    given = {
        "values": values, "indices": torch.zeros(1, 1, dtype=torch.long).expand(ENTRIES + 1, 1),
        "W_dec": randn(F, d), "grad": randn(N, d), "target": randn(N, d), "columns": d,
        "start": 0, "stop": d, "widths": torch.tensor([2, F]), "shares": torch.ones(2),
        "row_offsets": torch.arange(N + 1),
    }  # fmt: skip
    arguments = [given.get(name, spec.defaults.get(name)) for name in spec.names]
    with pytest.raises(ValueError, match=f"^{op}: .* must be of at most {ENTRIES} entries, got"):
        getattr(ops, op)(*arguments)
