# SPDX-License-Identifier: Apache-2.0
"""The study of recipes at tiny sizes: it runs, resumes, says what fails, and adds up rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import BATCH, STEPS, runs_of, tiny_study
from torch import Tensor

import ksae

TINY = ["--steps", str(STEPS), "--batch", str(BATCH), "--d-sae", "24", "--ks", "4", "--sites"]
TINY += ["resid", "--seeds", "0", "1", "--lrs", "3e-3", "--threads", "1"]


@pytest.fixture()
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    return tiny_study(monkeypatch)


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "recipe_study.json").read_text())
    return record


def test_it_runs_resumes_and_reports(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = runs_of(study, monkeypatch)
    command = [*TINY, "--out", str(tmp_path)]
    study.main([*command, "--recipes", "free"])
    study.main(command)
    assert len(ran) == len(set(ran)) == 2 * len(study.OWN)
    study.main(command)
    assert len(ran) == 2 * len(study.OWN)
    record = record_of(tmp_path)
    assert all(0 < row["fvu"] < 1 and 0 <= row["dead"] < 1 for row in record["cells"])
    assert len({row["fvu"] for row in record["cells"]}) == len(record["cells"])
    text = (tmp_path / "recipe_study.md").read_text()
    for name in study.OWN:
        rows = [row for row in record["cells"] if row["recipe"] == name]
        mean = sum(row["fvu"] for row in rows) / 2
        assert f"| {name} | 0, 1 | {mean:.4f} (" in text
    with pytest.raises(SystemExit, match="another --out"):
        study.main([*command, "--batch", "16"])


def test_a_cell_is_what_the_step_gives(study: Any) -> None:
    from ksae.bench.suites import quality

    train, held = study.rows_of()
    cell = study.Cell("resid", 24, 4, 1, STEPS, 3e-3, "always, decay")
    got = study.run(cell, train, held, BATCH)
    start: dict[str, Tensor] = quality.start_of(24, train, 1)
    model = ksae.TopKSAE(8, 24, 4, dead_after=STEPS * BATCH // 4)
    with torch.no_grad():
        for name, value in start.items():
            getattr(model, name).copy_(value)
    step = ksae.TrainStep(model, 3e-3, decoder_lr=1.0, clip_norm=1.0, clip="always")
    falls = {9: 1.0, 10: 2 / 3, 11: 1 / 3}  # the last fifth of 12 steps, from where it falls on
    for t, rows in enumerate(quality.batches(train, BATCH, STEPS, 1)):
        step.lr = 3e-3 * falls.get(t, 1.0)
        step(train[rows])
    error = (model(held).recon - held).double().square().sum()
    fvu = error / (held - held.mean(0)).double().square().sum()
    assert got["fvu"] == pytest.approx(float(fvu.detach()), rel=1e-5)


def test_a_cell_that_fails_says_why_and_is_tried_again(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "missing", lambda name: f"not installed: pip install {name}")
    command = [*TINY, "--out", str(tmp_path), "--recipes", "sae-lens", "free"]
    study.main(command)
    rows = record_of(tmp_path)["cells"]
    failed = [row for row in rows if "failure" in row]
    assert len(rows) == 4 and [row["recipe"] for row in failed] == ["sae-lens"] * 2
    assert "not installed: pip install sae-lens" in (tmp_path / "recipe_study.md").read_text()
    study.main(command)
    assert len(record_of(tmp_path)["cells"]) == 4


def cell(seed: int, lr: float, fvu: float, recipe: str = "free") -> dict[str, Any]:
    place = {"site": "resid", "F": 24, "k": 4, "seed": seed, "steps": 9, "lr": lr, "recipe": recipe}
    return place | {"fvu": fvu, "dead": 0.5, "seconds": 1.0}


def test_a_mean_of_fewer_seeds_says_so(study: Any) -> None:
    cells = [cell(0, 1e-3, 0.25), cell(1, 1e-3, 0.75), cell(1, 2e-3, 0.375)]
    *_, row = study.recipe_report.table({"cells": cells}).splitlines()
    end = "| free | 0, 1 | 0.5000 (50.0%) | **0.3750** (50.0%, of 1) |"
    assert row.endswith(end)


def test_recipes_of_one_colour_have_other_lines(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = study.recipe_report.figures.pyplot()
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        pyplot, "close", lambda figure: drawn.extend(
            (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines
        )
    )  # fmt: skip
    cells = [cell(0, lr, 0.5 + lr, f"recipe {n}") for n in range(25) for lr in (1e-3, 2e-3)]
    study.recipe_report.plot({"cells": cells}, tmp_path)
    assert len(drawn) == len(set(drawn)) == 25 and len({color for color, _ in drawn}) == 10
    assert (tmp_path / "recipe_study.png").stat().st_size > 1000
