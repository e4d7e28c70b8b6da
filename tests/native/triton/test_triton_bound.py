# SPDX-License-Identifier: Apache-2.0
"""The certified bound in Triton's interpreter: inputs that need nearly all of it, and mistakes put
into the kernels, each of which a case sees."""

from __future__ import annotations

import pytest
import triton_process

CASES = (
    "rounding of x", "rounding of W", "squares that underflow", "a large bias", "accumulation",
    "a row that overflows", "a latent that overflows", "a bias that overflows", "norms",
)  # fmt: skip
MUTANTS = (
    "a quarter of the margins",
    "a quarter of the margins, W",
    "a twentieth of a row's norms",
    "a twentieth of the norm that meets what W lost",
    "no term of x's rounding",
    "no term of W's rounding",
    "no term of the accumulation",
    "no term of the bias",
    "no floor under the squares",
    "an upper end below the score",
    "a lower end above the score",
    "a norm that may overflow",
    "a bias that may overflow",
    "an unbounded score is certain",
    "a NaN is below",
    "screen: overflow unseen",
    "screen: guess too high unseen",
    "stored: a group's maximum is certain",
    "stored: a group reaches no higher than its maximum",
    "stored: a group's smallest loss",
    "stored: a group's smallest copy",
    "stored: an upper end below the score",
    "stored: a lower end above the score",
    "stored: overflow unseen",
    "stored: masked latents pass",
    "redo: overflow unseen",
    "redo: shortfall unseen",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return triton_process.report("triton_bound_cases.py", *CASES)


@pytest.fixture(scope="module")
def mutants() -> dict[str, str]:
    return triton_process.report("triton_mutants.py", *MUTANTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"triton-interpreted-{case}")
def test_the_winner_by_nearly_the_whole_bound(interpreted: dict[str, str], case: str) -> None:
    assert interpreted[case] == "equal"


@pytest.mark.nightly
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutants: dict[str, str], mutant: str) -> None:
    kernels = {name: said for name, said in mutants.items() if name not in MUTANTS}
    assert set(kernels.values()) == {"equal"}  # as they are, they pass every case
    assert mutants[mutant].startswith("AssertionError: ")
