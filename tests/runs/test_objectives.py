# SPDX-License-Identifier: Apache-2.0
"""Runs whose objective has more than one reconstruction: prefixes, other k, AuxK by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import assert_resumes

import ksae
from ksae.errors import UserError
from ksae.runs import config as runconfig
from ksae.runs.config import RunConfig, override


def arguments(tmp_path: Path, out: str) -> list[str]:
    data = tmp_path / "x.npy"
    if not data.exists():
        np.save(data, np.random.default_rng(0).standard_normal((400, 6), np.float32))
    options = {
        "activations": data, "out": tmp_path / out, "d-sae": 32, "k": 2, "batch-size": 32,
        "steps": 20, "checkpoint-every": 7, "threads": 1, "prefixes": "4,16,32", "lr": 3e-3,
        "prefix-weights": "sum", "auxk": "saelens", "multi-k": "[5, 1]", "dead-after": 40,
    }  # fmt: skip
    return [*(str(w) for n, v in options.items() for w in (f"--{n}", v)), "--no-progress"]


def test_train_and_resume(tmp_path: Path) -> None:
    lines = assert_resumes(lambda out: arguments(tmp_path, out), tmp_path)
    assert {"fvu_4", "fvu_16", "multi_topk_loss", "auxk_loss"} <= lines[-1].keys()
    assert lines[-1]["fvu_4"] > lines[-1]["fvu_16"] > lines[-1]["fvu"]
    saved = runconfig.read(tmp_path / "a" / "run.yaml").model
    assert (saved.prefixes, saved.prefix_weights) == ((4, 16, 32), "sum")
    assert (saved.multi_k, saved.auxk) == ((5, 1), "saelens")
    model = ksae.load(tmp_path / "a")
    assert model.prefixes == (4, 16, 32) and model.multi_k == ((5, 1 / 8), (1, 1 / 8))
    assert model.auxk == "saelens" and model.prefix_weights == "sum"
    evaluation = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert evaluation["fvu_4"] > evaluation["fvu_16"] > evaluation["fvu"]


@pytest.mark.parametrize("value", ["4,16,32", "[4, 16, 32]", [4, 16, 32], (4, 16, 32)])
def test_a_list_may_be_text(value: Any) -> None:
    config = override(RunConfig(), {"model.d_sae": 32, "model.prefixes": value})
    assert config.model.prefixes == (4, 16, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prefixes": [4, 16]}, "model.prefixes must rise from 0 or more to model.d_sae = 32"),
        ({"prefixes": []}, "model.prefixes must rise"),
        ({"prefixes": [16, 4, 32]}, "got [16, 4, 32]"),
        ({"prefixes": [-1, 32]}, "model.prefixes must rise"),
        ({"prefixes": "a,32"}, "model.prefixes must be a whole number, got 'a'"),
        ({"prefixes": 32.5}, "model.prefixes must be a whole number, or several in a list"),
        ({"prefix_weights": "max"}, "model.prefix_weights must be 'mean' or 'sum' or"),
        ({"auxk": "mine"}, "model.auxk must be 'dictionary_learning' or"),
        ({"multi_k": [33]}, "model.multi_k must be different numbers in [1, 32], got [33]"),
        ({"multi_k": [3, 3]}, "model.multi_k must be different numbers"),
        ({"multi_k": [3], "multi_topk": True}, "model.multi_k must be null with multi_topk"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        runconfig.from_dict({"model": {"d_sae": 32, "k": 2, **settings}})
    assert words in str(caught.value)
