# SPDX-License-Identifier: Apache-2.0
"""bench/gpu/run.py on tiny shapes, on the CPU and in Triton's interpreter: that it runs on a GPU,
that results of all ways agree, and that what was measured is on disk at any time, whatever dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ksae.backends import serving as gpu
from ksae.bench.gpu.steps import VARIANTS

BENCH = Path(__file__).parents[2] / "bench"


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "gpu" / "run.py"), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    done = dry_run("--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("gpu_dry-run_*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.mark.nightly
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
            "product + select, 32 MiB",
            "product + select, 1024 MiB",
            "product alone",
            "cuBLAS + torch.topk",
        },
        "grad encode + select": {"ksae", "Triton", "fused Triton", "products alone"},
        "encode float32": {
            "ksae",
            "fused Triton",
            "fused Triton, new copy",
            "screened product",
            "screened product, new copy",
            "screened product, Triton",
            "product + select",
            "bf16 product alone",
            "product alone",
        },
        "encode + AuxK": {"ksae", "Triton", "fused Triton", "product + select", "encoded twice"},
        "encode float32 + AuxK": {
            "ksae",
            "Triton",
            "fused Triton",
            "product + select",
            "screened product",
        },
        "decode": {"ksae", "Triton", "Triton gather", "embedding_bag"},
        "group": {"ksae", "Triton", "stable sort"},
        "residual": {"ksae", "Triton"},
        "unused slots": {"ksae", "Triton"},
        "latent pass": {"ksae", "Triton"},
        "group, hot latent": {"ksae", "Triton", "stable sort"},
        "latent pass, hot latent": {"ksae", "Triton"},
        "step": {
            "ksae",
            "ksae in a CUDA graph",
            "ksae without AuxK",
            "Triton decoder",
            "dense torch",
        },
        "step variants": {*VARIANTS},
    }
    assert data["tests"]["smoke"] == 0
    for shape in ("A", "B"):
        kernels = data["profile"][f"{shape}, torch.float32"]
        assert kernels and all(k["calls"] and k["us"] > 0 for k in kernels)
        assert any("ksae::topk_encode" in k["kernel"] for k in kernels)
    assert all(row["wall"] > 0 for row in data["rows"] if row["op"] == "step")


@pytest.mark.nightly
def test_the_row_for_the_table_of_ways_to_encode_is_printed(results):
    data, table = results
    for shape in ("A", "B"):
        for kind, ways in (("16 bit", {"product", "fused"}), ("float32", {*gpu.WAYS})):
            found = data["choice"][f"{shape}, {kind}"]
            row = eval(found["row"], {"Row": gpu.Row})
            assert row.kind == kind and found["encode"].keys() == ways
            assert found["encode"][row.way] == min(found["encode"].values())
            assert found["aux"].keys() == ways
            assert found["aux"][row.aux] == min(found["aux"].values())
            assert " ms" in row.measured
            assert f"for the table in ksae/backends/serving.py: {row}" in table


def test_without_a_build_the_package_is_laid_out_in_python(
    process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ksae.bench.gpu import run

    monkeypatch.setattr(run, "ROOT", Path(__file__).parents[2])  # it runs from the repository
    run.pure_python(tmp_path)
    run.pure_python(tmp_path)  # over an old one
    for name in ("__init__.py", "kernels/gate.py", "bench/gpu/run.py", "step/fused.py"):
        assert (tmp_path / "ksae" / name).is_file()
    assert not list(tmp_path.rglob("*.so")) and not (tmp_path / "ksae" / "kernels").is_symlink()


def test_steps_come_before_ops_and_large_batches_last() -> None:
    from ksae.bench.gpu.run import sections

    small, large = sections(("B", "A", "B-65536", "A-65536"))
    assert small[:5] == ["ceilings", "step B", "step A", "variants B", "variants A"]
    assert large[:2] == ["step B-65536", "step A-65536"]
    assert not {name for name in large if "variants" in name or "profile" in name}


def test_the_hot_latent_is_selected_by_every_token():
    from ksae.bench.gpu.ops import hot

    indices = torch.tensor([[1, 2, 3], [5, 0, 2], [9, 8, 5]])
    assert hot(indices, 5).tolist() == [[5, 2, 3], [5, 0, 2], [9, 8, 5]]


@pytest.mark.nightly
def test_all_ways_take_the_same_steps(results):
    data, _ = results
    for shape in ("A", "B"):
        losses = [r["loss"] for r in data["rows"] if r["op"] == "step" and r["shape"] == shape]
        assert len(losses) == 5 and max(losses) - min(losses) <= 1e-4 * min(losses)


def test_without_time_it_says_so_and_still_writes(tmp_path):
    done = dry_run("--out", str(tmp_path), "--minutes", "0")
    assert done.returncode == 1, done.stderr
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert data["finished"] and "no time for ceilings" in data["problems"]
    assert "PROBLEM: no time for ceilings" in path.with_suffix(".md").read_text()


def test_ops_agree_with_the_reference_in_the_smoke_run():
    done = dry_run("--smoke")
    assert done.returncode == 0, done.stderr


def test_results_are_on_disk_after_each_measurement_and_goals_are_judged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from gpu import report

    record = report.Record(tmp_path, "name", 8.5)
    (path,) = tmp_path.glob("gpu_name_*.json")

    def row(op: str, way: str, median: float, **more: float) -> None:
        times = {"median": median, "q1": median, "q3": median, "fraction": 0.71}
        record.row(shape="A", op=op, way=way, **times | more)
        assert json.loads(path.read_text())["rows"] == record.data["rows"]

    row("select", "ksae", 1.0)
    row("select", "torch.topk", 4.9)
    row("encode + select", "ksae", 1.1)
    row("encode + select", "fused Triton", 1.13, extra_bytes=1e8)
    row("encode + select", "product alone", 1.0)
    row("step", "ksae", 2.0, products=2.4)
    row("decode", "ksae", 1.0, fraction=0.69)
    record.row(shape="A", op="step", way="dense torch", note="out of memory")
    judged = {what: reached for what, _, _, _, reached in report.goals(record.data["rows"])}
    assert judged == {
        "A select: of copy": True,
        "A select: torch.topk / ksae": False,
        "A decode: of gather": False,
        "A encode + select / product": True,
        "A step / product": False,
        "A fused encode / product": False,
        "A fused encode: GB of its own": True,
    }
    assert "| A | step | dense torch | out of memory |" in path.with_suffix(".md").read_text()


@pytest.mark.nightly
def test_suite_of_ksae_bench_has_its_rows(results, tmp_path):
    from ksae.bench.harness.record import Record
    from ksae.bench.harness.session import Session
    from ksae.bench.suites import gpu

    data, _ = results
    session = Session(Record({}, "full"), tmp_path / "bench.json")
    gpu.take(session, data | {"problems": ["x"]})
    assert [(r.case, r.op, r.way) for r in session.suite.rows] == [
        (r["shape"], r["op"], r["way"]) for r in data["rows"]
    ]
    for row, r in zip(session.suite.rows, data["rows"], strict=True):
        assert (row.times.median, row.times.n) == (r["median"], r["n"])
        assert row.ours == r["way"].startswith("ksae")
    assert session.suite.notes == ["problem: x"]
    assert session.suite.facts["ceilings"] == data["ceilings"]


@pytest.mark.nightly
def test_suite_runs_the_script_and_takes_what_it_left(tmp_path):
    from ksae.bench.harness.record import Record
    from ksae.bench.harness.session import Session
    from ksae.bench.suites import gpu

    session = Session(Record({}, "full"), tmp_path / "bench.json")
    session.begin("gpu", 1)  # too little for anything
    gpu.run(session)
    assert any("no time for step A" in note for note in session.suite.notes)


# ------------------------------------------------------------------------------ when something dies


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))  # as where gpu/run.py is run as a file
    from gpu import process

    return process


SECTION = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from gpu.report import Record
record = Record.resume(Path(sys.argv[2]))
for name in sys.argv[3].split(","):
    record.begin(name)
    if name.startswith("dies"):
        os.kill(os.getpid(), 11)
    if name.startswith("hangs"):
        time.sleep(60)
    record.row(shape="A", op=name, way="ksae", note="measured")
"""


def supervised(process: Any, tmp_path: Path, *names: str, most: float = 5.0) -> Any:
    """The record of sections of which some die or hang, each as its name says."""
    from ksae.bench.gpu.report import Record

    record = Record(tmp_path, "name", 8.5)

    def command(names: Any) -> list[str]:
        return [sys.executable, "-c", SECTION, str(BENCH), str(record.path), ",".join(names)]

    process.supervise(record, names, command, tmp_path / "log", most)
    assert record.data == json.loads(record.path.read_text())
    return record


def test_a_section_that_dies_takes_nothing_along(process: Any, tmp_path: Path) -> None:
    record = supervised(process, tmp_path, "a", "dies", "b", "dies too", "c")
    assert [row["op"] for row in record.data["rows"]] == ["a", "b", "c"]
    ended = "its process ended with -11, after: "
    told = [problem.split(ended)[0] for problem in record.data["problems"]]
    assert told == ["dies: ", "dies too: "]


def test_a_section_that_hangs_is_ended(process: Any, tmp_path: Path) -> None:
    record = supervised(process, tmp_path, "hangs", "a", most=2.0)
    assert [row["op"] for row in record.data["rows"]] == ["a"]
    (problem,) = record.data["problems"]
    assert problem.startswith("hangs: took too long, after: hangs, ")


def test_a_process_that_does_not_start_is_not_tried_for_ever(process: Any, tmp_path: Path) -> None:
    from ksae.bench.gpu.report import Record

    record = Record(tmp_path, "name", 8.5)
    failing = lambda names: [sys.executable, "-c", "raise SystemExit('no ksae')"]
    process.supervise(record, ["a", "b"], failing, tmp_path / "log", 5.0)
    assert record.data["problems"] == ["a: its process ended with 1, after: no ksae"]


def test_what_a_process_started_ends_with_it(process: Any, tmp_path: Path) -> None:
    """As the compilers do that a build has started when its time is over."""
    script = (
        "import subprocess, sys; print('begun', flush=True);"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True); import time; time.sleep(60)"
    )
    status, out = process.run([sys.executable, "-c", script], 2.0, tmp_path / "log")
    assert status == process.TIMED_OUT and "begun" in out
    time.sleep(0.2)
    state = Path(f"/proc/{out.split()[-1]}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_measures_ends_with_the_command(process: Any, tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import time;"
    script += "from gpu import process; process.end_with_parent();"
    script += "print('ready', flush=True); time.sleep(60)"
    child = process.start([sys.executable, "-c", script], tmp_path / "log", {})
    while "ready" not in (tmp_path / "log").read_text():
        assert child.poll() is None
        time.sleep(0.05)
    child.stdin.close()
    assert child.wait(5) == 1


def test_a_way_that_fails_leaves_the_others_their_times(tmp_path: Path) -> None:
    from ksae.bench.gpu import measure
    from ksae.bench.gpu.report import Record

    def fails() -> None:
        raise RuntimeError("no kernel image")

    record, timer = Record(tmp_path, "name", 8.5), measure.Timer("cpu", 2)
    ways = {"ksae": lambda: None, "Triton": fails}
    (shape, _), cost = measure.TINY, measure.Cost(1, 1)
    assert measure.add_rows(record, timer, shape, "decode", ways, cost).keys() == {"ksae"}
    assert [row.get("note") for row in record.data["rows"]] == [
        None,
        "RuntimeError: no kernel image",
    ]
    measure.check(record, timer, "decode", fails, torch.ones(2), 0)
    measure.check(record, timer, "decode", lambda: torch.ones(2) + 1e-3, torch.ones(2), 1e-4)
    assert len(record.data["problems"]) == 3 and "relative error" in record.data["problems"][2]


TESTS_THAT_FAIL = """
import pytest
pytestmark = getattr(pytest.mark, "gpu")
@pytest.mark.parametrize("n", range(5))
def test_n(n):
    assert n != 2, "wrong number"
"""


@pytest.mark.parametrize("lost", [False, True])
def test_failures_of_the_gpu_tests_are_told_and_do_not_spread(tmp_path: Path, lost: bool) -> None:
    """lost: the device is of no use after the failure, and the process ends."""
    (tmp_path / "test_n.py").write_text(TESTS_THAT_FAIL)
    broken = "raise RuntimeError('CUDA error: an illegal memory access')" if lost else "pass"
    (tmp_path / "conftest.py").write_text(
        "import sys, types\n"
        f"def wait():\n    {broken}\n"
        "cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=wait)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = [sys.executable, "-m", "pytest", "-v", "-rN", "-p", "gpu.plugin", "-m", "gpu", "."]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(BENCH)}, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "\nFAILED test_n.py::test_n[2]\n" in done.stdout and "wrong number" in done.stdout
    assert ("1 failed, 2 passed" if lost else "1 failed, 4 passed") in done.stdout
    assert ("the device is lost after test_n.py::test_n[2]" in done.stdout) == lost


def test_the_files_with_tests_for_a_gpu_are_found(process: Any) -> None:
    """Only these are collected there: others need packages that a GPU machine may lack."""
    from gpu import run as script

    names = [Path(path).name for path in script.marked()]
    assert {"test_cuda.py", "test_screened_encode.py"} <= set(names)
    assert "test_gpu_bench.py" not in names
