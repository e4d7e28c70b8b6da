# SPDX-License-Identifier: Apache-2.0
"""The ops under pytest-benchmark, for a contributor's before and after:

    pytest bench/ --benchmark-autosave
    pytest bench/ --benchmark-compare --benchmark-compare-fail=min:15%

Same cases as `ksae bench --suite ops`, at its quick shape; results are checked there and in tests/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ksae import ops, reference
from ksae.bench.suites.case import Case, Problem
from ksae.bench.suites.opcases import problems
from ksae.bench.suites.ops import QUICK

IMPLEMENTATIONS = {"reference": reference, "ksae": ops}
# The reference's own ways are slow where it sorts or loops: few rounds.
ROUNDS = {"reference": 3, "ksae": 30}


@functools.cache
def _problems(name: str) -> dict[str, Problem]:
    return {f"{p.op}-{p.mode}": p for p in problems(Case(*QUICK[0], name, "normal"))}


def _synced(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call`, and whatever a GPU has left to do."""

    def run() -> Any:
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "problem",
    [
        *(f"{op}-forward" for op in ops.serving()),
        *(f"{op}-backward" for op in ("topk", "topk_encode", "sparse_decode")),
    ],
)
def bench_op(benchmark: Any, problem: str, dtype: str, impl: str) -> None:
    case = _problems(dtype).get(problem)
    assert case is not None, f"{problem} has no case in bench/suites/opcases.py"
    benchmark.group = f"{problem} {dtype}"
    benchmark.extra_info |= {"bytes": case.cost.bytes, "flops": case.cost.flops}
    call = _synced(case.make(IMPLEMENTATIONS[impl]))
    benchmark.pedantic(call, rounds=ROUNDS[impl], warmup_rounds=1)
