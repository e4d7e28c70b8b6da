# SPDX-License-Identifier: Apache-2.0
"""bench/gpu.py on tiny shapes, on the CPU and in Triton's interpreter: that it will run on a GPU,
that results of all ways agree, and that what was measured is on disk at any time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksae import gpu

BENCH = Path(__file__).parents[1] / "bench"


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "gpu.py"), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    done = dry_run("--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("gpu_dry-run_*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_every_op_and_way_is_measured(results):
    data, table = results
    assert data["finished"] and data["problems"] == []
    assert {"copy", "product", "gather"} <= data["ceilings"].keys()
    ways: dict[str, set[str]] = {}
    for row in data["rows"]:
        ways.setdefault(row["op"], set()).add(row["way"])
        assert row["median"] > 0 and row["fraction"] > 0
        assert f"| {row['shape']} | {row['op']} | {row['way']} |" in table
    assert ways == {
        "select": {"ksae", "Triton", "torch.topk"},
        "select float32": {"ksae", "Triton", "torch.topk"},
        "encode + select": {
            "ksae",
            "fused Triton",
            "product + select",
            "product alone",
            "cuBLAS + torch.topk",
        },
        "grad encode + select": {"ksae", "Triton", "products alone"},
        "encode + AuxK": {"ksae", "Triton", "fused Triton", "product + select", "encoded twice"},
        "decode": {"ksae", "Triton", "Triton gather", "embedding_bag"},
        "group": {"ksae", "Triton", "stable sort"},
        "residual": {"ksae", "Triton"},
        "unused slots": {"ksae", "Triton"},
        "latent pass": {"ksae", "Triton"},
        "group, hot latent": {"ksae", "Triton", "stable sort"},
        "latent pass, hot latent": {"ksae", "Triton"},
        "step": {"ksae", "Triton decoder", "dense torch"},
    }


def test_the_row_for_the_table_of_ways_to_encode_is_printed(results):
    data, table = results
    for shape in ("A", "B"):
        row = eval(data["choice"][shape], {"Row": gpu.Row})
        assert row.way in gpu.WAYS and "ms" in row.measured
        assert f"for the table in ksae/gpu.py: {row}" in table


def test_the_hot_latent_is_selected_by_every_token():
    from ksae.bench.gpuops import hot

    indices = torch.tensor([[1, 2, 3], [5, 0, 2], [9, 8, 5]])
    assert hot(indices, 5).tolist() == [[5, 2, 3], [5, 0, 2], [9, 8, 5]]


def test_all_ways_take_the_same_steps(results):
    data, _ = results
    for shape in ("A", "B"):
        losses = [r["loss"] for r in data["rows"] if r["op"] == "step" and r["shape"] == shape]
        assert len(losses) == 3 and max(losses) - min(losses) <= 1e-4 * min(losses)


def test_without_time_it_says_so_and_still_writes(tmp_path):
    done = dry_run("--out", str(tmp_path), "--minutes", "0")
    assert done.returncode == 1
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert data["finished"] and "no time for ceilings" in data["problems"]
    assert "PROBLEM: no time for ceilings" in path.with_suffix(".md").read_text()


def test_ops_agree_with_the_reference_in_the_smoke_run():
    done = dry_run("--smoke")
    assert done.returncode == 0, done.stderr


def test_results_are_on_disk_after_each_measurement_and_goals_are_judged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpureport

    record = gpureport.Record(tmp_path, "name", 8.5)
    (path,) = tmp_path.glob("gpu_name_*.json")

    def row(op: str, way: str, median: float, **more: float) -> None:
        times = {"median": median, "q1": median, "q3": median, "fraction": 0.71}
        record.row(shape="A", op=op, way=way, **times | more)
        assert json.loads(path.read_text())["rows"] == record.data["rows"]

    row("select", "ksae", 1.0)
    row("select", "torch.topk", 4.9)
    row("encode + select", "ksae", 1.1)
    row("encode + select", "product alone", 1.0)
    row("step", "ksae", 2.0, products=2.4)
    row("decode", "ksae", 1.0, fraction=0.69)
    record.row(shape="A", op="step", way="dense torch", note="out of memory")
    judged = {what: reached for what, _, _, _, reached in gpureport.goals(record.data["rows"])}
    assert judged == {
        "A select: of copy": True,
        "A select: torch.topk / ksae": False,
        "A decode: of gather": False,
        "A encode + select / product": True,
        "A step / product": False,
    }
    assert "| A | step | dense torch | out of memory |" in path.with_suffix(".md").read_text()


def test_suite_of_ksae_bench_has_its_rows(results, tmp_path):
    from ksae.bench import gpusuite
    from ksae.bench.record import Record
    from ksae.bench.session import Session

    data, _ = results
    session = Session(Record({}, "full"), tmp_path / "bench.json")
    gpusuite.take(session, data | {"problems": ["x"]})
    assert [(r.case, r.op, r.way) for r in session.suite.rows] == [
        (r["shape"], r["op"], r["way"]) for r in data["rows"]
    ]
    for row, r in zip(session.suite.rows, data["rows"], strict=True):
        assert row.times.median == r["median"] and row.ours == (r["way"] == "ksae")
    assert session.suite.notes == ["problem: x"]
    assert session.suite.facts["ceilings"] == data["ceilings"]


def test_suite_runs_the_script_and_takes_what_it_left(tmp_path):
    from ksae.bench import gpusuite
    from ksae.bench.record import Record
    from ksae.bench.session import Session

    session = Session(Record({}, "full"), tmp_path / "bench.json")
    session.begin("gpu", 1)  # too little for anything
    gpusuite.run(session)
    assert any("no time for measure_ops" in note for note in session.suite.notes)
