# SPDX-License-Identifier: Apache-2.0
"""The study of recipes on planted activations instead of a language model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

STEPS, BATCH = 12, 32


def tiny_study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose activations are 200 rows to train on and 100 held out, of width 8."""
    from ksae.bench.harness import data
    from ksae.bench.studies import recipe

    rows = torch.cat(data.batches("planted", 100, 8, 3))
    monkeypatch.setattr(recipe, "rows_of", lambda *_: (rows[:200], rows[200:]))
    return recipe
