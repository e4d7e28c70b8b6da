# SPDX-License-Identifier: Apache-2.0
"""Studies on planted activations instead of a language model's."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

STEPS, BATCH = 12, 32


def tiny_study(monkeypatch: pytest.MonkeyPatch, name: str = "recipe") -> Any:
    """The module of that name, on 200 rows to train on and 100 held out, of width 8."""
    from ksae.bench.harness import data

    study = importlib.import_module(f"ksae.bench.studies.{name}")
    rows = torch.cat(data.batches("planted", 100, 8, 3))
    monkeypatch.setattr(study, "rows_of", lambda *_: (rows[:200], rows[200:]))
    return study


def runs_of(study: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cells that the study runs from here on, as it runs them."""
    ran: list[Any] = []
    run = study.run
    monkeypatch.setattr(study, "run", lambda cell, *a: (ran.append(cell), run(cell, *a))[1])
    return ran
