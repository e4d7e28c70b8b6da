# SPDX-License-Identifier: Apache-2.0
"""bench/gpu/run.py on tiny shapes, on the CPU and in Triton's interpreter: that it runs on a GPU,
that results of all ways agree, and that what was measured is on disk at any time, whatever dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from ksae.backends import serving as gpu
from ksae.bench.gpu import measure, process, report
from ksae.bench.gpu import run as script
from ksae.bench.gpu.ops import hot
from ksae.bench.gpu.steps import VARIANTS
from ksae.bench.harness import report as harness_report
from ksae.bench.harness.measure import Times
from ksae.bench.harness.record import Kept, Record, Row, load
from ksae.bench.harness.session import Session
from ksae.bench.suites import gpu as suite

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
    return load(path), path.with_suffix(".md").read_text()


@pytest.mark.nightly
def test_every_op_and_way_is_measured(results):
    run, table = results
    suite = run.suites["gpu"]
    assert run.state == suite.state == "complete" and suite.problems == []
    assert {"copy", "product", "gather"} <= suite.facts["ceilings"].keys()
    ways: dict[str, set[str]] = {}
    for row in suite.rows:
        ways.setdefault(row.op, set()).add(row.way)
        assert row.times.median > 0 and row.floor > 0
        assert f"| {row.case} | {row.op} | {row.way} |" in table
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
    assert suite.facts["tests"]["smoke"] == 0
    for shape in ("A", "B"):
        kernels = suite.facts["profile"][f"{shape}, torch.float32"]
        assert kernels and all(k["calls"] and k["us"] > 0 for k in kernels)
        assert any("ksae::topk_encode" in k["kernel"] for k in kernels)
    assert all(row.extra["wall"] > 0 for row in suite.rows if row.op == "step")


@pytest.mark.nightly
def test_the_row_for_the_table_of_ways_to_encode_is_printed(results):
    run, table = results
    for shape in ("A", "B"):
        for kind, ways in (("16 bit", {"product", "fused"}), ("float32", {*gpu.WAYS})):
            found = run.suites["gpu"].facts["choice"][f"{shape}, {kind}"]
            row = eval(found["row"], {"Row": gpu.Row})
            assert row.kind == kind and found["encode"].keys() == ways
            assert found["encode"][row.way] == min(found["encode"].values())
            assert found["aux"].keys() == ways
            assert found["aux"][row.aux] == min(found["aux"].values())
            assert " ms" in row.measured
            assert f"for the table in ksae/backends/serving.py: {row}" in table


def test_without_a_build_the_package_is_laid_out_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROOT", Path(__file__).parents[2])  # it runs from the repository
    script.pure_python(tmp_path)
    script.pure_python(tmp_path)  # over an old one
    for name in ("__init__.py", "kernels/gate.py", "bench/gpu/run.py", "step/fused.py"):
        assert (tmp_path / "ksae" / name).is_file()
    assert not list(tmp_path.rglob("*.so")) and not (tmp_path / "ksae" / "kernels").is_symlink()


def test_steps_come_before_ops_and_large_batches_last() -> None:
    small, large = script.sections(("B", "A", "B-65536", "A-65536"))
    assert small[:5] == ["ceilings", "step B", "step A", "variants B", "variants A"]
    assert large[:2] == ["step B-65536", "step A-65536"]
    assert not {name for name in large if "variants" in name or "profile" in name}


def test_the_hot_latent_is_selected_by_every_token():
    indices = torch.tensor([[1, 2, 3], [5, 0, 2], [9, 8, 5]])
    assert hot(indices, 5).tolist() == [[5, 2, 3], [5, 0, 2], [9, 8, 5]]


@pytest.mark.nightly
def test_all_ways_take_the_same_steps(results):
    run, _ = results
    for shape in ("A", "B"):
        losses = [r.extra["loss"] for r in run.rows if (r.op, r.case) == ("step", shape)]
        assert len(losses) == 5 and max(losses) - min(losses) <= 1e-4 * min(losses)


def test_without_time_it_says_so_and_still_writes(tmp_path):
    done = dry_run("--out", str(tmp_path), "--minutes", "0")
    assert done.returncode == 1, done.stderr
    (path,) = tmp_path.glob("*.json")
    run = load(path)
    assert run.state == "complete" and "no time for ceilings" in run.suites["gpu"].problems
    assert "PROBLEM: no time for ceilings" in path.with_suffix(".md").read_text()


def test_ops_agree_with_the_reference_in_the_smoke_run():
    done = dry_run("--smoke")
    assert done.returncode == 0, done.stderr


def session_in(folder: Path) -> Any:
    """Of gpu/run.py, as it begins."""
    session = script.open_session(folder / "gpu_name.json")
    session.begin("gpu", 510.0)
    session.fact("sections", begun=[])
    return session


def test_results_are_on_disk_after_each_measurement_and_goals_are_judged(tmp_path):
    session = session_in(tmp_path)
    times = lambda median: Kept(Times(median, median, median, 3), [median])

    def row(op: str, way: str, median: float, fraction: float = 0.71, **more: Any) -> None:
        kept, floor = times(median), fraction * median
        session.add(Row("gpu", "A", op, "forward", way, kept=kept, floor=floor, **more))
        assert load(session.path).rows == session.suite.rows

    row("select", "ksae", 1.0)
    row("select", "torch.topk", 4.9)
    row("encode + select", "ksae", 1.1)
    row("encode + select", "fused Triton", 1.13, peak=10**8)
    row("encode + select", "product alone", 1.0)
    row("step", "ksae", 2.0, extra={"products": 2.4})
    row("decode", "ksae", 1.0, fraction=0.69)
    session.add(Row("gpu", "A", "step", "step", "dense torch", failure="out of memory"))
    judged = {what: reached for what, _, _, _, reached in report.goals(session.suite.rows)}
    assert judged == {
        "A select: of copy": True,
        "A select: torch.topk / ksae": False,
        "A decode: of gather": False,
        "A encode + select / product": True,
        "A step / product": False,
        "A fused encode / product": False,
        "A fused encode: GB of its own": True,
    }
    written = session.path.with_suffix(".md").read_text()
    assert "| A | step | dense torch | out of memory |" in written
    assert "| A select: of copy | 0.71 | >= 0.7 | yes |" in written
    session.problem("wrong")
    assert "- PROBLEM: wrong" in session.path.with_suffix(".md").read_text()
    assert load(session.path).suites["gpu"].problems == ["wrong"]


def test_another_process_goes_on_in_the_same_time(tmp_path):
    session = session_in(tmp_path)
    session.suite.start -= 500
    session.fact("ceilings", copy=1e9)
    other = script.open_session(session.path)
    other.resume()
    assert other.suite.facts == session.suite.facts and 8 < other.left() <= 10
    other.fact("ceilings", product=1e12)
    assert session.resume().suites["gpu"].facts["ceilings"] == {"copy": 1e9, "product": 1e12}


@pytest.mark.nightly
def test_suite_of_ksae_bench_has_its_rows(results, tmp_path):
    run, _ = results
    session = Session(Record({}, "full"), tmp_path / "bench.json")
    session.begin("gpu", 1)
    session.suite.problems.append("x")
    suite.take(session, run)
    assert session.suite.rows == run.rows and session.suite.problems == ["x"]
    assert all(row.ours == row.way.startswith("ksae") for row in run.rows)
    assert session.suite.facts == run.suites["gpu"].facts
    assert "PROBLEM: x" in harness_report.terminal(session.record)


@pytest.mark.nightly
def test_suite_runs_the_script_and_takes_what_it_left(tmp_path):
    session = Session(Record({}, "full"), tmp_path / "bench.json")
    session.begin("gpu", 1)  # too little for anything
    suite.run(session)
    assert "no time for step A" in session.suite.problems


# ------------------------------------------------------------------------------ when something dies


SECTION = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from bench.gpu.run import begin, open_session
from bench.harness.record import Row
session = open_session(Path(sys.argv[2]))
session.resume()
for name in sys.argv[3].split(","):
    begin(session, name)
    if name.startswith("dies"):
        os.kill(os.getpid(), 11)
    if name.startswith("hangs"):
        time.sleep(60)
    session.add(Row("gpu", "A", name, "forward", "ksae", failure="measured"))
"""


def supervised(tmp_path: Path, *names: str, most: float = 5.0) -> Any:
    """The record of sections of which some die or hang, each as its name says."""
    session = session_in(tmp_path)

    def command(names: Any) -> list[str]:
        path = str(session.path)
        return [sys.executable, "-c", SECTION, str(BENCH.parent), path, ",".join(names)]

    process.supervise(session, names, command, tmp_path / "log", most)
    assert load(session.path).suites["gpu"].rows == session.suite.rows
    return session.suite


def test_a_section_that_dies_takes_nothing_along(tmp_path: Path) -> None:
    suite = supervised(tmp_path, "a", "dies", "b", "dies too", "c")
    assert [row.op for row in suite.rows] == ["a", "b", "c"]
    ended = "its process ended with -11, after: "
    told = [problem.split(ended)[0] for problem in suite.problems]
    assert told == ["dies: ", "dies too: "]


def test_a_section_that_hangs_is_ended(tmp_path: Path) -> None:
    suite = supervised(tmp_path, "hangs", "a", most=2.0)
    assert [row.op for row in suite.rows] == ["a"]
    (problem,) = suite.problems
    assert problem.startswith("hangs: took too long, after: hangs, ")


def test_a_process_that_does_not_start_is_not_tried_for_ever(tmp_path: Path) -> None:
    session = session_in(tmp_path)
    failing = lambda names: [sys.executable, "-c", "raise SystemExit('no ksae')"]
    process.supervise(session, ["a", "b"], failing, tmp_path / "log", 5.0)
    assert session.suite.problems == ["a: its process ended with 1, after: no ksae"]


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
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


def test_what_measures_ends_with_the_command(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(BENCH.parent)!r}); import time;"
    script += "from bench.gpu import process; process.end_with_parent();"
    script += "print('ready', flush=True); time.sleep(60)"
    child = process.start([sys.executable, "-c", script], tmp_path / "log", {})
    while "ready" not in (tmp_path / "log").read_text():
        assert child.poll() is None
        time.sleep(0.05)
    child.stdin.close()
    assert child.wait(5) == 1


def test_a_way_that_fails_leaves_the_others_their_times(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel image")

    session, timer = session_in(tmp_path), measure.Timer("cpu", 2)
    ways = {"ksae": lambda: None, "Triton": fails}
    (shape, _), cost = measure.TINY, measure.Cost(1, 1)
    assert measure.add_rows(session, timer, shape, "decode", ways, cost).keys() == {"ksae"}
    assert [row.failure for row in session.suite.rows] == [
        None,
        "RuntimeError: no kernel image",
    ]
    measure.check(session, timer, "decode", fails, torch.ones(2), 0)
    measure.check(session, timer, "decode", lambda: torch.ones(2) + 1e-3, torch.ones(2), 1e-4)
    problems = session.suite.problems
    assert len(problems) == 3 and "relative error" in problems[2]


class Device:
    """Of a GPU what a clock needs; it takes a second for each call since an event was recorded."""

    def __init__(self) -> None:
        self.now, self.idle, self.flushed = 0.0, [], 0  # idle: cycles

    def zero_(self) -> None:
        self.flushed += 1

    def event(self, enable_timing: bool) -> Any:
        event = types.SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kind: device)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", device.idle.append)
    return device


@pytest.mark.parametrize("cold", [True, False])
def test_a_device_is_timed_by_its_own_clock(device: Device, cold: bool) -> None:
    """Every way in each round, once a sample, behind an idle kernel that outlasts the host."""
    timer = measure.Timer("cuda", rounds=4)
    calls: list[str] = []

    def way(name: str, seconds: float) -> Any:
        def call() -> None:
            calls.append(name)
            time.sleep(0.01)  # the host's
            device.now += seconds

        return call

    def fails() -> None:
        raise RuntimeError("no kernel image")

    ways = {"fast": way("fast", 1e-5), "slow": way("slow", 1.0), "none": fails}
    times = timer(ways, cold=cold)
    assert {name: t.n for name, t in times.items()} == {"fast": 4, "slow": 4}
    assert times["fast"].median == pytest.approx(1e-5) and times["slow"].q3 == pytest.approx(1.0)
    assert calls.count("fast") == calls.count("slow") == 6  # compiled, and warmed, before
    assert timer.failed == {"none": "RuntimeError: no kernel image"}
    assert device.flushed == (10 if cold else 0)
    late = device.idle[-8:]  # of the rounds
    assert all(1.5 * 0.01 * 2e9 < cycles <= 0.1 * 2e9 for cycles in late)
    assert not timer.clock.hosts  # keeps no way alive
    assert timer({"none": fails}) == {} and timer.failed.keys() == {"none"}


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


def test_the_files_with_tests_for_a_gpu_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only these are collected there: others need packages that a GPU machine may lack."""
    monkeypatch.setattr(script, "ROOT", Path(__file__).parents[2])  # it runs from the repository
    names = [Path(path).name for path in script.marked()]
    assert {"test_cuda.py", "test_screened_encode.py"} <= set(names)
    assert "test_gpu_bench.py" not in names
