# SPDX-License-Identifier: Apache-2.0
"""The suites of `ksae bench`: a module with `run(session)` each, and its share of the time."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..harness.session import Session


@dataclass(frozen=True)
class SuiteSpec:
    """What a suite measures, and the seconds that it plans in each mode on two cores."""

    text: str
    quick: float
    full: float
    device: str = "any"  # or "cuda": left out, with a note, where there is none
    only_full: bool = False  # quick runs it only where it is asked for by name

    def seconds(self, mode: str) -> float:
        return {"quick": self.quick, "full": self.full, "tiny": 2.0}[mode]


# On two cores without a GPU; what the command line and the READMEs promise.
MINUTES = {"quick": 2, "full": 40}
SUITES = {
    "ops": SuiteSpec("every op by implementation: time and memory", 22, 700),
    "step": SuiteSpec("a whole training step against other libraries", 28, 900),
    "families": SuiteSpec("the same of other architectures", 60, 300, only_full=True),
    "scaling": SuiteSpec("how cost grows with N, d, F and k", 10, 120),
    "quality": SuiteSpec(
        "what training reaches on real activations, and when", 26, 300, only_full=True
    ),
    "roofline": SuiteSpec("share of the machine's limits", 8, 60),
    "threads": SuiteSpec("torch's ops and ksae's in turns", 3, 20),
    "gpu": SuiteSpec("kernels on a GPU", 120, 480, device="cuda"),
}


def budget(seconds: float, late: float) -> float:
    """What a suite that plans `seconds` gets: `late`, by which those before it took longer than
    planned, is taken from it, but not more than half of it."""
    return max(seconds / 2, seconds - max(0.0, late))


def runner(name: str) -> Callable[[Session], Any] | str:
    """What runs a suite: `run(session)` of the module of its name; or why there is nothing."""
    if SUITES[name].device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    module = f"{__package__}.{name}"
    if importlib.util.find_spec(module) is None:
        return f"{module} is not there"
    run = getattr(importlib.import_module(module), "run", None)
    if run is None:
        return f"{module} has no run(session)"
    return run  # type: ignore[no-any-return]
