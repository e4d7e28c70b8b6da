# SPDX-License-Identifier: Apache-2.0
"""The study on SynthSAEBench with a small world: it runs, goes on, says what fails, adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ksae
from ksae.activations.synthetic import SyntheticSource, World, WorldConfig
from ksae.analysis.ground_truth import compare_with_truth, cosines
from ksae.coders.initialize import initialize_from

WORLD = WorldConfig(
    features=60, d=16, most=0.5, least=0.02, roots=4, branching=3, depth=2, rank=3,
    correlation=0.3, steps=5, seed=1,
)  # fmt: skip
TINY = ["--lrs", "3e-3", "--held-out", "400", "--threads", "1", "--libraries", "ksae"]
SAMPLES = 640


@pytest.fixture()
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    from ksae.bench.studies import synth

    sizes = {"WIDTH": 24, "L0": 3, "BATCH": 32, "PREFIXES": (8, 24), "DEAD_AFTER": 320}
    for name, size in sizes.items():
        monkeypatch.setattr(synth, name, size)
    monkeypatch.setattr(synth, "WorldConfig", lambda: WORLD)
    # the MCC needs scipy, which is only there beside the libraries: tests/peers
    monkeypatch.setattr(synth, "mean_correlation", lambda a, b: float(cosines(a, b).max()))
    monkeypatch.setattr(synth, "find_spec", lambda name: name)
    return synth


def arguments(folder: Path, samples: int, every: int = SAMPLES // 2) -> list[str]:
    command = [*TINY, "--cache", str(folder / "cache"), "--out", str(folder)]
    return [*command, "--samples", str(samples), "--every", str(every)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "synth_study.json").read_text())["rows"]
    return rows


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two runs."""
    return {k: v for k, v in row.items() if k not in ("seconds", "date", "revision")}


def test_it_goes_on_where_it_was_stopped(study: Any, tmp_path: Path) -> None:
    """Stopped at half of the samples and taken up again: bit for bit as in one go."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    study.main(arguments(parts, SAMPLES // 2))
    assert [row["samples"] for row in rows_of(parts)] == [SAMPLES // 2] * 3
    study.main(arguments(parts, SAMPLES))
    study.main(arguments(whole, SAMPLES))
    key = ["activation", "samples"]
    a, b = (sorted(map(numbers, rows_of(p)), key=lambda r: [r[k] for k in key]) for p in
            (parts, whole))  # fmt: skip
    assert a == b and len(a) == 6
    study.main(arguments(whole, SAMPLES))
    assert len(rows_of(whole)) == 6
    with pytest.raises(SystemExit, match="another --out"):
        study.main([*arguments(whole, SAMPLES), "--held-out", "100"])


def test_rows_are_what_the_library_gives(study: Any, tmp_path: Path) -> None:
    study.main([*arguments(tmp_path, SAMPLES), "--activations", "topk"])
    source = SyntheticSource(World(WORLD), held_out=400)
    torch.manual_seed(0)
    sae = ksae.SAE(16, 24, ksae.TopK(3), dead_after=320)
    initialize_from(sae, next(source.batches(256, seed=1_000_000))[0])
    step = ksae.TrainStep(sae, 3e-3, clip_norm=1.0, clip="always", decoder_lr=3.0)
    for _, (x, _) in zip(range(SAMPLES // 32), source.batches(32, seed=0), strict=False):
        step(x)
    want = compare_with_truth(sae, source, batch_size=32)
    want["mcc"] = float(cosines(sae.W_dec.detach(), source.world.directions).max())
    got = rows_of(tmp_path)[-1]
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert (
        f"| topk | 0.003 | {SAMPLES} | ksae | 0 | {got['f1']:.4f} | {got['mcc']:.4f} |"
        in (tmp_path / "synth_study.md").read_text()
    )


def test_a_library_that_is_missing_is_a_row(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "missing", lambda name: f"not installed: pip install {name}")
    command = [*arguments(tmp_path, 320), "--activations", "topk", "--libraries", "sae-lens"]
    for _ in range(2):  # it is tried again, and there is one row
        study.main(command)
        (row,) = rows_of(tmp_path)
        assert "not installed: pip install sae-lens" in row["failure"]
    assert "not installed" in (tmp_path / "synth_study.md").read_text()


def test_without_scipy_it_ends_before_it_trains(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install scipy"):
        study.main(arguments(tmp_path, 320))
    assert not (tmp_path / "synth_study.json").exists()
