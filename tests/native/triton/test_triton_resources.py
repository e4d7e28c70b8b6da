# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels cost on five generations of GPUs: compiled at tuned sizes without a GPU,
in a process of their own, because Triton reads TRITON_INTERPRET once, at its import."""

from __future__ import annotations

import pytest
from triton_process import report

pytestmark = pytest.mark.nightly
CAPABILITIES = (80, 89, 90, 100, 120)
ENCODES = [
    f"{op}, {capability}"
    for op in ("topk-bf16", "grad-bf16", "screen", "stored")
    for capability in CAPABILITIES
] + [
    "stored-k1024, 90",
    "product-fp32, 80",
    "product-fp32, 90",
    "grad-fp32, 80",
    "screen-k1024, 90",
    "one-of-each, 90",
]
# a selection takes seconds to compile: most generations have the commonest only
PORTABLE = [
    f"{ops}-bf16, {capability}"
    for ops in ("selection", "gradients", "rows", "step")
    for capability in CAPABILITIES
    if (ops, capability) != ("selection", 90)
] + ["selections-bf16, 90", "step-bf16-halves, 90", "step-fp32, 80"]

PRODUCTS = {"float32_kernel", "maxima_kernel", "gate_kernel", "gate_listed_kernel", "redo_kernel"}
GATED = {"maxima_kernel", "guess_kernel", "gate_kernel", "pick_kernel"}
SCREEN = {
    "gate_listed_kernel", "tighten_kernel", "prove_kernel", "rescore_kernel", "merge_kernel",
}  # fmt: skip
STORED = {"norms_kernel", "prove_kernel", "rescore_kernel", "merge_kernel", "pick_kernel"}
OF_STEP = {
    "decode_kernel", "values_kernel", "squares_kernel", "keys_kernel", "order_kernel",
    "bounds_kernel", "sums_kernel", "pieces_kernel", "centre_kernel", "centre_sum_kernel",
    "update_kernel", "shares_kernel", "columns_kernel", "variance_kernel", "terms_kernel",
    "adam_kernel", "vector_kernel", "count_kernel", "add_kernel",
}  # fmt: skip
KERNELS = {
    "topk": GATED | {"list_kernel", "redo_kernel"},
    "grad": GATED | {"list_kernel", "redo_kernel", "informed_kernel"},
    "screen": GATED | {"norms_kernel"} | SCREEN,
    "product": {"float32_kernel"},
    "stored": {"groups_kernel", "order_maxima_kernel", "screened_select_kernel"} | STORED,
    "selection": {"order_maxima_kernel", "select_kernel"},
    "selections": {"order_maxima_kernel", "select_kernel"},
    "gradients": {"decode_kernel", "values_kernel", "pieces_kernel", "weight_kernel"},
    "rows": {
        "decode_kernel",
        "entries_kernel",
        "pieces_kernel",
        "weight_kernel",
        "update_kernel",
    },
    "step": OF_STEP,
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, list[dict]]]:
    """{"case, capability": {kernel: what each of its variants costs}}"""
    return report("triton_compile.py", *ENCODES, *PORTABLE)


def check(kernels: dict[str, list[dict]], case: str) -> None:
    assert kernels.keys() >= KERNELS.get(case.split("-")[0].split(",")[0], set())
    for name, cost in ((name, cost) for name, costs in kernels.items() for cost in costs):
        assert cost["memory"] == 0, (name, cost)  # nothing is spilled
        assert not {"LDL", "STL"} & set(cost["instructions"]), (name, cost)
        assert cost["registers"] <= 255, (name, cost)


@pytest.mark.parametrize("case", ENCODES)
def test_encodes_compile_without_spills_for_tensor_cores(
    compiled: dict[str, dict[str, list[dict]]], case: str
) -> None:
    kernels = compiled[case]
    check(kernels, case)
    tensor_cores = {"90": "HGMMA", "100": "UTCHMMA"}.get(case.split(", ")[1], "HMMA")
    for name, cost in ((name, cost) for name, costs in kernels.items() for cost in costs):
        assert cost["shared"] <= 99 * 1024, name  # what a block may have on sm_89 and sm_120
        if name in PRODUCTS:
            assert ("FFMA" if "fp32" in case else tensor_cores) in cost["instructions"], name


@pytest.mark.parametrize("case", PORTABLE)
def test_portable_ops_compile_without_spills_and_atomics(
    compiled: dict[str, dict[str, list[dict]]], case: str
) -> None:
    kernels = compiled[case]
    check(kernels, case)
    for name, cost in ((name, cost) for name, costs in kernels.items() for cost in costs):
        assert not cost["atomics"], name  # the same bits on every run
        assert cost["registers"] <= 128 and cost["shared"] <= 48 * 1024, (name, cost)
