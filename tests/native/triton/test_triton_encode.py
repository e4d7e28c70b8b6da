# SPDX-License-Identifier: Apache-2.0
"""The Triton encodes in Triton's interpreter against the reference, in a process of their own,
because Triton reads TRITON_INTERPRET once, at its import; errors."""

from __future__ import annotations

import pytest
import torch
from triton_process import report

from ksae.kernels import grad_topk_encode as grad_encode
from ksae.kernels import topk_encode as encode
from ksae.ops import MODES

TOPK = (
    "random", "no row", "one row", "k is F", "half", "bf16", "two tiles of rows", "sampled",
    "overflow", "overflow of one row", "shortfall", "all equal", "infinite", "one NaN latent",
    "NaN row", "winners in one tile", "centred", "masked", "masked, overflow", "scaled", "linear",
    "absolute", "absolute, overflow", "absolute, shortfall", "absolute, masked", "thresholds",
    "thresholds, overflow", "threshold that nothing reaches", "room for many",
    "absolute, room for many", "winners at every place",
)  # fmt: skip
GRAD = [f"{mode}, {kind}" for mode in MODES for kind in ("wide", "NaN")]
GRAD += [
    f"additive, {kind}"
    for kind in (
        "half", "bf16", "overflow", "shortfall", "no beta", "no gradient", "infinite", "negative",
        "centred",
    )
]  # fmt: skip
DENSE = ("plain", "options", "absolute", "NaN", "no row")
BATCH = (
    "guessed", "short", "overflow", "all equal", "negative", "masked", "NaN", "cap",
)  # fmt: skip
NORMAL = [f"{op}, {dtype}" for op in ("topk", "grad") for dtype in ("float", "bf16", "half")]
CASES = [
    f"{op}, {case}"
    for op, cases in {
        "topk": TOPK,
        "normal": NORMAL,
        "dense": DENSE,
        "batch": BATCH,
        "grad": GRAD,
    }.items()
    for case in cases
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return report("triton_encode_cases.py", *CASES)


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"triton-interpreted-{case}")
def test_equals_the_reference_bit_for_bit(interpreted: dict[str, str], case: str) -> None:
    assert interpreted[case] == "equal"


@pytest.mark.parametrize("op", ["topk_encode", "grad_topk_encode"])
def test_refuses_a_k_that_one_program_cannot_sort(op: str) -> None:
    x, W, b = torch.zeros(1, 2), torch.zeros(1100, 2), torch.zeros(1100)
    call = {
        "topk_encode": lambda: encode.topk_encode(x, W, b, 1025),
        "grad_topk_encode": lambda: grad_encode.grad_topk_encode(x, x, W, b, W, 1025, 0.5),
    }[op]
    message = f"^{op}: k must be at most 1024 in the Triton kernel, got 1025$"
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_an_unknown_activation() -> None:
    x, W, b = torch.zeros(1, 2), torch.zeros(11, 2), torch.zeros(11)
    message = "^topk_encode: activation must be one of relu, none, abs, got 'gelu'$"
    with pytest.raises(ValueError, match=message):
        encode.topk_encode(x, W, b, 3, activation="gelu")
