# SPDX-License-Identifier: Apache-2.0
"""The interpreted selection from scores in memory, on the inputs of test_screened_encode.py, and
where rounding takes nearly all that the bound allows."""

import torch
import triton_bound_cases as bounds
import triton_interpreter  # noqa: F401  first: sets the mode
from cases import assert_same
from screened_cases import ALL, CASES, inputs

from ksae import reference
from ksae.kernels import bound, screen_stored


def case_of(case: str) -> None:
    tight = case.startswith("rounding")
    x, W, b, k, mask = (*bounds.rounding(case[-1]), 1, None) if tight else inputs(case)
    capacity = 2048 if "room" in case else max(2 ** (k + 31).bit_length(), 64)
    rounded, W_bf16 = x.bfloat16(), W.bfloat16()
    of = [bound.norms(t, copy) for t, copy in ((x, rounded), (W, W_bf16))]
    screen = screen_stored.Screen(x, W, b, *of, k, mask, capacity)
    for n in range(0, len(x), 2):
        screen.select(rounded[n : n + 2].float() @ W_bf16.float().T, n)
    values, indices = screen.result()
    if tight:  # whose sums are not exact
        assert indices.tolist() == [[bounds.WINNER]], f"indices: {indices.tolist()}"
        return
    want = reference.topk_encode(x, W, b, k, None, mask)
    assert_same("indices", indices, want[1])
    assert_same("values", values, want[0])
    rows, redone = CASES[case], len(set(screen.redone().tolist()))
    assert rows is None or redone == (len(x) if rows == ALL else rows), f"{redone} rows in full"


def outcome(name: str) -> str:
    try:
        with torch.no_grad():
            case_of(name)
    except Exception as error:  # the report goes on with the next case
        return f"{type(error).__name__}: {error}"
    return "equal"
