# SPDX-License-Identifier: Apache-2.0
"""Certified screening in Triton's interpreter: the float32 result, whatever the bound lets pass."""

from __future__ import annotations

import pytest
import torch
from triton_process import report

from ksae.kernels import screen

CASES = (
    "random", "no row", "one row", "k is F", "wide", "overflow", "overflow of one row",
    "shortfall", "shortfall, room for all", "guess too high", "near ties, room for all",
    "near ties, room for many", "near ties, overflow", "near ties, masked", "many, near ties",
    "rows and parts",
    "more rows than programs", "all equal", "few above -inf", "all NaN", "ties",
    "outlier dimension", "tiny", "denormal", "huge weights", "huge rows", "mixed norms", "zeros",
    "NaN in a row", "infinite row", "NaN latent", "infinite latents", "bias not finite",
    "all negative", "masked", "half masked, overflow", "centred", "kept bf16 copy",
    "without the bound", "paths agree", "bound holds",
)  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return report("triton_screen_cases.py", *CASES)


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"triton-interpreted-{case}")
def test_is_the_float32_result_bit_for_bit(interpreted: dict[str, str], case: str) -> None:
    assert interpreted[case] == "equal"


def test_refuses_a_k_that_one_program_cannot_sort() -> None:
    x, W, b = torch.zeros(1, 2), torch.zeros(1100, 2), torch.zeros(1100)
    message = "^topk_encode: k must be at most 1024 in the Triton kernel, got 1025$"
    with pytest.raises(ValueError, match=message):
        screen.screened_topk_encode(x, W, b, 1025)
