# SPDX-License-Identifier: Apache-2.0
"""The study of matching pursuit at tiny sizes: it runs, goes on, and chooses by other rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import BATCH, STEPS, runs_of, tiny_study

import ksae

TINY = ["--steps", str(STEPS), "--batch", str(BATCH), "--d-sae", "24", "--ks", "4", "2"]
TINY += ["--sites", "resid", "--lrs", "1e-3", "3e-3", "--threads", "1"]


@pytest.fixture()
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tiny_study(monkeypatch, "pursuit")


def test_it_runs_resumes_and_reports(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = runs_of(study, monkeypatch)
    command = [*TINY, "--out", str(tmp_path)]
    study.main([*command, "--seeds", "0"])
    assert len(ran) == 2 * 2 * 2  # k, model, rate
    study.main([*command, "--seeds", "0", "1", "2"])
    assert len(ran) == len(set(ran)) == 8 + 2 * 4
    study.main(command)
    assert len(ran) == 16
    rows = json.loads((tmp_path / "pursuit_study.json").read_text())["cells"]
    assert all(0 < row["fvu"] < 1 and 0 < row["l0"] <= row["k"] for row in rows)
    for k in (2, 4):
        for model in ("topk", "pursuit"):
            here = [row for row in rows if (row["k"], row["model"]) == (k, model)]
            first = [row for row in here if row["seed"] == 0]
            lr = min(first, key=lambda row: row["fvu_of_choice"])["lr"]
            assert {row["lr"] for row in here if row["seed"]} == {lr}
            mean = sum(row["fvu"] for row in here if row["lr"] == lr) / 3
            table = (tmp_path / "pursuit_study.md").read_text()
            assert f"| resid | {k} | 0, 1, 2 | {model} | {lr:g} | {mean:.4f} ± " in table
    with pytest.raises(SystemExit, match="another --out"):
        study.main([*command, "--batch", "16"])


@pytest.mark.parametrize("model", ["topk", "pursuit"])
def test_it_measures_as_the_formula_says(study: Any, model: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(100, 8)
    sae = ksae.SAE(8, 24, study.MODELS[model](3))
    fvu, l0, dead = study.measure(sae, rows)
    dense = sae.encode_dense(rows)
    error = (dense @ sae.W_dec + sae.b_dec - rows).double().square().sum()
    want = error / (rows - rows.mean(0)).double().square().sum()
    assert fvu == pytest.approx(float(want.detach()), rel=1e-5)
    assert l0 == pytest.approx(float((dense != 0).sum(1).double().mean()))
    assert dead == pytest.approx(1 - float((dense != 0).any(0).double().mean()))
