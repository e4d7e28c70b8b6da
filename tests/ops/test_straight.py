# SPDX-License-Identifier: Apache-2.0
"""The code generated from an op's line refuses what the check refuses, in its words, and takes the
rest: each argument of a right call is replaced by wrong and by unusual ones."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calls import arguments
from cases import NAMES, clone_all
from torch import Tensor

from ksae import ops, reference
from ksae.ops import straight
from ksae.ops.specs import BY_NAME


def others(value: Any) -> Iterator[Any]:
    """Values in the place of one that is right."""
    match value:
        case Tensor():
            yield value[..., None]
            yield value[None]
            yield value.reshape(-1)
            yield torch.cat([value, value], -1) if value.dim() else value[None]
            yield value[:0] if value.dim() else value
            for T in (torch.float16, torch.float32, torch.float64, torch.int64, torch.int32):
                yield value.to(T)
            yield value.to("meta")
            if value.dim() == 2:
                yield value.T.contiguous().T
                yield value[:, :1]
        case list() | tuple():
            yield []
            yield [*value, value[0]]
            yield from ([other, *value[1:]] for other in others(value[0]))
        case bool():
            yield not value
        case int():
            yield from (-1, 0, 1, 2, value + 1, 10**6, 2**31)
        case float():
            yield from (-1.0, float("nan"), float("inf"), 0.0)
        case str():
            yield from ("best", "signed")
        case None:
            yield from (torch.ones(5), torch.ones(20, 5), torch.ones(3, 20), torch.zeros(2).long())
            yield torch.ones(20, 5, dtype=torch.bfloat16)


def outcome(call: Any, *args: Any) -> str:
    try:
        call(*args)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_refuses_what_the_check_refuses(
    name: str, device: str | None, dtype: torch.dtype
) -> None:
    spec, called = BY_NAME[name], []
    oracle = getattr(reference, name)

    def serve(**args: Any) -> None:
        called.append(args)

    serve.__signature__ = inspect.signature(oracle)  # type: ignore[attr-defined]
    run = straight.kernel(spec, serve, serve, device)
    right = list(spec.bind(arguments(name, dtype)).values())
    assert outcome(run, *right) == "" and called
    refused = 0
    for i in range(len(right)):
        optional = [None] if spec.names[i] in spec.optional else []
        for other in (*others(right[i]), *optional):  # the dispatcher refuses other None
            args = [*right[:i], other, *right[i + 1 :]]
            want = outcome(lambda *a: spec.check(spec.bind(a)), *args)
            called.clear()
            got = outcome(run, *args)
            if want:
                refused += 1
                assert got == want and not called, (spec.names[i], other)
            elif "indices" not in got and "row_offsets must be from" not in got:  # the data
                assert got == "" and called, (spec.names[i], other)
    assert refused >= 3


def test_what_is_written_is_told_to_autograd() -> None:
    a = clone_all(
        dict(
            zip(
                BY_NAME["vector_update"].names,
                arguments("vector_update", torch.float32),
                strict=False,
            )
        )
    )
    before = a["p"]._version
    ops.vector_update(*a.values())
    assert a["p"]._version > before


def test_the_first_call_of_an_op_does_not_import_dynamo() -> None:
    """Which takes seconds."""
    call = "import sys, torch, ksae; ksae.topk(torch.ones(2, 3), 1); print('torch._dynamo'"
    call += " in sys.modules)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class ByTopk:
    """Sorted by a call that dynamo leaves to the interpreter."""

    def __init__(self, topk: Any, x: Tensor) -> None:
        self.topk, self.x = topk, x

    def __lt__(self, other: ByTopk) -> bool:
        return bool((self.topk(self.x, 1)[0] < self.topk(other.x, 1)[0]).any())


@pytest.mark.filterwarnings("ignore")
def test_dynamo_traces_no_kernel() -> None:
    """Where a kernel runs outside of a graph while dynamo looks at every frame."""
    from torch._dynamo.utils import counters

    frames = []
    for topk in (torch.ops.aten.topk.default, ops.topk):
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(
            lambda xs, topk=topk: sorted(ByTopk(topk, x) for x in xs), backend="eager"
        )
        compiled([torch.ones(2, 3), torch.zeros(2, 3)])
        frames.append(counters["frames"]["total"])
    assert frames[0] == frames[1] > 0
