# SPDX-License-Identifier: Apache-2.0
"""What a bad call of an op says, and that it writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import arguments
from cases import (
    clone_all,
    integers,
    randn,
    row_arguments,
    written,
)
from torch import Tensor

import ksae
from ksae import ops


def op(name: str) -> Any:
    return getattr(ops, name)


def bad(name: str, position: int, value: Any) -> tuple[str, Callable[[], Any]]:
    args = list(arguments(name, torch.float32))
    args[position] = value(args[position]) if callable(value) else value
    return name, lambda: op(name)(*args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (("topk", 1, 0), ValueError, "topk: k must be in [1, 5] for x of shape [20, 5], got 0"),
        (("topk", 1, 6), ValueError, "topk: k must be in [1, 5] for x of shape [20, 5], got 6"),
        (("topk", 0, lambda t: t.int()), TypeError, "topk: x must be one of torch.float32"),
        (("topk", 0, lambda t: t[0]), ValueError, "topk: x must be a matrix, got shape [5]"),
        (
            ("topk_encode", 1, lambda t: t[:, 1:]),
            ValueError,
            "W_enc must be of shape [*, 5], got [20, 4]",
        ),
        (
            ("topk_encode", 1, lambda t: t.half()),
            TypeError,
            "W_enc must be torch.float32, got torch.float16",
        ),
        (("topk_encode", 2, lambda t: t[1:]), ValueError, "b_enc must be of shape [20], got [19]"),
        (
            ("topk_encode", 3, 21),
            ValueError,
            "k must be in [1, 20] for W_enc of shape [20, 5], got 21",
        ),
        (("topk_encode", 4, lambda t: t[1:]), ValueError, "b_dec must be of shape [5], got [4]"),
        (("topk_encode", 5, lambda t: t[1:]), ValueError, "mask must be of shape [20], got [19]"),
        (
            ("topk_encode", 5, lambda t: t.int()),
            TypeError,
            "mask must be torch.bool, got torch.int32",
        ),
        (("topk_encode", 0, lambda t: t.to("meta")), ValueError, "W_enc must be on meta, got cpu"),
        (("topk_encode", 6, None), ValueError, "norms must be given with W_bf16, got one without"),
        (
            ("topk_encode", 6, lambda t: t.float()),
            TypeError,
            "W_bf16 must be torch.bfloat16, got torch.float32",
        ),
        (("topk_encode", 6, lambda t: t[1:]), ValueError, "W_bf16 must be of shape [20, 5], got"),
        (("topk_encode_aux", 12, None), ValueError, "norms must be given with W_bf16, got one"),
        (
            ("topk_encode_aux", 12, lambda t: t[:2]),
            ValueError,
            "norms must be of shape [3, 20], got [2, 20]",
        ),
        (
            ("sparse_decode", 1, lambda t: t[:, 1:]),
            ValueError,
            "indices must be of the shape of values [6, 3]",
        ),
        (
            ("sparse_decode", 1, lambda t: t.short()),
            TypeError,
            "indices must be torch.int64 or torch.int32",
        ),
        (
            ("sparse_decode", 1, lambda t: t + 20),
            ValueError,
            "sparse_decode: indices must be in [0, 20), got",
        ),
        (
            ("sparse_decode", 1, lambda t: t - 20),
            ValueError,
            "sparse_decode: indices must be in [0, 20), got -",
        ),
        (
            ("sparse_decode_backward_values", 0, lambda t: t[1:]),
            ValueError,
            "indices must be of the shape of",
        ),
        (
            ("sparse_decode_backward_weight", 3, 0),
            ValueError,
            "F must be in [1, 2147479552], got 0",
        ),
        (("sparse_decode_backward_weight", 3, 1), ValueError, "indices must be in [0, 1), got"),
        (
            ("group_by_latent", 1, lambda t: t[:, :1]),
            ValueError,
            "group_by_latent: indices must be of the shape",
        ),
        (
            ("sparse_residual", 4, lambda t: t[1:]),
            ValueError,
            "target must be of shape [6, 5], got [5, 5]",
        ),
        (
            ("sparse_residual", 4, lambda t: t.half()),
            TypeError,
            "target must be torch.float32",
        ),
        (
            ("sparse_residual", 5, 6),
            ValueError,
            "sparse_residual: columns must be in [0, 5], got 6",
        ),
        (("sparse_residual_slice", 6, 0), ValueError, "start and stop must be ordered"),
        (("latent_sums", 0, []), ValueError, "values must be at least one group, got none"),
        (("latent_sums", 3, lambda t: t[:1]), ValueError, "order must be 2 tensors, one for each"),
        (("latent_sums", 4, lambda t: t[:1]), ValueError, "scales must be of shape [2], got [1]"),
        (("row_grad_sq", 3, lambda t: t[:1]), ValueError, "rows must be 2 tensors, one for each"),
        (("row_grad_sq", 8, 1), ValueError, "start must be in [0, 0] for 23 columns of 23, got 1"),
        (
            ("row_update", 6, lambda t: t[1:]),
            ValueError,
            "grad_dot_w must be of shape [20], got [19]",
        ),
        (
            ("row_update", 8, lambda t: t.T.contiguous().T),
            ValueError,
            "W must be contiguous",
        ),
        (("row_update", 9, randn(2)), ValueError, "master must be None for torch.float32"),
        (
            ("row_update", 10, lambda t: t[1:]),
            ValueError,
            "m must be of shape [20, 23], got [19",
        ),
        (("row_update", 12, lambda t: t[:6]), ValueError, "hyper must be of shape [8], got [6]"),
        (("row_update", 12, lambda t: t.double()), TypeError, "hyper must be torch.float32, got"),
        (
            ("row_update", 13, randn(23)),
            ValueError,
            "grad_b_dec must be given with",
        ),
        (("total_variance", 0, lambda t: t[0]), ValueError, "y must be a matrix, got shape [5]"),
        (("loss_terms", 0, lambda t: t[:2]), ValueError, "sq_errors must be 3, one for each of"),
        (
            ("loss_terms", 0, lambda t: [e.float() for e in t]),
            TypeError,
            "sq_errors[0] must be torch.float64, got torch.float32",
        ),
        (("loss_terms", 1, []), ValueError, "denominators must be at least one tensor, got none"),
        (("loss_terms", 2, [1.0]), ValueError, "shares must be 3, one for each of denominators"),
        (("adam_scalars", 0, randn(1)), ValueError, "loss must be of shape [], got [1]"),
        (("adam_scalars", 1, None), ValueError, "norm must be given with clip_norm, got one"),
        (("adam_scalars", 5, randn(1)[0]), TypeError, "t must be torch.float64, got torch.float32"),
        (("adam_scalars", 6, lambda t: t[:2]), ValueError, "constants must be of shape [3], got"),
        (("vector_update", 0, []), ValueError, "grads must be at least one tensor, got none"),
        (
            ("vector_update", 0, lambda t: [t[0], t[1][1:]]),
            ValueError,
            "grads[1] must be of shape [20], got [19]",
        ),
        (("vector_update", 1, lambda t: t[:1]), ValueError, "scales must be of shape [2], got [1]"),
        (("vector_update", 3, torch.tensor(1.0)), TypeError, "taken must be torch.bool, got"),
        (
            ("vector_update", 5, lambda t: torch.stack([t, t], 1)[:, 0]),
            ValueError,
            "p must be contiguous, for it is written, got strides [2]",
        ),
        (("vector_update", 6, randn(20)), ValueError, "master must be None for torch.float32"),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}" if isinstance(p, tuple) else None,
)
def test_bad_arguments(call: tuple[str, int, Any], error: type[Exception], message: str) -> None:
    """The same one-line message from the kernel and, where it needs no data, the fake."""
    name, run = bad(*call)
    with pytest.raises(error, match=re.escape(message)) as raised:
        run()
    assert str(raised.value).startswith(f"{name}: ") and "\n" not in str(raised.value)
    if "indices must be in" not in message and "meta" not in message:
        args = list(arguments(name, torch.float32))
        args[call[1]] = call[2](args[call[1]]) if callable(call[2]) else call[2]
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
            with pytest.raises(error, match=re.escape(message)):
                op(name)(*fakes)


def test_nothing_is_written_before_a_check_has_passed() -> None:
    a = row_arguments(torch.float32, "encoder") | {"v": randn(1)}
    before = clone_all(a)
    with pytest.raises(ValueError, match="row_update: v must be of shape"):
        ops.row_update(*a.values())
    assert all(torch.equal(t, before[name]) for name, t in written(a).items())


def test_functional_messages() -> None:
    with pytest.raises(
        ValueError,
        match=r"sparse_decode: indices must be of the shape of values \[2, 3\], got \[2\]",
    ):
        ksae.sparse_decode(randn(2, 3), torch.zeros(2, dtype=torch.int64), randn(4, 5))
    with pytest.raises(
        ValueError, match=r"topk: k must be in \[1, 4\] for x of shape \[6, 4\], got 5"
    ):
        ksae.topk(integers(2, 3, 4), 5)
